"""An nginx of the distribution, unpacked beside the state of this checkout and not installed."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from app.proxy.nginx import Plan, configuration, secret_text
from tests.conftest import ROOT
from tests.support.needs import refuse_or_skip

_INSTALLED = Path("/usr/sbin/nginx")
_FOLDER = ROOT / ".state" / "nginx"
NOBODY = 65534
MAIN = """daemon off;
worker_processes 1;
pid nginx.pid;
error_log error.log warn;
events {{ worker_connections 8192; }}
http {{
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {}
}}
"""


class Nginx:
    """One that runs, or that ran."""

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self.folder = folder
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self._process: subprocess.Popen[Any] | None = None

    @property
    def log(self) -> str:
        """Its error log."""
        path = self.folder / "error.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """The listening socket is ours and open already, as nginx itself does it when it is replaced by a newer one. So
        nobody needs to wait for it.
        """
        number = self._listener.fileno()
        self._process = subprocess.Popen(
            [*self._words()], pass_fds=(number,), env={"NGINX": f"{number};"}, stderr=subprocess.DEVNULL, **_account()
        )

    def check(self) -> tuple[int, str]:
        """What `nginx -t` says."""
        said = subprocess.run([*self._words(), "-t"], capture_output=True, text=True, check=False, **_account())
        return said.returncode, said.stderr

    def _words(self) -> list[str]:
        folder = self.folder
        return [str(folder / "nginx"), "-p", f"{folder}/", "-c", "nginx.conf", "-e", "error.log"]

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)
            self._process = None


def _account() -> dict[str, Any]:
    """Never root."""
    return {"user": NOBODY, "group": NOBODY} if os.getuid() == 0 else {}


@contextmanager
def made(
    config: str, secret: str, listener: socket.socket, prepare: Callable[[Path], object] | None = None
) -> Iterator[Nginx]:
    """Everything but the start. `config` has `@folder@` for its folder; `prepare` puts more files there."""
    folder = Path(tempfile.mkdtemp(prefix="sandledger-nginx-"))
    try:
        shutil.copy(binary(), folder / "nginx")
        (folder / "nginx.conf").write_text(MAIN.format("include sandledger.conf;"))
        (folder / "sandledger.conf").write_text(config.replace("@folder@", str(folder)))
        (folder / "secret.conf").write_text(secret if "proxy_set_header" in secret else secret_text(secret))
        if prepare is not None:
            prepare(folder)
        if os.getuid() == 0:
            for path in (folder, *folder.iterdir()):
                os.chown(path, NOBODY, NOBODY)
        front = Nginx(folder, listener)
        try:
            yield front
        finally:
            front.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan(listen: str, server: int, domain: str = "") -> Plan:
    """As `sandledger nginx` makes it."""
    address = f"127.0.0.1:{server}"
    return Plan("test", listen, address, address, "@folder@/secret.conf", domain)


@contextmanager
def listening() -> Iterator[tuple[socket.socket, str]]:
    """A socket for an nginx, and its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        yield listener, f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def running(server: int, secret: str, domain: str = "") -> Iterator[Nginx]:
    """nginx in front of the server at this loopback port."""
    with listening() as (listener, address):
        config = configuration(plan(address, server, domain))
        with made(config, secret, listener) as front:
            front.start()
            try:
                yield front
            finally:
                print(front.log)  # pytest shows it when the test fails


class NoNginx(Exception):
    """None can be had here; says why."""


def binary() -> Path:
    """An nginx for a test that cannot do without."""
    try:
        return find()
    except NoNginx as error:
        refuse_or_skip(f"there is no nginx of the distribution: {error}")


@cache
def find() -> Path:
    """An nginx that runs: the installed one, or the distribution's package unpacked.

    Raises:
        NoNginx: there is none.
    """
    if _INSTALLED.exists():
        return _INSTALLED
    found = _FOLDER / "usr" / "sbin" / "nginx"
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of this run may be about to
        if not found.exists():
            _fetch()
    said = subprocess.run([found, "-V"], capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise NoNginx(said.stderr.strip())
    return found


def _fetch() -> None:
    try:
        if _download().returncode != 0 and os.getuid() == 0:  # a new machine has no package lists
            subprocess.run(["apt-get", "-q", "update"], capture_output=True, check=True)
            _download().check_returncode()
        package = max(_FOLDER.glob("nginx_*.deb"), key=lambda path: path.stat().st_mtime)
        unpacked = _FOLDER / "new"
        subprocess.run(["dpkg-deb", "-x", package, unpacked], capture_output=True, check=True)
        (unpacked / "usr").rename(_FOLDER / "usr")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise NoNginx(f"its package cannot be fetched: {error}") from error


def _download() -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["apt-get", "-q", "download", "nginx"], cwd=_FOLDER, capture_output=True, check=False)
