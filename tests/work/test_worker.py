"""Whole workers: claims kept and lost, news during a long step, stopping."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase
from app.errors import StoreUnavailable
from app.runtime.driver import Power
from app.runtime.fake import FakeContainer, name_of
from app.store.queue.reconcile import Queue, Round
from tests.work.stage import ADOPTED, BEGUN, Gate, Raiser, Stage

NOW = datetime.now(UTC)


async def held_at(stage: Stage, gate: Gate, image: str = "busybox", **policy):
    """A worker whose run of one sandbox stands at the gate."""
    worker = stage.worker(stage.driver(before=gate), worker_id="held", **policy)
    sandbox_id = await stage.create(image=image)
    await worker.station.contact()
    claim = (await worker.queue.claim(1, lease=30, tenant_slots=1)).claims[0]
    held = stage.hold(worker, claim)
    held.run = asyncio.create_task(worker.reconciler.run(held))
    await gate.reached.wait()
    return worker, sandbox_id, held


async def test_a_lost_claim_is_dropped_without_a_word(stage: Stage):
    gate = Gate("start")
    worker, sandbox_id, held = await held_at(stage, gate)
    await stage.make_overdue(sandbox_id)
    theirs = (await worker.queue.claim(1, lease=30, tenant_slots=1)).claims[0]
    await worker.leases.beat()
    gate.open.set()
    assert held.run is not None
    await asyncio.wait([held.run])
    assert held.run.cancelled()
    assert await stage.told(sandbox_id) == ["requested", "placed"]
    assert (await stage.row(sandbox_id))["lease_owner"] == theirs.owner


async def test_a_claim_whose_lease_may_have_run_out_is_not_trusted(stage: Stage):
    gate = Gate("start")
    worker, sandbox_id, held = await held_at(stage, gate)
    held.trusted_until = 0.0
    worker.leases.distrust()
    gate.open.set()
    assert held.run is not None
    await asyncio.wait([held.run])
    assert held.lost
    assert await stage.told(sandbox_id) == ["requested", "placed"]


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
    gate = Gate("start")
    slow = stage.worker(stage.driver(before=gate), lease=0.6, worker_id="slow")
    eager = stage.worker(worker_id="eager")
    sandbox_id = await stage.create()
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
    gate = Gate("inspect")
    running_ = [await stage.running(stage.worker()) for _ in range(3)]
    worker = stage.worker(stage.driver(before=gate))
    await worker.station.contact()
    await worker.queue.enqueue(running_)
    running = asyncio.create_task(worker.run())
    await gate.reached.wait()
    await worker.stop(0)
    await running
    assert not worker.alive
    for sandbox_id in running_:
        row = await stage.row(sandbox_id)
        assert (row["lease_owner"], row["attempts"], row["last_error"]) == (None, 0, None)
        assert await stage.told(sandbox_id) == BEGUN


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
    assert await stage.told(late) == ["requested", "placed"]
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
    assert await stage.told(sandbox_id) == ["requested", "placed"], "the create was not recorded"
    await stage.settle(stage.worker())
    assert await stage.told(sandbox_id) == ADOPTED
    assert len(stage.engine.containers) == 1


async def test_a_cancelled_worker_hands_its_claims_back_too(stage: Stage):
    gate = Gate("inspect")
    sandbox_id = await stage.running(stage.worker())
    worker = stage.worker(stage.driver(before=gate))
    await worker.station.contact()
    await worker.queue.enqueue([sandbox_id])
    running = asyncio.create_task(worker.run())
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

    worker = stage.worker(stage.driver(before=count), concurrency=3, tenant_slots=2, spare_slots=1)
    async with stage.working(worker):
        sandboxes = await asyncio.gather(*[stage.create() for _ in range(20)])
        await until(stage.is_phase(Phase.RUNNING, *sandboxes))
    assert most == 2, "one tenant's share"


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


async def test_hints_about_strangers_and_the_dead_queue_nothing(stage: Stage):
    worker = stage.worker()
    alive, ended = await stage.running(worker), await stage.running(worker)
    await stage.ask(ended, cmd.Terminate())
    await stage.settle(worker)
    stage.engine.make("stranger")
    hinting = asyncio.create_task(worker.sweeper.follow_hints())
    while not stage.engine.listeners:
        await asyncio.sleep(0.001)
    stage.engine.destroy("stranger")
    stage.engine._publish(FakeContainer("sandbox-of-another", "x" * 64, Power.EXITED, NOW, uuid4(), uuid4()))
    stage.engine._publish(FakeContainer(name_of(ended), "x" * 64, Power.EXITED, NOW, stage.installation, ended))
    stage.engine.restart(alive)  # hints keep their order: when this one is queued, the others have been looked at
    async with asyncio.timeout(30):
        while not (rows := await stage.sql("SELECT stream_id FROM reconcile_queue")):
            await asyncio.sleep(0.01)
    assert [row["stream_id"] for row in rows] == [alive]
    hinting.cancel()
    await asyncio.gather(hinting, return_exceptions=True)


async def test_claims_are_made_for_work_only(stage: Stage, until):
    """Each append used to wake every claimer: 3.2 claims a create, 100 for 50 changes of metadata."""
    worker = stage.worker(poll=3600)
    claims = Counting(worker.queue)
    worker.queue = claims
    async with stage.working(worker):
        await until(claims.made(1))
        sandbox_id = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await until(stage.is_idle())
        assert claims.number <= 4, "the start, the engine that can be used, the create"
        before = claims.number
        for number in range(50):
            await stage.ask(sandbox_id, cmd.PatchMetadata({"n": str(number)}))
        for _ in range(10):
            last = await stage.create()
            await until(stage.is_phase(Phase.RUNNING, last))
        assert claims.number - before <= 13
        before = claims.number
        for _ in range(10):
            last = await stage.create()
            await until(stage.is_phase(Phase.RUNNING, last))
            await stage.ask(last, cmd.Terminate())
            await until(stage.is_phase(Phase.TERMINATED, last))
        assert claims.number - before <= 26, "what the engine says about our own removals costs none"


async def test_claims_keep_their_distance(stage: Stage, until):
    """What becomes due together is claimed together."""
    worker = stage.worker(claim_every=0.2, concurrency=100)
    claims = Counting(worker.queue)
    worker.queue = claims
    async with stage.working(worker):
        await until(claims.made(1))
        sandboxes = await asyncio.gather(*[stage.create() for _ in range(30)])
        await until(stage.is_phase(Phase.RUNNING, *sandboxes))
        assert claims.shortest >= 0.19


class Counting(Queue):
    """A queue that counts its claim statements."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue._database, queue._engine)
        self.number = 0
        self.shortest = float("inf")
        self._last = float("-inf")

    async def claim(self, slots: int, **details: Any) -> Round:
        self.number += 1
        now = asyncio.get_running_loop().time()
        self.shortest, self._last = min(self.shortest, now - self._last), now
        return await super().claim(slots, **details)

    def made(self, number: int) -> Callable[[], Awaitable[bool]]:
        async def enough() -> bool:
            return self.number >= number

        return enough


async def test_one_tenants_slow_work_leaves_slots_for_others(stage: Stage, until):
    gate = Gate("start")
    ended = await stage.running(stage.worker(), tenant="modest")
    worker = stage.worker(stage.driver(before=gate), concurrency=4, spare_slots=1)
    async with stage.working(worker):
        greedy = [await stage.create(tenant="greedy") for _ in range(10)]
        await gate.reached.wait()
        await stage.ask(ended, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, ended))
        assert not gate.open.is_set(), "it did not wait for the others"
        gate.open.set()
        await until(stage.is_phase(Phase.RUNNING, *greedy))


async def test_while_the_engine_is_away_what_is_not_placed_says_what_it_waits_for(stage: Stage, until):
    stage.engine.down = True
    sandbox_id = await stage.create_unplaced()
    async with stage.working(stage.worker()):

        async def said() -> bool:
            return (await stage.sandbox(sandbox_id)).waiting is not None

        await until(said)
        assert stage.engine.calls["create"] == 0
        stage.engine.down = False
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))


async def test_a_loop_that_stands_still_is_no_life(stage: Stage, until):
    """The process answers and no task is done, but nothing is claimed any more."""
    worker = stage.worker(stall_after=0.5)
    stuck = Stuck(worker.queue)
    worker.queue = stuck
    async with stage.working(worker):

        async def lives() -> bool:
            return worker.alive

        async def stands() -> bool:
            return not worker.alive and worker.watchdog.standing == ["claims"]

        await until(lives)
        stuck.opened.clear()
        await until(stands)
        stuck.opened.set()
        await until(lives)
    assert not worker.alive


class Stuck(Queue):
    """A queue that may not answer."""

    def __init__(self, queue: Queue) -> None:
        super().__init__(queue._database, queue._engine)
        self.opened = asyncio.Event()
        self.opened.set()

    async def claim(self, slots: int, **details: Any) -> Round:
        await self.opened.wait()
        return await super().claim(slots, **details)


async def test_a_run_that_never_ends_is_no_life_either(stage: Stage, until):
    """Its lease is extended for ever, so nobody else would come, and its slot is gone."""
    gate = Gate("start")
    worker = stage.worker(stage.driver(before=gate), stuck_after=0.3)
    async with stage.working(worker):
        sandbox_id = await stage.create()
        await gate.reached.wait()

        async def stuck() -> bool:
            return not worker.alive

        await until(stuck)
        gate.open.set()
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))

        async def lives() -> bool:
            return worker.alive

        await until(lives)
