"""What the table `activity` says: bytes that moved, added by any number of processes, and never lost to an outage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import pairwise
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.errors import StoreUnavailable
from app.proxy.activity import Activity
from app.store.database.pool import Database
from tests.api.conftest import MakeContext
from tests.conftest import as_server
from tests.proxy.rig import Agent, Holding, Request, Rig, answer, calling, request, say, serving
from tests.proxy.test_states import PRINCIPALS
from tests.proxy.websockets import echo_back, echoes, handshake, opened

NEVER = 3600.0
"""Nothing is written unless a test does it."""


class Row:
    """What is stored of one sandbox."""

    def __init__(self, record: asyncpg.Record) -> None:
        self.tenant: str = record["tenant"]
        self.last_at: datetime = record["last_at"]
        self.counts = (record["requests"], record["bytes_in"], record["bytes_out"])


@pytest.fixture
async def owner(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    yield connection
    await connection.close()


async def rows(owner: asyncpg.Connection) -> dict[UUID, Row]:
    return {each["sandbox_id"]: Row(each) for each in await owner.fetch("SELECT * FROM sandledger.activity")}


async def now(owner: asyncpg.Connection) -> datetime:
    return await owner.fetchval("SELECT clock_timestamp()")


async def test_bytes_are_counted_in_both_directions(make_context: MakeContext, agent: Agent, owner: asyncpg.Connection):
    """Under the sandbox's own tenant, for what reached it only."""
    async with serving(make_context(authenticate=PRINCIPALS.get)) as rig:
        sandbox = await rig.running(agent, tenant="tenant-owner")
        agent.handlers["/proxy/3000/ws"] = echoes
        agent.handlers["/proxy/3000/a"] = _hundred
        path = f"/sandboxes/{sandbox}/proxy/3000/a"
        before = await now(owner)
        assert (await say(rig.port, request(path, key="owner"))).status == 200
        assert (await say(rig.port, request(path, key="stranger"))).status == 404
        assert (await say(rig.port, request(path, key="nobody"))).status == 401
        for framing, body in (
            ("Content-Length: 7", b"1234567"),
            ("Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n"),
        ):
            assert (await say(rig.port, request(path, framing, method="POST", key="owner") + body)).status == 200
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox, key="owner"))
            await echo_back(caller, b"x" * 5000)
        await rig.relay.activity.write()
        found = await rows(owner)
        assert found.keys() == {sandbox}
        assert found[sandbox].tenant == "tenant-owner"
        assert found[sandbox].counts == (4, 7 + 3 + 5000, 300 + 5000)
        assert before <= found[sandbox].last_at <= await now(owner)


async def _hundred(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"x" * 100))


async def test_an_open_silent_stream_is_no_activity(rig: Rig, agent: Agent, sandbox: UUID, owner: asyncpg.Connection):
    """Were every open stream active, a forgotten tab would keep its sandbox for ever. When bytes move again, it is."""
    agent.handlers["/proxy/3000/events"] = events = Holding(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n.")
    agent.handlers["/proxy/3000/ws"] = echoes
    write = rig.relay.activity.write
    async with calling(rig.port) as caller, calling(rig.port) as terminal:
        caller.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/events"))
        await caller.head()
        assert await caller.reader.readexactly(1) == b"."
        await opened(terminal, handshake(sandbox))
        await echo_back(terminal, b"ab")
        await write()
        first = (await rows(owner))[sandbox]
        await write()
        assert (await rows(owner))[sandbox].last_at == first.last_at
        await echo_back(terminal, b"c")
        await write()
        second = (await rows(owner))[sandbox]
        assert second.last_at > first.last_at
        events.rest = b"!"
        events.go.set()
        assert await caller.reader.readexactly(1) == b"!"
        await write()
        third = (await rows(owner))[sandbox]
    assert third.last_at > second.last_at
    assert (first.counts, third.counts) == ((2, 2, 3), (2, 3, 5))


async def test_processes_add_and_never_write_over_each_other(dsn: str, rig: Rig, owner: asyncpg.Connection):
    """At once, for the same sandboxes."""
    sandboxes = [await rig.pending() for _ in range(40)]
    databases = [Database(as_server(dsn)) for _ in range(4)]
    processes = [Activity(each, every=NEVER) for each in databases]
    try:
        for _ in range(10):
            for number, process in enumerate(processes):
                for sandbox in sandboxes[:: 1 if number % 2 else -1]:
                    process.asked(sandbox)
                    process.into(sandbox, 10)
                    process.out(sandbox, 3)
            await asyncio.gather(*(process.write() for process in processes))
    finally:
        for process, database in zip(processes, databases, strict=True):
            await process.close()
            await database.close()
    found = await rows(owner)
    assert {sandbox: found[sandbox].counts for sandbox in sandboxes} == dict.fromkeys(sandboxes, (40, 400, 120))


async def test_rows_are_locked_in_one_order(database: Database, rig: Rig, owner: asyncpg.Connection):
    """Otherwise two processes could wait for each other. The first row is locked, so the last one must stay free."""
    made = [await rig.pending() for _ in range(8)]
    last, first = next(
        (a, b) for a, b in pairwise(made) if a > b
    )  # neither their age nor the order of the marks counts
    activity = Activity(database, every=NEVER)
    for _ in range(2):
        activity.asked(last)
        activity.asked(first)
        if not await rows(owner):
            await activity.write()
    async with held_by(owner, first):
        writing = asyncio.create_task(activity.write())
        async with asyncio.timeout(30):
            while not await owner.fetch("SELECT FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.005)
        free = await owner.fetch("SELECT FROM sandledger.activity WHERE sandbox_id = $1 FOR UPDATE SKIP LOCKED", last)
        assert len(free) == 1
    await writing
    assert {row.counts[0] for row in (await rows(owner)).values()} == {2}
    await activity.close()


@asynccontextmanager
async def held_by(owner: asyncpg.Connection, sandbox: UUID) -> AsyncIterator[None]:
    """Lock its row."""
    async with owner.transaction():
        await owner.execute("SELECT FROM sandledger.activity WHERE sandbox_id = $1 FOR UPDATE", sandbox)
        yield


async def test_a_mark_that_is_late_moves_no_time_back(database: Database, rig: Rig, owner: asyncpg.Connection):
    late, early, sandbox = Activity(database, every=NEVER), Activity(database, every=NEVER), await rig.pending()
    late.into(sandbox, 1)
    await owner.execute("SELECT pg_sleep(0.01)")
    early.into(sandbox, 1)
    await early.write()
    at = (await rows(owner))[sandbox].last_at
    await late.write()
    assert (await rows(owner))[sandbox].last_at == at
    await asyncio.gather(late.close(), early.close())


async def test_marks_wait_for_a_database_that_is_away(database: Database, rig: Rig, owner: asyncpg.Connection):
    """With their own times, and of so many sandboxes at most. What was not there is not stored."""
    sandboxes = [await rig.pending() for _ in range(4)]
    activity = Activity(database, most=3, every=NEVER)
    await owner.execute("ALTER TABLE sandledger.activity RENAME TO elsewhere")
    for _ in range(2):
        activity.asked(uuid4() if not activity.waiting else sandboxes[0])
        for sandbox in sandboxes:
            activity.into(sandbox, 5)
        with pytest.raises(StoreUnavailable):
            await activity.write()
    assert activity.waiting == 3
    await owner.execute("SELECT pg_sleep(0.2)")
    back = await now(owner)
    await owner.execute("ALTER TABLE sandledger.elsewhere RENAME TO activity")
    await activity.write()
    found = await rows(owner)
    assert {sandbox: row.counts for sandbox, row in found.items()} == {
        sandboxes[0]: (1, 10, 0),
        sandboxes[1]: (0, 10, 0),
    }
    assert max(row.last_at for row in found.values()) < back
    assert activity.waiting == 0
    await activity.close()


async def test_a_stop_writes_what_is_left(make_context: MakeContext, agent: Agent, owner: asyncpg.Connection):
    async with serving(make_context(api_key=None)) as rig:
        sandbox = await rig.running(agent)
        assert (await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/a"))).status == 200
        assert await rows(owner) == {}
    assert (await rows(owner))[sandbox].counts[0] == 1


async def test_it_is_written_by_itself(database: Database, rig: Rig, owner: asyncpg.Connection):
    """And goes on after a write that failed."""
    sandbox = await rig.pending()
    await owner.execute("ALTER TABLE sandledger.activity RENAME TO elsewhere")
    activity = Activity(database, every=0.01)
    activity.asked(sandbox)
    await owner.execute("SELECT pg_sleep(0.05)")
    await owner.execute("ALTER TABLE sandledger.elsewhere RENAME TO activity")
    async with asyncio.timeout(30):
        while not await rows(owner):
            await asyncio.sleep(0.005)
    await activity.close()
