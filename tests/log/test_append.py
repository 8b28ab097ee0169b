"""The append's guards: who wins, who decides again, who is told, and that losing leaves no trace."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Phase
from app.domain.sandbox.transitions import PHASE_MOVES
from app.errors import Conflict, Invalid, KeyReused, NotFound, PreconditionFailed, Rejected
from app.service.sandboxes import Service, StaleVersion
from app.store.database.pool import Database
from app.store.log.append import append_statement
from app.store.vault.seal import Sealer, Secrets
from app.views.current import head_update, update_values
from tests.support.hold import held
from tests.support.sql import app_role, connected
from tests.support.stream import META as ACTOR
from tests.support.stream import requested, seen

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
TRACES = """
SELECT (SELECT json_agg(s ORDER BY id)::text FROM sandboxes s), (SELECT count(*) FROM events),
       (SELECT json_agg(q ORDER BY sandbox_id)::text FROM reconcile_queue q),
       (SELECT json_agg(e ORDER BY sandbox_id)::text FROM expiry_jobs e),
       (SELECT count(*) FROM sandbox_secrets), (SELECT count(*) FROM refusals)
"""


async def traces(dsn: str) -> tuple[Any, ...]:
    """All that an append can write."""
    async with connected(dsn) as connection:
        return tuple(await connection.fetchrow(TRACES))


async def created(service: Service) -> UUID:
    return (await service.create(uuid4(), requested(), None, ACTOR)).sandbox.id


async def running(service: Service) -> UUID:
    sandbox_id = await created(service)
    await service.execute(sandbox_id, cmd.RecordSeen(seen(Power.RUNNING)), ACTOR)
    return sandbox_id


# The statement itself: no row is a conflict


async def test_an_append_that_is_not_the_next_one_writes_nothing(dsn: str, service: Service, database: Database):
    loaded = await service.view.load(await created(service))
    assert loaded is not None
    box = loaded[0]
    after = msgspec.structs.replace(box, version=2)
    statement = append_statement(head_update, [])
    facts = msgspec.json.encode([{"v": 2, "t": "sandbox.metadata_patched", "s": 1, "d": {}}]).decode()
    meta = msgspec.json.encode(ACTOR).decode()

    async def append(**changed: Any) -> Any:
        return await database.fetch_one(statement, facts=facts, meta=meta, **(update_values(box, after) | changed))

    before = await traces(dsn)
    assert await append(expected=0, version=1) is None, "stale"
    assert await append(expected=2, version=3) is None, "ahead"
    assert await append(id=uuid4()) is None, "no such stream"
    assert await traces(dsn) == before
    row = await append()
    assert row is not None
    assert await append() is None, "the same again"
    assert (await service.log.history(box.id, "default"))[-1].position == row["position"]


# Create


async def test_a_second_create_of_one_key_is_answered_as_the_first(dsn: str, service: Service):
    key = uuid4()
    first = await service.create(key, requested(), None, ACTOR)
    await service.execute(key, cmd.Terminate(), ACTOR)
    before = await traces(dsn)
    again = await service.create(key, requested(), None, ACTOR)
    assert (again.sandbox, again.replayed, again.position) == (first.sandbox, True, None)
    for other in ({"fingerprint": "0" * 64}, {"tenant": "other"}):
        with pytest.raises(KeyReused):
            await service.create(key, msgspec.structs.replace(requested(), **other), None, ACTOR)
    assert await traces(dsn) == before


async def test_two_hundred_creates_of_one_key_are_one_sandbox(dsn: str, service: Service, sealer: Sealer):
    key = uuid4()
    sealed = sealer.seal(key, Secrets(env={"A": "b"}))
    outcomes = await asyncio.gather(*(service.create(key, requested(), sealed, ACTOR) for _ in range(200)))
    assert sum(not outcome.replayed for outcome in outcomes) == 1
    assert {(outcome.sandbox.id, outcome.sandbox.version) for outcome in outcomes} == {(key, 1)}
    assert len({outcome.sandbox.created_at for outcome in outcomes}) == 1
    async with connected(dsn) as connection:
        for table in ("sandboxes", "events", "reconcile_queue", "expiry_jobs", "sandbox_secrets"):
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 1, table
        assert await connection.fetchval("SELECT generation FROM reconcile_queue") == 1


async def test_a_deadline_beyond_the_calendar_is_refused_before_it_is_stored(dsn: str, service: Service):
    before = await traces(dsn)
    for timeout_s in (100_000_000_001, 251_600_000_000, 252_000_000_000, 2**62):
        with pytest.raises(Invalid):
            await service.create(uuid4(), requested(timeout_s=timeout_s), None, ACTOR)
    assert await traces(dsn) == before


# Execute


async def test_what_never_was_or_is_anothers_is_not_found(service: Service):
    sandbox_id = await created(service)
    for unknown, tenant in ((uuid4(), None), (sandbox_id, "other")):
        with pytest.raises(NotFound, match="does not exist"):
            await service.execute(unknown, cmd.Terminate(), ACTOR, tenant=tenant)
    assert await service.history(sandbox_id, "other") == []


async def test_who_loses_decides_again(dsn: str, service: Service, until: Until):
    sandbox_id = await running(service)
    async with held(dsn, sandbox_id) as hold, asyncio.TaskGroup() as tasks:
        pausing = tasks.create_task(service.execute(sandbox_id, cmd.Pause(), ACTOR))
        patching = tasks.create_task(service.execute(sandbox_id, cmd.PatchMetadata({"a": "b"}), ACTOR))
        await until(hold.keeps_waiting(2))
        await hold.let_go()
    assert {pausing.result().sandbox.version, patching.result().sandbox.version} == {4, 5}
    loaded = await service.view.load(sandbox_id)
    assert loaded is not None
    assert (loaded[0].phase, loaded[0].metadata) == (Phase.PAUSING, {"a": "b"})


async def test_who_loses_may_have_nothing_left_to_do(dsn: str, service: Service, until: Until):
    sandbox_id = await running(service)

    async def terminate() -> int | str:
        try:
            return len((await service.execute(sandbox_id, cmd.Terminate(), ACTOR)).events)
        except Rejected as refusal:
            return refusal.code

    async with held(dsn, sandbox_id) as hold, asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(terminate()) for _ in range(2)]
        await until(hold.keeps_waiting(2))
        await hold.let_go()
    assert {task.result() for task in both} == {1, "DOCKER::SANDBOX_NOT_FOUND"}


async def test_after_three_more_tries_it_is_a_conflict_and_nothing_is_written(dsn: str, service: Service):
    sandbox_id = await running(service)
    async with connected(dsn, owner=True) as owner:
        # Somebody else is always first: PostgreSQL itself passes over the row, a counted number of times.
        await owner.execute(
            "CREATE SEQUENCE losses; GRANT USAGE ON losses TO PUBLIC;"
            "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "IF nextval('sandledger.losses') <= 4 THEN RETURN NULL; END IF; RETURN NEW; END $$;"
            "CREATE TRIGGER a_loss BEFORE UPDATE ON sandboxes FOR EACH ROW EXECUTE FUNCTION lose()"
        )
        before = await traces(dsn)
        with pytest.raises(Conflict, match="too many callers"):
            await service.execute(sandbox_id, cmd.Terminate(), ACTOR)
        assert await traces(dsn) == before
        assert await owner.fetchval("SELECT last_value FROM losses") == 4
        await owner.execute("ALTER SEQUENCE losses RESTART WITH 2")
        outcome = await service.execute(sandbox_id, cmd.Terminate(), ACTOR)
        assert outcome.sandbox.phase is Phase.STOPPING
        assert await owner.fetchval("SELECT last_value FROM losses") == 5


@pytest.mark.parametrize(
    ("guard", "error"),
    [({"if_match": 3}, PreconditionFailed), ({"at_version": 3}, StaleVersion)],
    ids=["If-Match", "at_version"],
)
async def test_who_wants_no_second_chance_gets_the_conflict(
    dsn: str, service: Service, until: Until, guard: dict[str, int], error: type[Exception]
):
    sandbox_id = await running(service)
    async with held(dsn, sandbox_id) as hold:
        losing = asyncio.create_task(service.execute(sandbox_id, cmd.Pause(), ACTOR, **guard))
        await until(hold.keeps_waiting(1))
        await hold.write()
        await hold.let_go()
        with pytest.raises(error):
            await losing
    before = await traces(dsn)
    with pytest.raises(error):
        await service.execute(sandbox_id, cmd.Pause(), ACTOR, **guard)
    assert await traces(dsn) == before
    now = dict.fromkeys(guard, 4)
    assert (await service.execute(sandbox_id, cmd.Pause(), ACTOR, **now)).sandbox.version == 5


async def test_a_refusal_writes_nothing(dsn: str, service: Service):
    sandbox_id = await created(service)
    before = await traces(dsn)
    for command in (cmd.Pause(), cmd.Resume(), cmd.Expire(), cmd.PatchMetadata({}), cmd.RecordRemoved()):
        try:
            outcome = await service.execute(sandbox_id, command, ACTOR)
        except Conflict:
            continue
        assert (outcome.events, outcome.position) == ((), None)
    assert await traces(dsn) == before


async def test_a_kill_in_the_middle_of_an_append_leaves_nothing_of_it(dsn: str, service: Service, until: Until):
    sandbox_id = await running(service)
    before = await traces(dsn)
    async with held(dsn, sandbox_id) as hold, connected(dsn, owner=True) as owner:
        killed = asyncio.create_task(service.execute(sandbox_id, cmd.Terminate(), ACTOR))
        await until(hold.keeps_waiting(1))
        await owner.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                            "WHERE datname = current_database() AND wait_event_type = 'Lock'")  # fmt: skip
        with pytest.raises(Exception, match="not reachable"):
            await killed
        await hold.let_go()
    assert await traces(dsn) == before
    assert (await service.execute(sandbox_id, cmd.Terminate(), ACTOR)).sandbox.phase is Phase.STOPPING


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
                "jsonb_build_object('id', gen_random_uuid(), 'phase', 'Running'))).* FROM sandboxes s WHERE id = $1",
                sandbox_id,
            )
