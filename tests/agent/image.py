"""Images with an agent, made without a registry.

The stand-in agent must run in any sandbox image, so it brings all that it needs in the folder `/execd`: the interpreter
that runs these tests, its loader and shared libraries, and the modules that the agent imports. `/execd/execd` is a
script that starts the loader with its library path. `/bootstrap.sh` lies beside it, as in a real agent image.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import py_compile
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import aiodocker
import msgspec

from app.cli.local_image import ensure_local_image, entry, regular_file, root_filesystem, tar

STANDIN = Path(__file__).with_name("standin")
BOOTSTRAP = (STANDIN / "bootstrap.sh").read_bytes()
START = b"""#!/bin/sh
here=${0%/*}
export PYTHONHOME="$here" PYTHONPATH="$here/modules.zip:$here/extensions" PYTHONDONTWRITEBYTECODE=1
exec "$here/loader" --library-path "$here/libraries" "$here/python" -c 'import sys, execd; execd.main(sys.argv[1:])' "$@"
"""
ASK = """
import encodings.ascii, encodings.idna, encodings.latin_1, execd, json
files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if name != "__main__"}
json.dump({name: file for name, file in files.items() if file}, sys.stdout)
"""
"""Asks an interpreter which modules it has when it has imported the agent."""
SLEEPER = b"#!/bin/sh\nexec sleep 3600\n"


async def ensure_agent_image(docker: aiodocker.Docker) -> str:
    """The stand-in agent's image."""
    return await _ensure(docker, "sandledger-agent", standin_layer())


async def ensure_tiny_agent_image(docker: aiodocker.Docker, *, blocks: bool = False) -> str:
    """An image whose agent only sleeps. With `blocks`, its `/execd` cannot be read before somebody writes to it."""
    execd = entry("execd", tarfile.FIFOTYPE, 0o755) if blocks else regular_file("execd", SLEEPER, 0o755)
    return await _ensure(docker, "sandledger-tiny-agent", tar([execd, regular_file("bootstrap.sh", BOOTSTRAP)]))


async def _ensure(docker: aiodocker.Docker, name: str, layer: bytes) -> str:
    # The tag is a digest of the files, so that a changed agent is another image.
    reference = f"{name}:{hashlib.sha256(layer).hexdigest()[:12]}"
    return await ensure_local_image(docker, reference, lambda: [root_filesystem(), layer])


@cache
def standin_layer() -> bytes:
    """A tar with `/execd` and `/bootstrap.sh`."""
    python = Path(sys.executable).resolve()
    loader = _loader(python)
    program = f"import sys; sys.path.append({str(STANDIN)!r})\n{ASK}"
    asked = subprocess.run([python, "-I", "-c", program], capture_output=True, check=True)
    modules = msgspec.json.decode(asked.stdout, type=dict[str, str])
    extensions = sorted(Path(file) for file in modules.values() if ".so" in Path(file).name)
    libraries = dict(sorted(pair for file in (python, *extensions) for pair in _libraries(loader, file)))
    entries = [entry(f"execd{folder}", tarfile.DIRTYPE, 0o755) for folder in ("", "/libraries", "/extensions")]
    entries += [
        regular_file("execd/execd", START, 0o755),
        regular_file("execd/loader", loader.read_bytes(), 0o755),
        regular_file("execd/python", python.read_bytes(), 0o755),
        regular_file("execd/modules.zip", _modules(modules)),
        *(regular_file(f"execd/libraries/{name}", file.read_bytes(), 0o755) for name, file in libraries.items()),
        *(regular_file(f"execd/extensions/{file.name}", file.read_bytes(), 0o755) for file in extensions),
        regular_file("bootstrap.sh", BOOTSTRAP, 0o755),
    ]
    return tar(entries)


def _libraries(loader: Path, binary: Path) -> Iterator[tuple[str, Path]]:
    """Those that a binary needs, by the names that it asks for; a file may have another one."""
    listed = subprocess.run([loader, "--list", binary], capture_output=True, check=True, text=True)
    for line in listed.stdout.splitlines():
        name, arrow, found = line.partition(" => ")
        if arrow:
            yield Path(name.strip()).name, Path(found.rpartition(" (")[0])


def _modules(modules: dict[str, str]) -> bytes:
    """The Python ones, compiled. The archive is not compressed: the interpreter reads it before it has zlib."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive, tempfile.TemporaryDirectory() as folder:
        for name, file in sorted(modules.items()):
            if file.endswith(".py"):
                path = name.replace(".", "/") + ("/__init__.pyc" if file.endswith("__init__.py") else ".pyc")
                compiled = py_compile.compile(
                    file,
                    f"{folder}/c",
                    path,
                    doraise=True,
                    invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
                )
                archive.writestr(zipfile.ZipInfo(path), Path(compiled).read_bytes())
    return packed.getvalue()


def _loader(program: Path) -> Path:
    """The dynamic loader that an ELF file of 64 bits names in its program headers."""
    binary = program.read_bytes()
    order = "<" if binary[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", binary, 32)
    size, count = struct.unpack_from(f"{order}HH", binary, 54)
    for n in range(count):
        kind, _, offset, _, _, length = struct.unpack_from(f"{order}IIQQQQ", binary, table + size * n)
        if kind == 3:
            return Path(os.fsdecode(binary[offset : offset + length].rstrip(b"\0")))
    raise AssertionError(f"{program} names no loader")


async def _main() -> None:
    """Make it on the engine of DOCKER_HOST and print its name, for the demo."""
    async with aiodocker.Docker() as docker:
        print(await ensure_agent_image(docker))


if __name__ == "__main__":
    asyncio.run(_main())
