"""The append's guards: who wins, who decides again, who is told, and that losing leaves no trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.tenants import ANY_TENANT
from app.errors import Conflict, Invalid, NotFound, PreconditionFailed, Rejected
from app.service.sandboxes import Outcome, Service, StaleVersion
from app.store.database.pool import Database
from app.store.log.append import Written, append, append_statement
from app.store.log.signal import Signal
from app.store.tables import sandboxes
from app.views.current import changed_json, move, move_values
from tests.support.hold import held
from tests.support.moves import PHASE_MOVES
from tests.support.sql import app_role, connected
from tests.support.stream import META as ACTOR
from tests.support.stream import TENANT, about, requested, seen

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
TRACES = """
SELECT (SELECT json_agg(s ORDER BY id)::text FROM sandboxes s), (SELECT count(*) FROM events),
       (SELECT json_agg(q ORDER BY stream_id)::text FROM reconcile_queue q),
       (SELECT json_agg(d ORDER BY stream_id, name)::text FROM deadlines d),
       (SELECT json_agg(k ORDER BY tenant, digest)::text FROM idempotency_keys k),
       (SELECT count(*) FROM sealed_values), (SELECT count(*) FROM refusals)
"""


async def traces(dsn: str) -> tuple[Any, ...]:
    """All that an append can write."""
    async with connected(dsn) as connection:
        return tuple(await connection.fetchrow(TRACES))


async def created(service: Service) -> UUID:
    return (await service.create(uuid4(), TENANT, requested(), None, ACTOR)).sandbox.id


async def running(service: Service) -> UUID:
    sandbox_id = await created(service)
    await service.execute(sandbox_id, ANY_TENANT, about(sandbox_id, cmd.RecordSeen(seen(Power.RUNNING))), ACTOR)
    return sandbox_id


# The statement itself: no row is a conflict


async def test_an_append_that_is_not_the_next_one_writes_nothing(dsn: str, service: Service, database: Database):
    loaded = await service.view.load(await created(service), ANY_TENANT)
    assert loaded is not None
    before = loaded[0]
    after = msgspec.structs.replace(before, version=3, metadata={"a": "b"})
    statement = append_statement("sandbox", sandboxes, move(changed_json(before, after)))
    event = ev.REGISTRY.encode(ev.MetadataPatched({"a": "b"}))

    async def attempt(after_version: int = 2, stream_id: UUID = before.id, **changed: Any) -> Written | None:
        values = move_values(before, after) | changed
        return await append(database, statement, stream_id, [event], after=after_version, meta=ACTOR, **values)

    untouched = await traces(dsn)
    assert await attempt(0, expected=0, version=1) is None, "stale"
    assert await attempt(1, expected=1, version=2) is None, "stale"
    assert await attempt(3, expected=3, version=4) is None, "ahead"
    assert await attempt(stream_id=uuid4()) is None, "no such stream"
    assert await traces(dsn) == untouched
    written = await attempt()
    assert written is not None
    assert await attempt() is None, "the same again"
    assert (await service.log.history(before.id, TENANT))[-1].position == written.position


async def test_a_deadline_beyond_the_calendar_is_refused_before_it_is_stored(dsn: str, service: Service):
    before = await traces(dsn)
    for timeout_s in (100_000_000_001, 251_600_000_000, 252_000_000_000, 2**62):
        with pytest.raises(Invalid):
            await service.create(uuid4(), TENANT, requested(timeout_s=timeout_s), None, ACTOR)
    assert await traces(dsn) == before


# Execute


async def test_what_never_was_or_is_anothers_is_not_found(service: Service):
    sandbox_id = await created(service)
    for unknown, tenant in ((uuid4(), ANY_TENANT), (uuid4(), TENANT), (sandbox_id, "other")):
        with pytest.raises(NotFound, match="does not exist"):
            await service.execute(unknown, tenant, cmd.Terminate(), ACTOR)
    assert await service.history(sandbox_id, "other") == []


@pytest.fixture
async def elsewhere(dsn: str) -> AsyncIterator[Service]:
    """The service of another process; within one process commands take turns."""
    database = Database(dsn)
    yield Service(database, Signal(database))
    await database.close()


async def test_who_loses_decides_again(dsn: str, service: Service, elsewhere: Service, until: Until):
    sandbox_id = await running(service)
    async with held(dsn, sandbox_id) as hold, asyncio.TaskGroup() as tasks:
        pausing = tasks.create_task(service.execute(sandbox_id, ANY_TENANT, cmd.Pause(), ACTOR))
        patching = tasks.create_task(elsewhere.execute(sandbox_id, ANY_TENANT, cmd.PatchMetadata({"a": "b"}), ACTOR))
        await until(hold.keeps_waiting(2))
        await hold.let_go()
    assert {pausing.result().sandbox.version, patching.result().sandbox.version} == {6, 7}
    loaded = await service.view.load(sandbox_id, ANY_TENANT)
    assert loaded is not None
    assert (loaded[0].phase, loaded[0].metadata) == (Phase.PAUSING, {"a": "b"})


async def test_who_loses_may_have_nothing_left_to_do(dsn: str, service: Service, elsewhere: Service, until: Until):
    sandbox_id = await running(service)

    async def terminate(by: Service) -> int | str:
        try:
            return len((await by.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), ACTOR)).events)
        except Rejected as refusal:
            return refusal.code

    async with held(dsn, sandbox_id) as hold, asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(terminate(by)) for by in (service, elsewhere)]
        await until(hold.keeps_waiting(2))
        await hold.let_go()
    assert {task.result() for task in both} == {1, "DOCKER::SANDBOX_NOT_FOUND"}


async def test_who_loses_to_a_stranger_writes_after_him(dsn: str, service: Service, until: Until):
    """A conflict costs a second attempt under the lock, never a refusal."""
    sandbox_id = await running(service)
    async with held(dsn, sandbox_id) as hold, asyncio.TaskGroup() as tasks:
        ending = tasks.create_task(service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), ACTOR))
        await until(hold.keeps_waiting(1))
        await hold.write()
        await hold.let_go()
    assert (ending.result().sandbox.phase, ending.result().sandbox.version) == (Phase.STOPPING, 7)


@pytest.mark.parametrize("who", ["If-Match", "record"])
async def test_who_wants_no_second_chance_gets_the_conflict(dsn: str, service: Service, until: Until, who: str):
    sandbox_id = await running(service)
    loaded = await service.view.load(sandbox_id, ANY_TENANT)
    assert loaded is not None

    async def attempt(known: Sandbox) -> Outcome:
        if who == "record":
            return await service.record(known, cmd.RecordRetry("observe", "E", "m", 1), ACTOR)
        return await service.execute(sandbox_id, ANY_TENANT, cmd.Pause(), ACTOR, if_match=known.version)

    error = StaleVersion if who == "record" else PreconditionFailed
    async with held(dsn, sandbox_id) as hold:
        losing = asyncio.create_task(attempt(loaded[0]))
        await until(hold.keeps_waiting(1))
        await hold.write()
        await hold.let_go()
        with pytest.raises(error):
            await losing
    before = await traces(dsn)
    with pytest.raises(error):
        await attempt(loaded[0])
    assert await traces(dsn) == before
    loaded = await service.view.load(sandbox_id, ANY_TENANT)
    assert loaded is not None
    assert (await attempt(loaded[0])).sandbox.version == 7


async def test_a_refusal_writes_nothing(dsn: str, service: Service):
    sandbox_id = await created(service)
    before = await traces(dsn)
    for command in (cmd.Pause(), cmd.Resume(), cmd.Expire(), cmd.PatchMetadata({}), cmd.RecordRemoved()):
        try:
            outcome = await service.execute(sandbox_id, ANY_TENANT, about(sandbox_id, command), ACTOR)
        except Conflict:
            continue
        assert (outcome.events, outcome.position) == ((), None)
    assert await traces(dsn) == before


async def test_a_kill_in_the_middle_of_an_append_leaves_nothing_of_it(dsn: str, service: Service, until: Until):
    sandbox_id = await running(service)
    before = await traces(dsn)
    async with held(dsn, sandbox_id) as hold, connected(dsn, owner=True) as owner:
        killed = asyncio.create_task(service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), ACTOR))
        await until(hold.keeps_waiting(1))
        await owner.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                            "WHERE datname = current_database() AND wait_event_type = 'Lock'")  # fmt: skip
        with pytest.raises(Exception, match="not reachable"):
            await killed
        await hold.let_go()
    assert await traces(dsn) == before
    assert (await service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), ACTOR)).sandbox.phase is Phase.STOPPING


# The database's own guards, behind the service's back


async def test_the_table_of_moves_is_the_declared_one(dsn: str):
    async with connected(dsn) as connection:
        rows = await connection.fetch("SELECT from_phase, to_phase FROM phase_transitions")
    assert {tuple(row) for row in rows} == {(before.value, after.value) for before, after in PHASE_MOVES}


async def test_the_database_refuses_every_other_move(dsn: str, service: Service):
    sandbox_id = await created(service)
    move = "UPDATE sandboxes SET version = version + 1, phase = $2 WHERE id = $1"
    async with connected(dsn, owner=True) as owner:
        for before in Phase:
            await owner.execute("BEGIN; ALTER TABLE sandboxes DISABLE TRIGGER check_phase")
            await owner.execute(move, sandbox_id, before.value)
            role = await app_role(owner)
            await owner.execute(f"ALTER TABLE sandboxes ENABLE TRIGGER check_phase; SET LOCAL ROLE {role}")
            allowed: set[Phase] = set()
            for after in Phase:
                await owner.execute("SAVEPOINT here")
                try:
                    await owner.execute(move, sandbox_id, after.value)
                    allowed.add(after)
                except asyncpg.CheckViolationError as error:
                    assert f"{before} cannot become {after}" in str(error)  # noqa: PT017 - either answer is right
                await owner.execute("ROLLBACK TO here")
            await owner.execute("ROLLBACK")
            assert allowed == {before} | {to for start, to in PHASE_MOVES if start is before}


@pytest.mark.parametrize("change", ["version = version", "version = version - 1", "metadata = '{}'"])
async def test_no_head_moves_without_its_version(dsn: str, service: Service, change: str):
    sandbox_id = await created(service)
    async with connected(dsn) as app:
        with pytest.raises(asyncpg.CheckViolationError, match="version must rise"):
            await app.execute(f"UPDATE sandboxes SET {change} WHERE id = $1", sandbox_id)


async def test_nobody_is_born_running(dsn: str, service: Service):
    sandbox_id = await created(service)
    async with connected(dsn) as app:
        with pytest.raises(asyncpg.CheckViolationError, match="born_pending"):
            await app.execute(
                "INSERT INTO sandboxes SELECT (jsonb_populate_record(s, "
                "jsonb_build_object('id', gen_random_uuid(), 'object_id', NULL, 'phase', 'Running'))).* "
                "FROM sandboxes s WHERE id = $1",
                sandbox_id,
            )
