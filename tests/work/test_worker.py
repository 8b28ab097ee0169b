"""Whole workers: claims kept and lost, news during a long step, stopping."""

from __future__ import annotations

import asyncio

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase
from app.errors import StoreUnavailable
from app.runtime.fake import name_of
from tests.work.stage import Gate, Raiser, Stage


async def held_at(stage: Stage, gate: Gate, image: str = "busybox", **policy):
    """A worker whose run of one sandbox stands at the gate."""
    worker = stage.worker(stage.driver(before=gate), worker_id="held", **policy)
    sandbox_id = await stage.create(image=image)
    claim = (await worker.queue.claim(1, lease=30, share=1)).claims[0]
    held = stage.hold(worker, claim)
    held.run = asyncio.create_task(worker.reconciler.run(held))
    await gate.reached.wait()
    return worker, sandbox_id, held


async def test_a_delete_during_a_pull_ends_the_pull(stage: Stage, until):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    worker = stage.worker(stage.driver(before=gate))
    async with stage.working(worker):
        sandbox_id = await stage.create(image="big")
        await gate.reached.wait()
        await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        assert not gate.open.is_set(), "it did not wait for the pull"
        await until(stage.is_idle())
    assert await stage.told(sandbox_id) == ["requested", "termination_requested", "runtime_removed", "terminated"]
    assert not stage.engine.containers


async def test_an_expiry_during_a_pull_ends_the_pull(stage: Stage, until):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    async with stage.working(stage.worker(stage.driver(before=gate))):
        sandbox_id = await stage.create(image="big", timeout_s=1)
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
    ending = (await stage.box(sandbox_id)).ending
    assert ending is not None
    assert ending.cause.value == "expired_while_pending"


async def test_a_delete_that_comes_just_before_the_pull_is_seen_too(stage: Stage):
    """The rise is noticed while no long step is under way; it must not be forgotten when one begins."""
    gate = Gate("create")
    stage.engine.to_pull.add("big")
    worker, sandbox_id, held = await held_at(stage, gate, image="big")
    await stage.ask(sandbox_id, cmd.Terminate())
    step, held._step = held._step, None  # as if the head had been loaded and the step not begun
    await worker.leases.beat()
    held._step = step
    await worker.leases.beat()
    gate.open.set()
    assert held.run is not None
    await held.run
    assert await stage.phase(sandbox_id) is Phase.TERMINATED
    assert stage.engine.calls["pull"] == 0


async def test_a_hint_during_a_pull_leaves_the_pull_alone(stage: Stage):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    worker, sandbox_id, held = await held_at(stage, gate, image="big")
    await worker.queue.enqueue([sandbox_id])
    await worker.leases.beat()
    await worker.leases.beat()
    gate.open.set()
    assert held.run is not None
    await held.run
    assert stage.engine.calls["pull"] == 1
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert await stage.row(sandbox_id) is not None, "and leads to another look afterwards"


async def test_a_metadata_change_during_a_pull_leaves_the_pull_alone(stage: Stage):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    worker, sandbox_id, held = await held_at(stage, gate, image="big")
    await stage.ask(sandbox_id, cmd.PatchMetadata({"a": "b"}))
    await worker.leases.beat()
    gate.open.set()
    assert held.run is not None
    await held.run
    assert stage.engine.calls["pull"] == 1
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_a_lost_claim_is_dropped_without_a_word(stage: Stage):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    worker, sandbox_id, held = await held_at(stage, gate, image="big")
    await stage.make_overdue(sandbox_id)
    theirs = (await worker.queue.claim(1, lease=30, share=1)).claims[0]
    await worker.leases.beat()
    assert held.run is not None
    await asyncio.wait([held.run])
    assert held.run.cancelled()
    assert await stage.told(sandbox_id) == ["requested"]
    assert (await stage.row(sandbox_id))["lease_owner"] == theirs.owner


async def test_a_claim_whose_lease_may_have_run_out_is_not_trusted(stage: Stage):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    worker, sandbox_id, held = await held_at(stage, gate, image="big")
    held.trusted_until = 0.0
    worker.leases._distrust()
    assert held.run is not None
    await asyncio.wait([held.run])
    assert held.lost
    assert await stage.told(sandbox_id) == ["requested"]


async def test_what_a_lost_claim_has_made_for_an_ended_sandbox_goes(stage: Stage):
    """The successor looked before the create was done, found nothing, and closed the stream."""
    gate = Gate("create")
    worker, sandbox_id, held = await held_at(stage, gate)
    await stage.make_overdue(sandbox_id)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.TERMINATED
    await worker.leases.beat()
    gate.open.set()  # the create may not be cut, and is done all the same
    assert held.run is not None
    await asyncio.wait([held.run])
    assert stage.engine.calls["start"] == 1
    assert stage.container(sandbox_id) is None


async def test_leases_are_kept_while_a_step_takes_long(stage: Stage, until):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    slow = stage.worker(stage.driver(before=gate), lease=0.6, worker_id="slow")
    eager = stage.worker(worker_id="eager")
    sandbox_id = await stage.create(image="big")
    async with stage.working(slow):
        await gate.reached.wait()
        first = (await stage.row(sandbox_id))["lease_until"]
        async with stage.working(eager):

            async def extended() -> bool:
                return (await stage.row(sandbox_id))["lease_until"] > first

            await until(extended)
            assert stage.engine.calls["create"] == 1, "nobody else has tried"
            gate.open.set()
            await until(stage.is_phase(Phase.RUNNING, sandbox_id))
    assert stage.engine.calls["start"] == 1


async def test_a_stop_hands_claims_back_and_marks_nothing(stage: Stage):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    worker = stage.worker(stage.driver(before=gate))
    running = asyncio.create_task(worker.run())
    sandboxes = [await stage.create(image="big") for _ in range(3)]
    await gate.reached.wait()
    await worker.stop(0)
    await running
    assert not worker.alive
    for sandbox_id in sandboxes:
        row = await stage.row(sandbox_id)
        assert (row["lease_owner"], row["attempts"], row["last_error"]) == (None, 0, None)
        assert await stage.told(sandbox_id) == ["requested"]
    await stage.settle(stage.worker())
    for sandbox_id in sandboxes:
        assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_a_stop_with_grace_lets_runs_finish_and_claims_nothing_more(stage: Stage, until):
    gate = Gate("start")
    worker = stage.worker(stage.driver(before=gate))
    running = asyncio.create_task(worker.run())
    first = await stage.create()
    await gate.reached.wait()
    await worker.stop(60)
    late = await stage.create()
    gate.open.set()
    await running
    assert await stage.phase(first) is Phase.RUNNING
    assert await stage.told(late) == ["requested"]
    assert (await stage.row(late))["lease_owner"] is None


async def test_a_stop_during_a_create_leaves_no_half_made_container(stage: Stage, until):
    gate = Gate("start")
    worker = stage.worker(stage.driver(before=gate))
    running = asyncio.create_task(worker.run())
    sandbox_id = await stage.create()
    await gate.reached.wait()
    await worker.stop(0)

    async def cut() -> bool:
        return all(run.cancelling() for run in worker._runs)

    await until(cut)  # else the create may end, and be recorded, before the stop gets to it
    gate.open.set()
    await running
    assert await stage.told(sandbox_id) == ["requested"], "the fact was not recorded"
    await stage.settle(stage.worker())
    assert await stage.told(sandbox_id) == ["requested", "runtime_adopted", "started"]
    assert len(stage.engine.containers) == 1


async def test_a_cancelled_worker_hands_its_claims_back_too(stage: Stage):
    gate = Gate("pull")
    stage.engine.to_pull.add("big")
    worker = stage.worker(stage.driver(before=gate))
    running = asyncio.create_task(worker.run())
    sandbox_id = await stage.create(image="big")
    await gate.reached.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (await stage.row(sandbox_id))["lease_owner"] is None


async def test_no_error_of_one_sandbox_ends_the_worker(stage: Stage, until):
    stage.engine.to_pull.add("big")
    broken = Raiser(lambda: ZeroDivisionError("bug"), "pull")
    worker = stage.worker(stage.driver(before=broken))
    async with stage.working(worker):
        bad = await stage.create(image="big")
        good = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, good))

        async def counted() -> bool:
            return (await stage.row(bad))["attempts"] > 1

        await until(counted)
        assert await stage.phase(bad) is Phase.PENDING
        assert worker.alive


async def test_no_error_of_the_database_ends_the_worker(stage: Stage, until):
    worker = stage.worker()
    async with stage.working(worker):
        for _ in range(3):
            sandbox_id = await create_when_possible(stage)  # the cut may not have been noticed yet
            await until(stage.is_phase(Phase.RUNNING, sandbox_id))
            async with stage.locked("reconcile_queue"):
                await stage.blocked()
                await stage.cut_connections()
        sandbox_id = await create_when_possible(stage)
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        assert worker.alive


async def create_when_possible(stage: Stage):
    async with asyncio.timeout(30):
        while True:
            try:
                return await stage.create()
            except StoreUnavailable:
                await asyncio.sleep(0.02)


async def test_slots_bound_what_is_worked_on_at_once_and_all_get_their_turn(stage: Stage, until):
    at_once = most = 0

    async def count(call: str) -> None:
        nonlocal at_once, most
        if call == "create":
            at_once += 1
            most = max(most, at_once)
            await asyncio.sleep(0.005)
            at_once -= 1

    worker = stage.worker(stage.driver(before=count), concurrency=3, tenant_share=2)
    async with stage.working(worker):
        sandboxes = await asyncio.gather(*[stage.create() for _ in range(20)])
        await until(stage.is_phase(Phase.RUNNING, *sandboxes))
    assert most <= 3


async def test_background_work_gets_one_slot_in_eight(stage: Stage):
    worker = stage.worker()
    assert [worker._for_background(1) for _ in range(16)].count(1) == 2
    assert worker._for_background(16) == 2


async def test_hints_make_an_exit_visible(stage: Stage, until):
    worker = stage.worker(poll=30)
    async with stage.working(worker):
        sandbox_id = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await until(stage.is_idle())
        stage.engine.exit(sandbox_id, 0)
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        stage.engine.drop_streams()
        other = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, other))
        stage.engine.exit(other, 1)
        await until(stage.is_phase(Phase.FAILED, other))


async def test_hints_about_strangers_and_the_dead_queue_nothing(stage: Stage, until):
    worker = stage.worker()
    async with stage.working(worker):
        sandbox_id = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        await until(stage.is_idle())
        stage.engine.make("stranger")
        stage.engine.destroy("stranger")
        assert stage.engine.of(sandbox_id) is None
        assert name_of(sandbox_id) not in stage.engine.containers
    assert await stage.is_idle()()
