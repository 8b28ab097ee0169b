"""A tiny image that needs no registry: a root file system made from the machine's static busybox.

Demo and tests must run where no image can be pulled. The image archive (the format of `docker save`) is built in memory
with fixed times, owners and order, and given to the engine in one load request. The same busybox therefore always
gives the same image id.

Invariants: an image that bears the reference is left as it is, also if another program made it. Two callers at once
both succeed, since they load the same image. Nothing is written to this machine's disk.

Fails with `SettingsError` when there is no busybox that runs without libraries, with `RuntimeUnavailable` when the
engine does not answer, with `RuntimeRejected` when it does not want the archive. The first two say what to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import aiodocker
import msgspec

from app.errors import RuntimeRejected, RuntimeUnavailable, SettingsError

_NAMES = ("busybox", "busybox.static", "busybox-static")
_SYSTEM_PATHS = ("/bin", "/usr/bin", "/sbin", "/usr/sbin")
_EPOCH = "1970-01-01T00:00:00Z"
_FOLDERS = {"bin": 0o755, "etc": 0o755, "opt": 0o755, "root": 0o700, "tmp": 0o1777, "usr": 0o755}
_FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/false\n",
    "etc/group": b"root:x:0:\nnogroup:x:65534:\n",
}
_PT_INTERP = 3
"""The program header of a binary that needs a dynamic loader, thus libraries."""


async def ensure_busybox_image(docker: aiodocker.Docker, reference: str = "sandledger-demo:1") -> str:
    """Make sure that the engine has `reference` (a name with a tag), and return it."""
    return await ensure_local_image(docker, reference, lambda: [root_filesystem()])


async def ensure_local_image(docker: aiodocker.Docker, reference: str, layers: Callable[[], Sequence[bytes]]) -> str:
    """The same for an image of other layers, each a tar of its files."""
    try:
        if not await _present(docker, reference):
            architecture = (await docker.version())["Arch"]
            archive = await asyncio.to_thread(lambda: _image_archive(reference, architecture, layers()))
            # cast: the library's annotation mixes the streaming with the plain answer.
            await cast("Any", docker.images).import_image(io.BytesIO(archive))
    except aiodocker.DockerError as error:
        if 0 < error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            raise RuntimeRejected("IMAGE_LOAD_FAILED", f"{reference}: {error.message}") from error
        raise RuntimeUnavailable(
            f"the engine did not load the local image {reference}: {error.message}; `make engine` gives you an engine"
        ) from error
    return reference


def root_filesystem() -> bytes:
    """A tar of the root file system that the local image is made of."""
    busybox = _find_busybox()
    return _root_file_system(busybox.read_bytes(), _applets(busybox))


async def _present(docker: aiodocker.Docker, reference: str) -> bool:
    try:
        await docker.images.inspect(reference)
    except aiodocker.DockerError as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return False
        raise
    return True


def _image_archive(reference: str, architecture: str, layers: Sequence[bytes]) -> bytes:
    digests = [hashlib.sha256(layer).hexdigest() for layer in layers]
    config = msgspec.json.encode(
        {
            "architecture": architecture,
            "os": "linux",
            "created": _EPOCH,
            "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
            "history": [{"created": _EPOCH, "comment": "local busybox"} for _ in layers],
        }
    )
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": config_name, "RepoTags": [reference], "Layers": [f"{digest}.tar" for digest in digests]}]
    return tar(
        [
            regular_file(config_name, config),
            *(regular_file(f"{digest}.tar", layer) for digest, layer in zip(digests, layers, strict=True)),
            regular_file("manifest.json", msgspec.json.encode(manifest)),
        ]
    )


def _find_busybox() -> Path:
    """The first busybox without a dynamic loader; Debian's plain `busybox` package, for one, needs libraries."""
    path = os.pathsep.join((*_SYSTEM_PATHS, os.environ.get("PATH", "")))
    found = [Path(where) for name in _NAMES if (where := shutil.which(name, path=path))]
    for busybox in found:
        if _is_static(busybox.read_bytes()):
            return busybox
    seen = f"{found[0]} needs shared libraries" if found else "this machine has no busybox"
    raise SettingsError(
        f"a local image is made from a static busybox, but {seen}: install the package busybox-static "
        "(Debian and Ubuntu: apt-get install busybox-static)"
    )


def _is_static(binary: bytes) -> bool:
    """True for an ELF file that names no interpreter in its program headers (System V ABI, chapters 4 and 5)."""
    if binary[:4] != b"\x7fELF":
        return False
    wide, order = binary[4] == 2, "<" if binary[5] == 1 else ">"  # noqa: PLR2004 # ELFCLASS64, ELFDATA2LSB
    (table,) = struct.unpack_from(f"{order}Q" if wide else f"{order}I", binary, 32 if wide else 28)
    size, count = struct.unpack_from(f"{order}HH", binary, 54 if wide else 42)
    kinds = (struct.unpack_from(f"{order}I", binary, table + size * n)[0] for n in range(count))
    return _PT_INTERP not in kinds


def _applets(busybox: Path) -> list[str]:
    listed = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True, timeout=30)  # noqa: S603
    return sorted(set(listed.stdout.split()) - {"busybox"})


def _root_file_system(busybox: bytes, applets: list[str]) -> bytes:
    entries = [entry(name, tarfile.DIRTYPE, mode) for name, mode in _FOLDERS.items()]
    entries += [regular_file(name, content) for name, content in _FILES.items()]
    entries.append(regular_file("bin/busybox", busybox, 0o755))
    entries += [entry(f"bin/{name}", tarfile.SYMTYPE, 0o777, "busybox") for name in applets]
    entries.append(entry("usr/bin", tarfile.SYMTYPE, 0o777, "../bin"))  # for scripts that ask /usr/bin/env
    return tar(entries)


def entry(name: str, kind: bytes, mode: int, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a tar, without content."""
    info = tarfile.TarInfo(name)  # owner 0:0 and time 0, as it comes
    info.type, info.mode, info.linkname = kind, mode, target
    return info, b""


def regular_file(name: str, content: bytes, mode: int = 0o644) -> tuple[tarfile.TarInfo, bytes]:
    """A file of a tar."""
    info, _ = entry(name, tarfile.REGTYPE, mode)
    info.size = len(content)
    return info, content


def tar(entries: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """The entries in their order; the same ones always give the same bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()
