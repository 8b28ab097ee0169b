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
