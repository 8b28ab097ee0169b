"""A PostgreSQL server of a test's own, reachable over TCP: for TLS, standbys, shutdowns and other major versions."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from app.store.embedded.account import Account, account_for, programs_for


def free_port() -> int:
    """One that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TcpServer:
    """One cluster. `programs` are another version's."""

    def __init__(self, home: Path, programs: Path | None = None) -> None:
        self.home = home
        self.account: Account = account_for(home / "data")
        self.programs = programs or programs_for(self.account)
        self.port = free_port()
        self.data = home / "data"
        self.account.own(home / "socket")
        self.account.own(home / "log")

    def run(self, program: str, *argv: str | Path) -> str:
        code, said = self.account.run(self.programs / program, *argv)
        assert code == 0, said
        return said

    def create(self, *hba: str) -> None:
        self.run("initdb", "-D", self.account.own(self.data), "-U", "postgres", "-A", "trust", "--no-sync")
        if hba:
            self.write("pg_hba.conf", "\n".join(("local all all trust", "local replication all trust", *hba, "")))

    def copy(self, primary: TcpServer) -> None:
        """Become a standby of another."""
        where = f"host={primary.home / 'socket'} port={primary.port} user=postgres"
        self.run("pg_basebackup", "-D", self.account.own(self.data), "-d", where, "-R", "-X", "stream", "--no-sync")

    def write(self, name: str, text: str | bytes) -> Path:
        """A file in the data folder, readable by the server only."""
        path = self.data / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        path.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(path, self.account.uid, self.account.gid)
        return path

    def start(self, *, wait: bool = True, locales: Path | None = None, **settings: str) -> None:
        """`locales` is a folder of compiled ones, beside the machine's."""
        values = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": str(self.home / "socket"),
            "fsync": "off",
            "shared_buffers": "16MB",
            **settings,
        }
        options = " ".join(f"-c {name}='{value}'" for name, value in values.items())
        flags = ("-w",) if wait else ("-W",)
        argv = (self.programs / "pg_ctl", "start", "-s", *flags, "-D", self.data, "-l", self.home / "log" / "pg.log")
        within = () if locales is None else ("/usr/bin/env", f"LOCPATH={locales}")
        starter = self.account.spawn(*within, *argv, "-o", options, output=subprocess.DEVNULL)
        assert starter.wait(timeout=60) == 0, (self.home / "log" / "pg.log").read_text()

    @property
    def pid(self) -> int | None:
        """Of the postmaster, None when it has ended."""
        try:
            return int((self.data / "postmaster.pid").read_text().split("\n")[0])
        except FileNotFoundError:
            return None

    def stop(self, sign: int = signal.SIGQUIT) -> None:
        """End it and wait."""
        pid = self.pid
        if pid is None:
            return
        os.kill(pid, sign)
        deadline = time.monotonic() + 30
        while self.pid is not None:
            assert time.monotonic() < deadline, "it does not end"
            time.sleep(0.02)

    def dsn(self, database: str = "postgres", user: str = "postgres", **keys: str) -> str:
        query = f"?{urlencode(keys)}" if keys else ""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}{query}"


@contextmanager
def tcp_server(programs: Path | None = None) -> Iterator[TcpServer]:
    """Not yet created; killed and removed at the end."""
    home = Path(tempfile.mkdtemp(prefix="sandledger-tcp-"))
    home.chmod(0o711)
    server = TcpServer(home, programs)
    try:
        yield server
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
