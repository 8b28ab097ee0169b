"""A database that neither answers nor hangs up, as after a failover that nobody told the old connections about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import func, select

from app.domain.sandbox.state import Phase
from app.errors import StoreUnavailable
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.signal import Signal
from app.store.queue.reconcile import Queue
from app.work.reconcile.leases import Leases
from app.work.watchdog import Watchdog
from tests.support.sql import connected
from tests.work.stage import QUICK, Stage

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
BACKEND = Statement(select(func.pg_backend_pid()))
COMMITS = Statement(select(func.current_setting("synchronous_commit")))


class Line:
    """Forwards connections, and can lose everything said on those that are open."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._open: list[asyncio.Event] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut = False
        self._server: asyncio.Server | None = None

    async def up(self) -> int:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    def silence(self, *, everything: bool = False) -> None:
        """What is open stays open and says nothing any more; who connects from now on is served, or not either."""
        self._cut = everything
        for deaf in self._open:
            deaf.set()

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        deaf = asyncio.Event()
        self._open.append(deaf)
        if self._cut:
            deaf.set()
        there, back = await asyncio.open_unix_connection(str(self._socket))
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, sink, deaf))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, deaf: asyncio.Event) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if not deaf.is_set():
                    sink.write(data)
                    await sink.drain()
        sink.close()


@pytest.fixture
async def line(postgres: EmbeddedPostgres) -> AsyncIterator[Line]:
    made = Line(postgres.socket_dir / ".s.PGSQL.5432")
    yield made
    await made.close()


async def over(line: Line, dsn: str, command_timeout: float) -> Database:
    name = dsn.partition("?")[0].rpartition("/")[2]
    return Database(
        f"postgresql://postgres@127.0.0.1:{await line.up()}/{name}", pool_timeout=2, command_timeout=command_timeout
    )


async def test_connections_that_fell_silent_cost_a_while_and_no_more(line: Line, dsn: str) -> None:
    """Without a limit each of them keeps a caller, and all of them the whole pool, until TCP gives up."""
    database = await over(line, dsn, 0.3)
    await asyncio.gather(*(database.fetch(BACKEND) for _ in range(10)))
    line.silence()

    async def served() -> None:
        while True:
            with suppress(StoreUnavailable):
                await database.fetch(BACKEND)
                return

    async with asyncio.timeout(30):
        await asyncio.gather(*(served() for _ in range(20)))
    await database.close()


async def test_a_listener_that_fell_silent_is_replaced(line: Line, dsn: str, signal: Signal) -> None:
    """Without a question now and then, this process would hear nothing any more and only poll."""
    database = await over(line, dsn, 0.3)
    deaf = Signal(database, check=0.2)
    hearing = asyncio.create_task(deaf.run())
    told = uuid4()
    with deaf.subscribe(told) as news:
        for silence in (False, True):
            if silence:
                line.silence()
            async with asyncio.timeout(30):
                while not await news.wait(0.1):
                    signal.poke(told)
    hearing.cancel()
    await asyncio.gather(hearing, return_exceptions=True)
    await database.close()


async def test_a_lease_ends_for_its_holder_even_if_the_database_says_nothing(
    line: Line, dsn: str, stage: Stage, until: Until
) -> None:
    """The heartbeat waits for an answer; others take the row meanwhile."""
    database = await over(line, dsn, 600)
    policy = msgspec.structs.replace(QUICK, lease=0.6)
    leases = Leases(Queue(database, stage.engine_name), policy, Watchdog(60))
    sandbox_id = await stage.create()
    (claim,) = (await Queue(stage.database, stage.engine_name).claim(1, lease=600, tenant_slots=1)).claims
    held = leases.hold(claim, asyncio.get_running_loop().time())
    beating = asyncio.create_task(leases.run())

    async def extended() -> bool:
        return (await stage.row(sandbox_id))["lease_until"] < claim_end

    (row,) = await stage.sql("SELECT clock_timestamp() + interval '60 s' AS soon")
    claim_end = row["soon"]
    await until(extended)  # by a heartbeat, to 0.6 s from now
    line.silence(everything=True)

    async def given_up() -> bool:
        return held.lost

    await until(given_up)
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    assert await stage.phase(sandbox_id) is Phase.PENDING
    database.terminate()  # a goodbye would wait for an answer


async def test_what_was_answered_is_on_disk_whatever_the_default_is(dsn: str) -> None:
    name = dsn.partition("?")[0].rpartition("/")[2]
    async with connected(dsn, owner=True) as owner:
        await owner.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    database = Database(dsn)
    assert [tuple(row) for row in await database.fetch(COMMITS)] == [("on",)]
    await database.close()
