"""PostgreSQL that is not there yet, and PostgreSQL that wants to go."""

from __future__ import annotations

import asyncio
import os
import signal as signals
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import literal, select

from app.errors import SettingsError, StoreRefused, StoreUnavailable
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.database.waiting import wait_until_there
from app.store.log.signal import Signal
from tests.conftest import ROOT
from tests.support.cluster import TcpServer, free_port, tcp_server

ONE = Statement(select(literal(1)))
Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


@pytest.fixture
def server() -> Iterator[TcpServer]:
    with tcp_server() as made:
        made.create("host all locked 127.0.0.1/32 scram-sha-256", "host all all 127.0.0.1/32 trust")
        yield made


class Said(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)

    async def any(self) -> bool:
        return bool(self)


async def test_a_database_that_comes_later_is_waited_for(server: TcpServer, until: Until):
    said = Said()
    waiting = asyncio.create_task(wait_until_there(server.dsn(), "PostgreSQL at x", 60, said, limit=5))
    await until(said.any)
    assert said[0].startswith("waiting up to 60 s for PostgreSQL at x: ")
    await asyncio.to_thread(server.start)
    await waiting


async def test_a_database_that_is_starting_up_is_waited_for(server: TcpServer, until: Until):
    """A standby that takes no readers answers as a server in recovery does, for as long as the test wants."""
    with tcp_server() as standby:
        server.start()
        standby.copy(server)
        standby.start(wait=False, hot_standby="off")
        said = Said()
        waiting = asyncio.create_task(wait_until_there(standby.dsn(), "it", 60, said, limit=5))

        async def told() -> bool:
            return any("starting up" in line or "not accepting connections" in line for line in said)

        await until(told)
        assert not waiting.done()
        standby.stop()
        await asyncio.to_thread(standby.start)
        await waiting


async def test_what_time_does_not_change_is_not_waited_for(server: TcpServer):
    server.start()
    for dsn, match in (
        (server.dsn(user="locked").replace("locked@", "locked:wrong@"), "password"),
        (server.dsn("nowhere"), "does not exist"),
        (server.dsn(user="nobody"), "does not exist"),
    ):
        with pytest.raises(StoreRefused, match=match):
            await wait_until_there(dsn, "it", 1e6, Said(), limit=5)
    with pytest.raises(SettingsError):
        await wait_until_there("postgresql://h/d?nonsense=1", "it", 1e6, Said(), limit=5)


async def test_a_wait_ends(server: TcpServer):
    with pytest.raises(StoreUnavailable, match=r"waited 0\.3 s for it: .*start_wait_seconds"):
        await wait_until_there(server.dsn(), "it", 0.3, Said(), limit=5)


def test_a_server_that_waited_in_vain_exits_in_one_line(tmp_path: Path):
    config = tmp_path / "c.toml"
    config.write_text(f'[server]\nport = 0\n[sandledger]\nstart_wait_seconds = 0.2\nstate_dir = "{tmp_path}/s"\n')
    done = subprocess.run(
        [sys.executable, "-m", "app", "serve", "--config", str(config)],
        env={**os.environ, "DATABASE_URL": f"postgresql://u:hunter2@127.0.0.1:{free_port()}/d"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("waiting up to 0 s for PostgreSQL at postgresql://u:***@127.0.0.1")
    assert lines[1].startswith("error: waited 0.2 s for PostgreSQL at")
    assert len(lines) == 2, lines
    assert "hunter2" not in done.stderr


async def test_a_smart_shutdown_ends_while_the_pools_are_idle_and_listen(server: TcpServer, until: Until):
    """PostgreSQL waits for every open connection, and tells none of them."""
    server.start()
    await migrate(server.dsn())
    database = Database(server.dsn(), knock_every=0.2)
    news = Signal(database)
    listening = asyncio.create_task(news.run())
    await asyncio.gather(*(database.fetch(ONE) for _ in range(10)), *(database.reserved.fetch(ONE) for _ in range(2)))
    pid = server.pid
    assert pid is not None
    os.kill(pid, signals.SIGTERM)

    async def ended() -> bool:
        return server.pid is None

    await until(ended)
    await asyncio.to_thread(server.start)

    async def back() -> bool:
        try:
            return len(await database.fetch(ONE)) == 1
        except StoreUnavailable:
            return False

    await until(back)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await database.close()


async def test_a_statement_under_way_ends_before_a_smart_shutdown_does(server: TcpServer, until: Until):
    server.start()
    await migrate(server.dsn())
    database = Database(server.dsn(), knock_every=0.1)
    async with database.connection() as connection:
        await connection.fetch(ONE)
        assert server.pid is not None
        os.kill(server.pid, signals.SIGTERM)

        async def refused() -> bool:
            try:
                await wait_until_there(server.dsn(), "it", 0, Said(), limit=5)
            except StoreUnavailable as error:
                return "shutting down" in str(error)
            return False

        await until(refused)
        assert len(await connection.fetch(ONE)) == 1
        assert server.pid is not None

    async def ended() -> bool:
        return server.pid is None

    await until(ended)
    await database.close()
