"""A claim that ends in the statement that records the goal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest
from msgspec import Struct

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase, Sandbox
from app.errors import StoreUnavailable, UnknownEvent
from app.runtime.driver import Image, Limits, Workload
from app.service.sandboxes import Completion, Outcome, StaleVersion
from app.store.queue.reconcile import Claim, Queue
from app.work.reconcile.heads import Heads
from app.work.reconcile.workloads import ref_of
from app.work.worker import Worker
from tests.work.stage import CLIENT, Stage

NOTE_DELETES = (
    "CREATE TABLE deleted (transaction text, at timestamptz)",
    """CREATE FUNCTION note_delete() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO deleted VALUES (pg_current_xact_id()::text, clock_timestamp());
    RETURN NULL;
END $$""",
    "CREATE TRIGGER note_delete AFTER DELETE ON reconcile_queue FOR EACH ROW EXECUTE FUNCTION note_delete()",
)
"""Says which transactions delete rows of the queue."""


class Begun(Struct):
    """A sandbox that runs on the engine, and the claim of the worker that is about to say so."""

    stage: Stage
    queue: Queue
    sandbox: Sandbox
    claim: Claim
    seen: cmd.RecordSeen

    async def record(self, *, reached: bool = True, **changes: Any) -> Outcome:
        completion = Completion(self.claim.owner, self.claim.revision, lambda _: reached)
        return await self.stage.service.record(
            self.sandbox, self.seen, CLIENT, msgspec.structs.replace(completion, **changes)
        )

    async def is_held(self) -> bool:
        row = await self.stage.row(self.sandbox.id)
        return row is not None and row["lease_owner"] == self.claim.owner


@pytest.fixture
async def begun(stage: Stage) -> Begun:
    queue = Queue(stage.database, "default")
    sandbox = await stage.sandbox(await stage.create())
    claim = (await queue.claim(1, lease=30, tenant_slots=10)).claims[0]
    work = Workload(
        ref=ref_of(sandbox),
        tenant=sandbox.tenant,
        image=Image(sandbox.spec.image),
        entrypoint=sandbox.spec.entrypoint,
        env={},
        limits=Limits(),
        generation=1,
        position=sandbox.position,
    )
    seen = await stage.driver().ensure(work)
    return Begun(stage, queue, sandbox, claim, cmd.RecordSeen(seen, "ensure"))


async def test_the_row_goes_with_the_events(begun: Begun):
    outcome = await begun.record()
    assert outcome.completed
    assert outcome.sandbox.phase is Phase.RUNNING
    assert await begun.stage.row(begun.sandbox.id) is None


async def test_the_row_stays_when_something_is_left_to_do(begun: Begun):
    outcome = await begun.record(reached=False)
    assert (outcome.completed, outcome.sandbox.phase) == (False, Phase.RUNNING)
    assert await begun.is_held()


async def test_another_holders_row_stays(begun: Begun):
    outcome = await begun.record(owner=uuid4())
    assert (outcome.completed, outcome.sandbox.phase) == (False, Phase.RUNNING)
    assert await begun.is_held()


async def test_a_wish_that_came_first_is_kept(begun: Begun):
    await begun.stage.ask(begun.sandbox.id, cmd.Terminate())
    with pytest.raises(StaleVersion):
        await begun.record()
    assert await begun.is_held()


async def test_a_hint_that_came_first_is_kept(begun: Begun):
    await begun.queue.enqueue([begun.sandbox.id])
    outcome = await begun.record()
    assert (outcome.completed, outcome.sandbox.phase) == (False, Phase.RUNNING)
    assert await begun.is_held()


async def during_a_hint(begun: Begun, act: Callable[[], Any]) -> Any:
    """Act while a hint is under way: it has changed the row and is not committed yet."""
    hinting = await asyncpg.connect(begun.stage.dsn)
    try:
        transaction = hinting.transaction()
        await transaction.start()
        await hinting.execute("UPDATE reconcile_queue SET revision = revision + 1")
        acting = asyncio.create_task(act())
        await begun.stage.blocked()
        await transaction.commit()
        return await acting
    finally:
        await hinting.close()


async def test_a_hint_that_commits_meanwhile_is_kept(begun: Begun):
    outcome = await during_a_hint(begun, begun.record)
    assert (outcome.completed, outcome.sandbox.phase) == (False, Phase.RUNNING)
    assert await begun.is_held()


async def test_without_the_comparison_that_hint_would_be_lost(begun: Begun):
    """The naive way, to show that the test above has something to find."""

    async def naive() -> None:
        await begun.stage.sql("DELETE FROM reconcile_queue WHERE lease_owner = $1", begun.claim.owner)

    await during_a_hint(begun, naive)
    assert await begun.stage.row(begun.sandbox.id) is None


async def test_a_hint_of_our_own_removal_does_not_keep_the_row(begun: Begun):
    """The engine tells of each removal, and nothing can be left to do for a stream that has closed."""
    await begun.record()
    await begun.stage.ask(begun.sandbox.id, cmd.Terminate())
    claim = (await begun.queue.claim(1, lease=30, tenant_slots=10)).claims[0]
    await begun.queue.enqueue([begun.sandbox.id])
    sandbox = await begun.stage.sandbox(begun.sandbox.id)
    completion = Completion(claim.owner, claim.revision, lambda _: True)
    outcome = await begun.stage.service.record(sandbox, cmd.RecordRemoved(), CLIENT, completion)
    assert outcome.completed
    assert await begun.stage.row(sandbox.id) is None


async def test_both_claims_of_a_life_end_so(stage: Stage):
    for statement in NOTE_DELETES:
        await stage.sql(statement)
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    written = await stage.sql(
        "SELECT xmin::text FROM events WHERE type IN ('sandbox.ready', 'sandbox.terminated') ORDER BY position"
    )
    deleted = await stage.sql("SELECT transaction FROM deleted ORDER BY at")
    assert [one[0] for one in deleted] == [one[0] for one in written]
    assert len(deleted) == 2


async def test_loads_at_the_same_time_are_one_statement(stage: Stage):
    heads = Heads(stage.service.view)
    ids = [await stage.create() for _ in range(5)]
    async with stage.locked("sandboxes"):
        loads = [asyncio.create_task(heads.load(sandbox_id)) for sandbox_id in [*ids, ids[0], uuid4()]]
        await stage.blocked()
        assert len(await waiting(stage)) == 1
    *found, again, absent = await asyncio.gather(*loads)
    assert [one and one[0].id for one in found] == ids
    assert again == found[0]
    assert absent is None


async def test_alone_each_load_is_a_statement(stage: Stage):
    """To show that the test above has something to find."""
    ids = [await stage.create() for _ in range(5)]
    async with stage.locked("sandboxes"):
        loads = [asyncio.create_task(stage.sandbox(sandbox_id)) for sandbox_id in ids]
        async with asyncio.timeout(30):
            while len(await waiting(stage)) < len(ids):
                await asyncio.sleep(0.01)
    await asyncio.gather(*loads)


async def test_a_load_that_comes_later_reads_later(stage: Stage):
    """It must not share the answer of a statement that began before it."""
    heads = Heads(stage.service.view)
    sandbox_id = await stage.create()
    before = await heads.load(sandbox_id)
    await stage.ask(sandbox_id, cmd.PatchMetadata({"a": "b"}))
    after = await heads.load(sandbox_id)
    assert before is not None
    assert after is not None
    assert (before[0].version, after[0].version) == (2, 3)


async def test_a_load_that_is_cancelled_leaves_the_others(stage: Stage):
    heads = Heads(stage.service.view)
    one, other = await stage.create(), await stage.create()
    async with stage.locked("sandboxes"):
        gone, stays = asyncio.create_task(heads.load(one)), asyncio.create_task(heads.load(other))
        await stage.blocked()
        gone.cancel()
        await asyncio.wait([gone])
    found = await stays
    assert found is not None
    assert found[0].id == other


async def test_a_database_that_goes_away_is_told_to_all(stage: Stage):
    heads = Heads(stage.service.view)
    ids = [await stage.create() for _ in range(3)]
    async with stage.locked("sandboxes"):
        loads = [asyncio.create_task(heads.load(sandbox_id)) for sandbox_id in ids]
        await stage.blocked()
        await stage.cut_connections()
        told = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(one) for one in told] == [StoreUnavailable] * 3


async def test_a_stream_of_a_newer_version_does_not_keep_the_others(stage: Stage):
    heads = Heads(stage.service.view)
    newer, known = await stage.create(), await stage.create()
    await stage.sql("ALTER TABLE sandboxes DISABLE TRIGGER USER")
    await stage.sql("UPDATE sandboxes SET desired = 'hibernating' WHERE id = $1", newer)
    told = await asyncio.gather(heads.load(newer), heads.load(known), return_exceptions=True)
    assert isinstance(told[0], UnknownEvent)
    assert isinstance(told[1], tuple)
    assert told[1][0].id == known
    await stage.sql("UPDATE sandboxes SET desired = 'running' WHERE id = $1", newer)  # for the comparison at the end


async def test_a_row_that_cannot_be_read_does_not_keep_the_others(stage: Stage):
    """The driver refuses the whole answer for it."""
    heads = Heads(stage.service.view)
    broken, known = await stage.create(), await stage.create()
    began = (await stage.sandbox(broken)).created_at
    await stage.sql("ALTER TABLE sandboxes DISABLE TRIGGER USER")
    await stage.sql("UPDATE sandboxes SET created_at = '4000-01-01 BC' WHERE id = $1", broken)
    told = await asyncio.gather(heads.load(broken), heads.load(known), return_exceptions=True)
    assert isinstance(told[0], OverflowError)
    assert isinstance(told[1], tuple)
    assert told[1][0].id == known
    await stage.sql(
        "UPDATE sandboxes SET created_at = $2 WHERE id = $1", broken, began
    )  # for the comparison at the end


@asynccontextmanager
async def at_its_append(stage: Stage, lease: float) -> AsyncIterator[tuple[Worker, UUID, asyncio.Task[None]]]:
    """A worker whose run of one sandbox waits, inside the block, for the lock of the head row to record what it made."""
    worker = stage.worker(lease=lease)
    sandbox_id = await stage.create()
    await worker.station.contact()
    claim = (await worker.queue.claim(1, lease=lease, tenant_slots=1)).claims[0]
    held = stage.hold(worker, claim)
    blocker = await asyncpg.connect(stage.dsn)
    try:
        async with blocker.transaction():
            await blocker.execute("SELECT 1 FROM sandboxes WHERE id = $1 FOR UPDATE", sandbox_id)
            run = held.run = asyncio.create_task(worker.reconciler.run(held))
            await stage.blocked()
            yield worker, sandbox_id, run
    finally:
        await blocker.close()


async def test_a_lease_is_extended_while_the_append_that_ends_it_waits(stage: Stage):
    """Otherwise another worker gets the sandbox while this one is still at it, exactly under load."""
    async with at_its_append(stage, lease=1) as (worker, sandbox_id, run):
        before = (await stage.row(sandbox_id))["lease_until"]
        await worker.leases.beat()
        assert (await stage.row(sandbox_id))["lease_until"] > before
    await run
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert await stage.row(sandbox_id) is None


async def test_a_claim_that_is_lost_meanwhile_ends_without_another_act(stage: Stage):
    async with at_its_append(stage, lease=30) as (worker, sandbox_id, run):
        await stage.make_overdue(sandbox_id)
        theirs = (await worker.queue.claim(1, lease=30, tenant_slots=1)).claims[0]
        await worker.leases.beat()
    await run
    assert (await stage.row(sandbox_id))["lease_owner"] == theirs.owner
    assert stage.engine.calls["observe"] == 0


async def waiting(stage: Stage) -> list[Any]:
    """Statements that wait for a lock."""
    return await stage.sql("SELECT pid FROM pg_locks WHERE NOT granted")
