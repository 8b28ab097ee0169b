"""A process that dies between what it did to a container and what it wrote about it, while that is paused or resumed."""

from __future__ import annotations

import asyncio

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase
from tests.work.stage import BEGUN, Gate, Stage


async def die_at(stage: Stage, call: str, *, after: bool) -> None:
    """One claimed run reaches this call and is never heard of again: no hand-back, only the end of its lease."""
    gate = Gate(call)
    worker = stage.worker(stage.driver(after=gate) if after else stage.driver(before=gate))
    await worker.station.contact()
    (claim,) = (await worker.queue.claim(1, lease=30, tenant_slots=1)).claims
    held = stage.hold(worker, claim)
    held.left = True  # as if killed
    run = held.run = asyncio.create_task(worker.reconciler.run(held))
    await gate.reached.wait()
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    await stage.make_overdue(claim.stream_id)


@pytest.mark.parametrize("after", [False, True])
async def test_a_kill_during_pause_and_resume_tells_each_once(stage: Stage, *, after: bool) -> None:
    sandbox_id = await stage.running(stage.worker())
    await stage.ask(sandbox_id, cmd.Pause())
    await die_at(stage, "pause", after=after)
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.PAUSED
    await stage.ask(sandbox_id, cmd.Resume())
    await die_at(stage, "unpause", after=after)
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    wanted = ["pause_requested", "paused", "resume_requested", "resumed"]
    assert await stage.told(sandbox_id) == [*BEGUN, *wanted]


@pytest.mark.parametrize("after", [False, True])
async def test_a_kill_during_the_removal_of_a_paused_one_leaves_nothing(stage: Stage, *, after: bool) -> None:
    sandbox_id = await stage.running(stage.worker(), timeout_s=600)
    await stage.ask(sandbox_id, cmd.Pause())
    await stage.settle(stage.worker())
    await stage.ask(sandbox_id, cmd.Terminate())
    await die_at(stage, "remove", after=after)
    await stage.settle(stage.worker())
    assert (await stage.told(sandbox_id))[-3:] == ["termination_requested", "runtime_removed", "terminated"]
    assert not stage.engine.containers
    for table in ("reconcile_queue", "deadlines", "sealed_values"):
        assert not await stage.sql(f"SELECT 1 FROM {table} WHERE stream_id = $1", sandbox_id)


@pytest.mark.parametrize(
    ("call", "after"), [("create", False), ("create", True), ("start", False), ("start", True), ("inspect", False)]
)
async def test_a_kill_between_fetch_and_ready_tells_each_once(stage: Stage, call: str, *, after: bool) -> None:
    stage.pull("big")
    sandbox_id = await stage.create(image="big")
    worker = stage.worker()
    await stage.turn(worker)
    await stage.land(worker)
    assert (await stage.told(sandbox_id))[-1] == "fetched"

    async def die(reached: str) -> None:
        if reached == call:
            raise asyncio.CancelledError  # a create is not cut, so nobody can be stopped at a gate in it

    dying = stage.worker(stage.driver(after=die) if after else stage.driver(before=die))
    (claim,) = (await dying.queue.claim(1, lease=30, tenant_slots=1)).claims
    held = stage.hold(dying, claim)
    held.left = True  # as if killed
    run = held.run = asyncio.create_task(dying.reconciler.run(held))
    await asyncio.gather(run, return_exceptions=True)
    assert run.cancelled()
    await stage.make_overdue(sandbox_id)
    await stage.settle(stage.worker())
    told = await stage.told(sandbox_id)
    assert told[:4] == ["requested", "placed", "waiting", "fetched"]
    assert told[4] in ("runtime_created", "runtime_adopted")
    assert told[5:] == ["started", "ready"]
    assert len(stage.engine.containers) == 1
    assert stage.engine.calls["pull"] == 1
