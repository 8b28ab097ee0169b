"""Many writers on one stream: nobody is refused, nobody takes the pool from others, nobody holds back the feed."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest
from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Power
from app.domain.tenants import ANY_TENANT
from app.errors import PreconditionFailed, StoreUnavailable
from app.service.sandboxes import Service, StaleVersion
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.append import append, append_statement
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from app.store.tables import sandboxes
from app.views.current import move, move_values
from tests.support.hold import held
from tests.support.sql import connected
from tests.support.stream import META, TENANT, about, requested, seen

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
WRITERS = 16
NAIVE_ATTEMPTS = 4


@pytest.fixture
async def services(dsn: str, service: Service) -> AsyncIterator[list[Service]]:
    """Four processes on one database."""
    databases = [Database(dsn, max_size=4) for _ in range(3)]
    yield [service, *(Service(database, Signal(database)) for database in databases)]
    for database in databases:
        await database.close()


async def running(service: Service) -> UUID:
    made = await service.create(uuid4(), TENANT, requested(timeout_s=3600), None, META)
    await service.execute(
        made.sandbox.id, ANY_TENANT, about(made.sandbox.id, cmd.RecordSeen(seen(Power.RUNNING))), META
    )
    return made.sandbox.id


async def optimistic(service: Service, sandbox_id: UUID, patch: dict[str, str | None]) -> bool:
    """The naive way: load, append, and give up after a few conflicts."""
    for _ in range(NAIVE_ATTEMPTS):
        loaded = await service.view.load(sandbox_id, ANY_TENANT)
        assert loaded is not None
        try:
            await service.record(loaded[0], cmd.PatchMetadata(patch), META)  # pyright: ignore[reportArgumentType]
        except StaleVersion:
            continue
        return True
    return False


async def test_sixteen_writers_of_one_sandbox_are_all_served_where_optimism_refuses_some(services: list[Service]):
    sandbox_id = await running(services[0])
    begin = (await services[0].history(sandbox_id, TENANT))[0].at

    async def write(number: int) -> None:
        by = services[number % len(services)]
        for round_ in range(4):
            await by.execute(sandbox_id, ANY_TENANT, cmd.PatchMetadata({f"k{number}": f"v{round_}"}), META)
            await by.execute(
                sandbox_id, ANY_TENANT, cmd.Renew(begin + timedelta(seconds=7200 + 16 * number + round_)), META
            )

    async with asyncio.timeout(120):
        await asyncio.gather(*(write(number) for number in range(WRITERS)))
    history = await services[0].history(sandbox_id, TENANT)
    assert [one.version for one in history] == list(range(1, len(history) + 1))
    assert Counter(type(one.event) for one in history)[ev.Renewed] == WRITERS * 4
    assert Counter(type(one.event) for one in history)[ev.MetadataPatched] == WRITERS * 4

    served = await asyncio.gather(
        *(
            optimistic(services[n % len(services)], sandbox_id, {f"k{n}": f"w{r}"})
            for n in range(WRITERS)
            for r in (1, 2)
        )
    )
    assert not all(served), "four optimistic attempts were enough: this test proves nothing"


async def test_if_match_is_refused_all_the_same(services: list[Service]):
    sandbox_id = await running(services[0])
    outcomes = await asyncio.gather(
        *(
            services[number % 4].execute(
                sandbox_id, ANY_TENANT, cmd.PatchMetadata({"n": str(number)}), META, if_match=5
            )
            for number in range(WRITERS)
        ),
        return_exceptions=True,
    )
    refused = [outcome for outcome in outcomes if isinstance(outcome, PreconditionFailed)]
    assert len(refused) == WRITERS - 1


async def test_writers_of_one_sandbox_leave_the_pool_to_others(dsn: str, service: Service, until: Until):
    """More writers than connections, all of one sandbox whose row somebody holds."""
    mine, other = await running(service), await running(service)
    async with held(dsn, mine) as hold, asyncio.TaskGroup() as tasks:
        for number in range(3 * WRITERS):
            tasks.create_task(service.execute(mine, ANY_TENANT, cmd.PatchMetadata({"n": str(number)}), META))
        await until(hold.keeps_waiting(1))
        assert (await service.execute(other, ANY_TENANT, cmd.Terminate(), META)).events
        await hold.let_go()


async def test_a_pause_under_the_lock_asks_the_pool_for_nothing(dsn: str, service: Service, until: Until):
    """A connection that waits for the pool while it holds a lock would wait for those who wait for the lock."""
    sandbox_id = await running(service)
    lone = Database(dsn, max_size=1, pool_timeout=1)
    pausing = Service(lone, Signal(lone))
    try:
        async with held(dsn, sandbox_id) as hold, asyncio.TaskGroup() as tasks:
            paused = tasks.create_task(pausing.execute(sandbox_id, ANY_TENANT, cmd.Pause(), META))
            await until(hold.keeps_waiting(1))
            pausing.engines.forget()
            await hold.write()
            await hold.let_go()
        assert paused.result().events == (ev.PauseRequested(),)
    finally:
        await lone.close()


async def test_a_backend_killed_while_it_holds_the_lock_leaves_nothing_and_lets_go(
    dsn: str, service: Service, until: Until
):
    sandbox_id = await running(service)
    other = Database(dsn)
    victim = Service(other, Signal(other))
    try:
        async with (
            connected(dsn, owner=True) as owner,
            connected(dsn, owner=True) as watcher,
            held(dsn, sandbox_id) as hold,
        ):
            # The second attempt finds the row free and waits for the deadline's row instead, head row locked.
            await owner.execute("BEGIN")
            await owner.execute("SELECT FROM deadlines WHERE stream_id = $1 FOR UPDATE", sandbox_id)
            losing = asyncio.create_task(victim.execute(sandbox_id, ANY_TENANT, cmd.Renew(await later(owner)), META))
            await until(hold.keeps_waiting(1))
            await hold.write()
            await hold.let_go()

            async def waits_in_transaction() -> bool:
                # Not by the owner: a transaction keeps the first view of pg_stat_activity that it reads.
                return bool(await watcher.fetchval(f"SELECT count(*) FROM ({HOLDERS}) AS holders"))

            await until(waits_in_transaction)
            killed = await watcher.fetch(f"SELECT pg_terminate_backend(pid) FROM ({HOLDERS}) AS holders")
            assert len(killed) == 1
            with pytest.raises(StoreUnavailable):
                await losing
            await owner.execute("ROLLBACK")
            assert (
                await service.execute(sandbox_id, ANY_TENANT, cmd.Renew(await later(owner)), META)
            ).sandbox.version == 7
    finally:
        await other.close()


HOLDERS = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
   AND xact_start < query_start AND pid <> pg_backend_pid()
"""
"""Transactions of several statements that wait in one of the later ones."""


async def later(connection: asyncpg.Connection) -> object:
    return await connection.fetchval("SELECT clock_timestamp() + interval '5 hours'")


# A9: the head row is locked before the position is announced


async def begin_append(database: Database, statement: Statement, service: Service, sandbox_id: UUID) -> object:
    loaded = await service.view.load(sandbox_id, ANY_TENANT)
    assert loaded is not None
    before = loaded[0]
    event = ev.MetadataPatched({"a": "b"})
    values = move_values(before, replace(before, metadata={"a": "b"}, version=before.version + 1))
    return await append(
        database, statement, sandbox_id, [ev.REGISTRY.encode(event)], after=before.version, meta=META, **values
    )


def announce_first(statement: Statement) -> Statement:
    """The order in which the answer used to be selected: from the inserted rows alone."""
    naive = Statement.__new__(Statement)
    naive.sql, found = re.subn(r"FROM guard LEFT OUTER JOIN written ON true", "FROM written", statement.sql)
    assert found == 1
    naive._names, naive._constants = statement._names, statement._constants
    return naive


@pytest.mark.parametrize("naive", [False, True], ids=["lock first", "announcement first"])
async def test_a_locked_head_row_does_not_hold_back_the_feed(
    dsn: str, database: Database, service: Service, until: Until, naive: bool
):
    mine, other = await running(service), await running(service)
    statement = append_statement("sandbox", sandboxes, move(frozenset({"metadata"})))
    log = EventLog(database)
    async with held(dsn, mine) as hold, asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(
            begin_append(database, announce_first(statement) if naive else statement, service, mine)
        )
        await until(hold.keeps_waiting(1))
        news = (await service.execute(other, ANY_TENANT, cmd.PatchMetadata({"c": "d"}), META)).position
        assert news is not None
        read = {event.position for event in (await log.read_after(news - 1))[0]}
        assert (news in read) is not naive
        await hold.let_go()
    assert waiting.result() is not None
    assert news in {event.position for event in (await log.read_after(news - 1))[0]}
