"""A primary with a streaming standby, both of the wheel's PostgreSQL, and an address that can be moved between them."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from app.store.database.migrate import migrate
from app.store.embedded.account import Account, account_for, programs_for
from app.store.embedded.server import EmbeddedPostgres
from tests.support.sql import connected

_STANDBY = """\
cluster_name = 'standby'
listen_addresses = ''
port = 5432
unix_socket_directories = '{sockets}'
hba_file = '{home}/pg_hba.conf'
shared_buffers = 32MB
huge_pages = off
io_method = sync
dynamic_shared_memory_type = mmap
max_connections = 100
max_worker_processes = 4
hot_standby = on
wal_receiver_status_interval = 1s
"""


class Pair:
    """Two servers."""

    def __init__(self, primary: EmbeddedPostgres, home: Path) -> None:
        self.primary = primary
        self._home = home
        self._account: Account = account_for(primary.data_dir)
        self._programs = programs_for(self._account)
        self._data, self._sockets = home / "data", home / "socket"
        self._address = home / "current"
        self.standby_dsn = _dsn(self._sockets)
        self.dsn = _dsn(self._address)
        """Of whichever server the address points to."""

    def run(self, program: str, *argv: str | Path) -> str:
        """A program of PostgreSQL, as its account."""
        code, said = self._account.run(self._programs / program, *argv)
        assert code == 0, said
        return said

    def start(self) -> None:
        """Copy the primary and follow it."""
        hba = self.primary.data_dir.parent / "pg_hba.conf"
        hba.write_text("local all all trust\nlocal replication all trust\n")
        primary = str(self.primary.socket_dir)
        self.run("psql", "-XAtqc", "SELECT pg_reload_conf()", "-h", primary, "-U", "postgres", "-d", "postgres")
        self._account.own(self._sockets)
        self.run("pg_basebackup", "-h", primary, "-U", "postgres", "-D", self._data, "-R", "-X", "stream", "-c", "fast")
        (self._home / "pg_hba.conf").write_text("local all all trust\n")
        configuration = self._home / "postgresql.conf"
        configuration.write_text(_STANDBY.format(sockets=self._sockets, home=self._home))
        for path in (self._home / "pg_hba.conf", configuration):
            path.chmod(0o644)
        options = f"-c config_file='{configuration}'"
        self.run("pg_ctl", "start", "-s", "-w", "-D", self._data, "-l", self._data / "log", "-o", options)
        self.point_to(self.primary.socket_dir)

    def point_to(self, sockets: Path) -> None:
        """Move the address."""
        aside = self._home / "next"
        aside.symlink_to(sockets)
        aside.replace(self._address)

    async def replayed(self) -> None:
        """Until the standby shows all that the primary has written."""
        async with (
            connected(self.primary.dsn, owner=True) as primary,
            connected(self.standby_dsn, owner=True) as standby,
        ):
            end = await primary.fetchval("SELECT pg_current_wal_insert_lsn()::text")
            await primary.fetchval("SELECT pg_switch_wal()::text")
            async with asyncio.timeout(60):
                while not await standby.fetchval("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", end):
                    await asyncio.sleep(0.02)

    async def cut_off(self) -> None:
        """From now on the standby falls behind."""
        async with connected(self.standby_dsn, owner=True) as standby:
            await standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
            await standby.fetchval("SELECT pg_reload_conf()")
            async with asyncio.timeout(60):
                while await standby.fetchval("SELECT count(*) FROM pg_stat_wal_receiver"):
                    await asyncio.sleep(0.02)

    async def fail_over(self) -> None:
        """The primary is gone; the standby becomes the primary, as far as it had come."""
        await asyncio.to_thread(self.primary.stop, only_if_last=False)
        await asyncio.to_thread(self.run, "pg_ctl", "promote", "-s", "-w", "-D", self._data)
        self.point_to(self._sockets)

    def stop(self) -> None:
        """Both."""
        self._account.run(self._programs / "pg_ctl", "stop", "-s", "-w", "-m", "immediate", "-D", self._data)
        self.primary.stop(only_if_last=False)


def _dsn(sockets: Path) -> str:
    return f"postgresql://postgres@/sandledger?host={quote(str(sockets))}"


@contextmanager
def pair() -> Generator[Pair]:
    """A migrated primary and its standby, in folders of their own."""
    home = Path(tempfile.mkdtemp(prefix="sandledger-pair-"))
    home.chmod(0o711)
    primary = EmbeddedPostgres.start(home / "primary")
    try:
        asyncio.run(migrate(primary.dsn))
        beside = home / "standby"
        account_for(primary.data_dir).own(beside)
        made = Pair(primary, beside)
        try:
            made.start()
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)
