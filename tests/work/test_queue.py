"""The reconcile queue: what a claim is, and that no wake-up is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.domain.sandbox import commands as cmd
from app.store.database.pool import Database
from app.store.queue.claiming import CLAIM
from app.store.queue.reconcile import BACKGROUND, USER, Claim, Failed, Queue
from app.store.queue.wake import make_engine_due
from app.views.overview import OverviewReader
from tests.work.stage import Stage


@pytest.fixture
def queue(stage: Stage) -> Queue:
    return Queue(stage.database, "default")


async def claim_one(queue: Queue, lease: float = 30) -> Claim:
    found = await queue.claim(1, lease=lease, tenant_slots=10)
    assert len(found.claims) == 1
    return found.claims[0]


async def is_claimable(queue: Queue) -> bool:
    return bool((await queue.claim(100, lease=30, tenant_slots=100)).claims)


async def test_many_touches_are_one_row_of_the_latest_cause(stage: Stage):
    sandbox_id = await stage.create()
    first = await stage.row(sandbox_id)
    assert (first["revision"], first["priority"], first["attempts"], first["lease_owner"]) == (1, USER, 0, None)
    outcome = await stage.ask(sandbox_id, cmd.Terminate())
    second = await stage.row(sandbox_id)
    assert second["revision"] == 2
    assert first["cause"] < second["cause"] == outcome.position


async def test_what_does_not_ask_for_work_does_not_touch(stage: Stage):
    sandbox_id = await stage.create()
    await stage.ask(sandbox_id, cmd.PatchMetadata({"a": "b"}))
    assert (await stage.row(sandbox_id))["revision"] == 1


async def test_a_claim_is_nobody_elses_until_its_lease_ends(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    mine = await claim_one(queue)
    assert mine.stream_id == sandbox_id
    assert not await is_claimable(queue)
    await stage.make_overdue(sandbox_id)
    theirs = await claim_one(queue)
    assert theirs.owner != mine.owner

    # The first holder wakes up: whatever it does has no effect.
    assert await queue.extend([mine], 30) == {}
    assert await queue.probe([mine]) == {}
    assert not await queue.complete(mine)
    assert not await queue.defer(mine, 0)
    await queue.release(mine)
    row = await stage.row(sandbox_id)
    assert row["lease_owner"] == theirs.owner
    assert await queue.complete(theirs)
    assert await stage.row(sandbox_id) is None


async def test_extending_moves_lease_and_due_time_together(stage: Stage, queue: Queue):
    one, other = await stage.create(), await stage.create()
    claims = (await queue.claim(10, lease=1, tenant_slots=10)).claims
    before = await stage.row(one)
    beats = await queue.extend(claims, 1000)
    assert beats.keys() == {one, other}
    assert {beat.revision for beat in beats.values()} == {1}
    after = await stage.row(one)
    assert after["lease_until"] == after["due_at"] > before["due_at"]


async def test_a_wish_during_a_claim_is_not_lost(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await stage.ask(sandbox_id, cmd.Terminate())
    assert not await is_claimable(queue), "the holder keeps its claim"
    assert (await queue.probe([claim]))[sandbox_id].revision == 2, "and can learn of the wish"
    assert not await queue.complete(claim)
    again = await claim_one(queue)
    assert (again.stream_id, again.revision) == (sandbox_id, 2)


async def test_deleting_the_row_when_done_would_lose_it(stage: Stage, queue: Queue):
    """The naive way, to show that the test above has something to find."""
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.sql("DELETE FROM reconcile_queue WHERE stream_id = $1 AND lease_owner = $2", sandbox_id, claim.owner)
    assert not await is_claimable(queue)
    assert (await stage.sandbox(sandbox_id)).closed_at is None, "a sandbox that nobody will ever remove"


async def test_a_touch_that_commits_during_the_completion_is_not_lost(stage: Stage, queue: Queue):
    """The delete waits for the touch's lock and must then see that the revision has risen."""
    await stage.create()
    claim = await claim_one(queue)
    touching = await asyncpg.connect(stage.dsn)
    try:
        transaction = touching.transaction()
        await transaction.start()
        await touching.execute("UPDATE reconcile_queue SET revision = revision + 1")
        completing = asyncio.create_task(queue.complete(claim))
        await stage.blocked()
        await transaction.commit()
        assert not await completing
    finally:
        await touching.close()
    assert (await claim_one(queue)).revision == 2


async def test_a_hint_during_a_claim_leads_to_another_look(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    assert await queue.enqueue([sandbox_id]) == 1
    assert not await is_claimable(queue)
    assert not await queue.complete(claim)
    assert (await claim_one(queue)).stream_id == sandbox_id


async def test_a_hint_after_a_dead_holders_lease_is_not_lost_to_its_late_completion(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await stage.make_overdue(sandbox_id, seconds=5)
    await queue.enqueue([sandbox_id])
    assert not await queue.complete(claim)
    assert (await claim_one(queue)).stream_id == sandbox_id


async def test_a_wish_ends_a_back_off_and_a_hint_does_not(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    await queue.defer(await claim_one(queue), 1000, failed=Failed(3, "X", "why"))
    await queue.enqueue([sandbox_id])
    assert not await is_claimable(queue)
    await stage.ask(sandbox_id, cmd.Terminate())
    again = await claim_one(queue)
    assert (again.attempts, again.first_failed_at) == (0, None)


async def test_a_hint_during_a_failing_run_does_not_skip_the_back_off(stage: Stage, queue: Queue):
    """A container that fails at its start makes events; they must not become the pace of the retries."""
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await queue.enqueue([sandbox_id])
    await queue.defer(claim, 1000, failed=Failed(1, "X", "why"))
    assert not await is_claimable(queue)
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["last_reason"], row["last_error"], row["lease_owner"]) == (1, "X", "why", None)


async def test_a_wish_during_a_failing_run_is_due_at_once_and_begins_anew(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await stage.ask(sandbox_id, cmd.Terminate())
    await queue.defer(claim, 1000, failed=Failed(7, "X", "why"))
    again = await claim_one(queue)
    assert (again.attempts, again.revision) == (0, 2)


async def test_a_hint_between_look_and_defer_is_not_lost_to_what_waits_for_it(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await queue.enqueue([sandbox_id])
    deferred = await queue.defer(claim, 1000, awaiting=True)
    assert deferred is not None
    assert deferred.due
    assert await is_claimable(queue)


async def test_without_awaiting_such_a_hint_is_lost_for_the_wait(stage: Stage, queue: Queue):
    """The naive way of the test above, which is right for a back-off."""
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await queue.enqueue([sandbox_id])
    await queue.defer(claim, 1000)
    assert not await is_claimable(queue)


async def test_an_engine_that_comes_back_during_a_claim_is_not_missed_by_what_waits_for_it(
    stage: Stage, queue: Queue, database: Database
):
    """A sandbox found no engine, and one came before the claim was given back: it waited for seconds all the same."""
    await stage.create_unplaced()
    claim = await claim_one(queue)
    await make_engine_due(database, stage.engine_name)
    assert not await is_claimable(queue), "it is held"
    deferred = await queue.defer(claim, 1000, awaiting=True)
    assert deferred is not None
    assert deferred.due


async def test_what_waits_rests_when_nothing_has_come(stage: Stage, queue: Queue):
    await stage.create()
    deferred = await queue.defer(await claim_one(queue), 1000, awaiting=True)
    assert deferred is not None
    assert not deferred.due
    assert not await is_claimable(queue)


async def test_hints_name_objects(stage: Stage, queue: Queue):
    sandbox_id, object_id = await stage.create_unplaced(), uuid4()
    await stage.ask(sandbox_id, cmd.RecordPlaced(stage.engine_name, 1, object_id))
    await queue.complete(await claim_one(queue))
    assert await queue.enqueue_objects([sandbox_id]) == []
    assert await queue.enqueue_objects([object_id]) == [sandbox_id]
    assert (await claim_one(queue)).stream_id == sandbox_id


async def test_a_closed_stream_leaves_the_queue_whatever_has_come(stage: Stage, queue: Queue):
    """The engine reports our own removal; it must not cost another claim and another look."""
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await queue.enqueue([sandbox_id])
    assert await queue.complete(claim, closed=True)
    assert await stage.row(sandbox_id) is None


async def test_a_wish_ends_a_wait_that_is_no_failure(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    claim = await claim_one(queue)
    await queue.defer(claim, 1000)
    assert not await is_claimable(queue)
    await queue.enqueue([sandbox_id])
    assert await is_claimable(queue), "nothing has failed, so a hint is as good as a wish"


async def test_failures_are_timed_from_the_first(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    await queue.defer(await claim_one(queue), 0, failed=Failed(1, "X", "why"))
    first = (await claim_one(queue)).first_failed_at
    await stage.make_overdue(sandbox_id)
    await queue.defer(await claim_one(queue), 0, failed=Failed(2, "X", "why"))
    assert (await claim_one(queue)).first_failed_at == first
    await stage.make_overdue(sandbox_id)
    await queue.defer(await claim_one(queue), 0, failed=Failed(2, "X", "not counted"))
    again = await claim_one(queue)
    assert (again.attempts, again.first_failed_at) == (2, first)
    await queue.complete(again)
    await queue.enqueue([sandbox_id])
    assert (await claim_one(queue)).first_failed_at is None


async def test_a_release_is_due_at_once_and_counts_nothing(stage: Stage, queue: Queue):
    sandbox_id = await stage.create()
    await queue.defer(await claim_one(queue), 0, failed=Failed(2, "X", "why"))
    await queue.release(await claim_one(queue))
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["revision"], row["lease_owner"], row["lease_until"]) == (2, 1, None, None)
    assert (await claim_one(queue)).attempts == 2


async def test_only_open_sandboxes_of_the_driver_are_enqueued(stage: Stage, queue: Queue):
    ended, open_ = await stage.running(stage.worker()), await stage.running(stage.worker())
    await stage.ask(ended, cmd.Terminate())
    await stage.settle(stage.worker())
    assert (await stage.sandbox(ended)).closed_at is not None
    assert await queue.enqueue([ended, open_, uuid4()]) == 1
    assert await Queue(stage.database, "other").enqueue([open_]) == 0
    row = await stage.row(open_)
    assert (row["priority"], row["cause"], row["tenant"]) == (BACKGROUND, None, "default")
    await queue.enqueue([open_], USER)
    assert (await stage.row(open_))["priority"] == USER
    await queue.enqueue([open_], BACKGROUND)
    assert (await stage.row(open_))["priority"] == USER


async def test_tenants_take_turns_and_none_holds_more_than_its_slots(stage: Stage, queue: Queue):
    for _ in range(12):
        await stage.create(tenant="greedy")
    late = [await stage.create(tenant="modest") for _ in range(2)]
    found = await queue.claim(8, lease=30, tenant_slots=4)
    assert Counter(claim.tenant for claim in found.claims) == {"greedy": 4, "modest": 2}
    assert (found.due, found.above) == (6, 8), "what lies above the slots of a tenant is no reason to ask again"
    assert {claim.stream_id for claim in found.claims} >= set(late)
    assert not (await queue.claim(8, lease=30, tenant_slots=4, held={"greedy": 4})).claims
    assert len((await queue.claim(8, lease=30, tenant_slots=4, held={"greedy": 3})).claims) == 1


@pytest.fixture
async def rows_of_nobody(stage: Stage) -> AsyncIterator[None]:
    """The test writes rows without streams; they go before the drift check finds them."""
    yield
    await stage.sql("DELETE FROM reconcile_queue")


@pytest.mark.usefixtures("rows_of_nobody")
async def test_one_tenants_thousands_of_rows_hide_nobody(stage: Stage, queue: Queue):
    """Rows of one tenant that have been due for longest, more than any window; the others are in the first round."""
    await many(stage, "greedy", 5000, "interval '1 hour'")
    others = {f"t{number:02}" for number in range(15)}
    for tenant in others:
        await many(stage, tenant, 3, "interval '0 s'")
    found = await queue.claim(16, lease=30, tenant_slots=12)
    tenants = Counter(claim.tenant for claim in found.claims)
    assert set(tenants) == {"greedy", *others}
    await stage.sql("DELETE FROM reconcile_queue")


@pytest.mark.usefixtures("rows_of_nobody")
async def test_a_window_over_what_is_due_hides_them(stage: Stage):
    """The naive way of the test above: rank among the first few hundred rows that are due."""
    await many(stage, "greedy", 600, "interval '1 hour'")
    await many(stage, "modest", 1, "interval '0 s'")
    window = await stage.sql("SELECT tenant FROM reconcile_queue WHERE due_at <= now() ORDER BY due_at LIMIT 400")
    assert {row["tenant"] for row in window} == {"greedy"}
    await stage.sql("DELETE FROM reconcile_queue")


async def many(stage: Stage, tenant: str, number: int, since: str) -> None:
    """So many due rows; of no sandboxes."""
    await stage.sql(
        "INSERT INTO reconcile_queue (stream_id, kind, tenant, engine, revision, due_at)"
        f" SELECT gen_random_uuid(), 'sandbox', $1, 'default', 1, clock_timestamp() - {since}"
        " FROM generate_series(1, $2)",
        tenant,
        number,
    )


async def test_rows_of_a_kind_that_a_newer_version_has_added_are_left_to_it(stage: Stage, queue: Queue):
    """An old worker would find no sandbox of that id, and delete the row."""
    sandbox_id = await stage.create()
    await stage.sql("UPDATE reconcile_queue SET kind = 'pool'")
    assert not await is_claimable(queue)
    await stage.sql("UPDATE reconcile_queue SET kind = 'sandbox'")
    assert (await claim_one(queue)).stream_id == sandbox_id


async def test_what_is_not_placed_is_anybodys(stage: Stage, queue: Queue):
    placed, unplaced = await stage.create(), await stage.create()
    await stage.sql("UPDATE reconcile_queue SET engine = '' WHERE stream_id = $1", unplaced)
    other = Queue(stage.database, "other")
    assert [claim.stream_id for claim in (await other.claim(9, lease=0, tenant_slots=9)).claims] == [unplaced]
    assert [c.stream_id for c in (await queue.claim(9, lease=0, tenant_slots=9, engines=[""])).claims] == [unplaced]
    assert {c.stream_id for c in (await queue.claim(9, lease=30, tenant_slots=9)).claims} == {placed, unplaced}


async def test_the_user_lane_goes_first_but_slots_can_be_kept(stage: Stage, queue: Queue):
    worker = stage.worker()
    background = [await stage.running(worker) for _ in range(3)]
    await queue.enqueue(background)
    users = [await stage.create() for _ in range(10)]

    async def lanes(kept: int, slots: int = 8) -> Counter[bool]:
        found = await queue.claim(slots, lease=30, tenant_slots=100, background=kept)
        for claim in found.claims:
            await queue.release(claim)
        return Counter(claim.stream_id in background for claim in found.claims)

    assert await lanes(0) == {False: 8}
    assert await lanes(1) == {False: 7, True: 1}
    assert await lanes(1, slots=1) == {True: 1}
    assert await lanes(0, slots=13) == {False: 10, True: 3}
    for sandbox_id in users:
        await stage.sql("DELETE FROM reconcile_queue WHERE stream_id = $1", sandbox_id)
    assert await lanes(0) == {True: 3}, "an empty lane leaves its slots"


async def test_claims_at_once_take_each_row_once_and_leave_none(stage: Stage, queue: Queue):
    sandboxes = {await stage.create(tenant=f"t{number % 3}") for number in range(60)}
    taken: list[Claim] = []

    async def claimer() -> None:
        while (found := await queue.claim(3, lease=300, tenant_slots=2)).due:
            taken.extend(found.claims)

    await asyncio.gather(*[claimer() for _ in range(6)])
    assert len(taken) == 60
    assert {claim.stream_id for claim in taken} == sandboxes


async def test_many_versions_many_holders_some_of_which_die(stage: Stage, queue: Queue):
    """Whatever is wanted last has been read by a run that ended well, and no two runs overlap."""
    sandboxes = [await stage.running(stage.worker()) for _ in range(4)]
    handled: dict[UUID, int] = {}
    working: set[UUID] = set()
    writing = True

    async def writer(sandbox_id: UUID) -> None:
        for number in range(40):
            await stage.ask(sandbox_id, cmd.PatchMetadata({"n": str(number)}))
            await queue.enqueue([sandbox_id])

    async def runner(number: int) -> None:
        turns = 0
        while writing or await stage.sql("SELECT 1 FROM reconcile_queue"):
            for claim in (await queue.claim(1, lease=300, tenant_slots=10)).claims:
                turns += 1
                assert claim.stream_id not in working, "overlap"
                working.add(claim.stream_id)
                seen = (await stage.sandbox(claim.stream_id)).version
                working.discard(claim.stream_id)
                if (turns + number) % 5 == 0:  # dies
                    await stage.make_overdue(claim.stream_id)
                    continue
                handled[claim.stream_id] = seen
                await queue.complete(claim)
            await asyncio.sleep(0)

    runners = [asyncio.create_task(runner(number)) for number in range(3)]
    await asyncio.gather(*[writer(sandbox_id) for sandbox_id in sandboxes])
    writing = False
    async with asyncio.timeout(60):
        await asyncio.gather(*runners)
    for sandbox_id in sandboxes:
        assert handled[sandbox_id] == (await stage.sandbox(sandbox_id)).version


async def test_depth_as_the_operator_reads_it(stage: Stage, queue: Queue):
    for _ in range(3):
        await stage.create()
    await claim_one(queue)
    await queue.defer(await claim_one(queue), 1000)
    (depth,) = (await OverviewReader(stage.database).read()).queue
    assert depth.engine == "default", "no other engine has a row"
    assert (depth.rows, depth.claimed, depth.due) == (3, 1, 1)
    assert depth.oldest_due_s > 0


@pytest.mark.usefixtures("rows_of_nobody")
async def test_a_round_reads_what_is_due_and_not_the_queue(stage: Stage):
    connection = await asyncpg.connect(stage.dsn)
    try:
        await connection.execute(
            "INSERT INTO reconcile_queue (stream_id, kind, tenant, engine, revision, due_at, priority)"
            " SELECT gen_random_uuid(), 'sandbox', CASE WHEN n % 10 < 9 THEN 'greedy' ELSE 't' || n % 50 END,"
            " 'default', 1, clock_timestamp() + make_interval(secs => n % 20 - 10), n % 2"
            " FROM generate_series(1, 100000) n"
        )
        await connection.execute("ANALYZE reconcile_queue")
        values = {
            "engines": ["default", ""], "kinds": ["sandbox"], "left_alone": [], "slots": 16, "tenant_slots": 8, "background": 2,
            "held_tenants": ["greedy"], "held_counts": [3], "lease": 30.0, "owner": uuid4(),
        }  # fmt: skip
        for mode in ("force_custom_plan", "force_generic_plan"):
            await connection.execute(f"SET plan_cache_mode = {mode}")
            rows = await connection.fetch("EXPLAIN (ANALYZE) " + CLAIM.sql, *CLAIM.arguments(values))
            plan = "\n".join(row[0] for row in rows)
            assert "using reconcile_queue_due" in plan
            assert "Seq Scan on reconcile_queue" not in plan
        await connection.execute("DELETE FROM reconcile_queue")
    finally:
        await connection.close()
