"""A stop ends although the engine hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from app.domain.sandbox.state import Phase
from tests.work.stage import Gate, Stage

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


async def test_a_create_that_hangs_does_not_hold_up_the_stop_and_is_left_to_its_lease(stage: Stage) -> None:
    gate = Gate("create")
    worker = stage.worker(stage.driver(before=gate), create_grace=0.2)
    running = asyncio.create_task(worker.run())
    sandbox_id = await stage.create()
    await gate.reached.wait()
    (run,) = (task for task in asyncio.all_tasks() if task.get_name() == f"sandbox-{sandbox_id}")
    await worker.stop(0)
    async with asyncio.timeout(30):
        await running
    row = await stage.row(sandbox_id)
    assert row["lease_owner"] is not None, "nobody else looks while the engine may still be making it"
    gate.open.set()  # the engine comes to itself, the process is still there
    await asyncio.wait([run])
    assert (await stage.row(sandbox_id))["lease_owner"] == row["lease_owner"]
    await stage.make_overdue(sandbox_id)
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert len(stage.engine.containers) == 1


async def test_an_engine_that_does_not_say_who_it_is_does_not_hold_up_the_stop(stage: Stage, until: Until) -> None:
    stage.engine.down = True
    gate = Gate("nothing yet")
    worker = stage.worker(stage.driver(before=gate), sweep_tick=3600, engine_check=3600)
    running = asyncio.create_task(worker.run())
    await stage.create()

    async def noticed() -> bool:
        return worker.station.open

    await until(noticed)
    gate.call = "version"  # from now on it takes connections and answers nothing
    await gate.reached.wait()
    await worker.stop(0)
    async with asyncio.timeout(10):
        await running
