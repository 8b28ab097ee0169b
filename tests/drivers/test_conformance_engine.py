"""What every driver must tell of the engine as a whole, on the fake and on a real Docker engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import uuid4

import pytest

from app.errors import RuntimeUnavailable
from app.runtime.driver import Change, Driver, Hint, Power, Workload
from tests.drivers.looks import Eventually, exited, heard, id_of, inventory, leftovers
from tests.drivers.rig import Rig

# inventory


async def test_inventory_has_all_of_ours_and_nothing_else(rig: Rig, eventually: Eventually):
    works = [rig.work(generation=n, position=n * 10) for n in range(1, 4)]
    for work in works:
        await rig.driver.ensure(work)
    ended = rig.ending(0)
    await rig.driver.ensure(ended)
    await exited(rig, ended, eventually)
    await rig.driver.set_power(works[0].ref, Power.PAUSED)
    await rig.elsewhere().ensure(rig.work())
    await rig.stranger(f"sandbox-{uuid4()}")

    rows = {seen.object_id: seen for seen in await inventory(rig.another())}
    powers = {object_id: seen.power for object_id, seen in rows.items()}
    assert powers == {
        works[0].ref.object_id: Power.PAUSED,
        works[1].ref.object_id: Power.RUNNING,
        works[2].ref.object_id: Power.RUNNING,
        ended.ref.object_id: Power.EXITED,
    }
    assert [rows[work.ref.object_id].generation for work in works] == [1, 2, 3]
    assert [rows[work.ref.object_id].position for work in works] == [10, 20, 30]
    seen = await rig.driver.observe(works[1].ref)
    assert seen is not None
    assert id_of(rows[seen.object_id]) == id_of(seen)


async def test_inventory_of_nothing_is_empty(rig: Rig):
    assert await inventory(rig.driver) == []


async def test_an_inventory_that_fails_raises(rig: Rig):
    await rig.driver.ensure(rig.work())
    rig.refuse("list")
    with pytest.raises(RuntimeUnavailable):
        await inventory(rig.driver)


# leftovers


async def test_a_part_without_its_main_is_a_leftover(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    object_id = await rig.leftover()
    await rig.leftover(uuid4())  # of another installation
    [found] = await leftovers(rig.driver)
    assert (found.object_id, found.role, found.name) == (object_id, "egress", f"sandbox-egress-{object_id}")
    assert found.position == 7
    assert [seen.object_id for seen in await inventory(rig.driver)] == [work.ref.object_id]


async def test_a_leftover_can_be_removed_and_nothing_else_goes(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    await rig.leftover()
    [found] = await leftovers(rig.driver)
    other = rig.elsewhere()
    await other.remove_leftover(found)
    assert await leftovers(rig.driver) == [found], "another installation does not touch it"
    await rig.driver.remove_leftover(found)
    await rig.driver.remove_leftover(found)
    assert await leftovers(rig.driver) == []
    assert len(await inventory(rig.driver)) == 1


# hints


async def test_hints_tell_exit_pause_restart_and_removal(rig: Rig, eventually: Eventually):
    work = rig.work()
    async with heard(rig, eventually) as ids:

        async def after(change: Awaitable[object]) -> None:
            ids.clear()
            await change
            await eventually(lambda: work.ref.object_id in ids)

        await rig.driver.ensure(work)
        await after(rig.driver.set_power(work.ref, Power.PAUSED))
        await after(rig.driver.set_power(work.ref, Power.RUNNING))
        await after(rig.restart(work.ref.object_id))
        await after(rig.kill(work.ref.object_id))
        await after(rig.driver.remove(work.ref))


async def test_hints_tell_what_happened_to_which_part_and_when(rig: Rig, eventually: Eventually):
    work, told = rig.work(), list[Hint]()

    async def listen() -> None:
        async for hint in rig.driver.hints():
            if hint is not None and hint.change is not Change.OTHER:
                told.append(hint)

    task = asyncio.create_task(listen())
    try:
        await eventually(rig.listening)
        seen = await rig.driver.ensure(work)
        await rig.driver.set_power(work.ref, Power.PAUSED)
        await rig.driver.set_power(work.ref, Power.RUNNING)
        await rig.driver.remove(work.ref)
        await eventually(lambda: len(told) == 3)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [hint.change for hint in told] == [Change.PAUSED, Change.RESUMED, Change.REMOVED]
    assert {(hint.object_id, hint.runtime_id) for hint in told} == {(work.ref.object_id, id_of(seen))}
    times = [at for at in (seen.started_at, *(hint.at for hint in told)) if at is not None]
    assert [at.utcoffset() for at in times] == [timedelta(0)] * 4
    assert sorted(times) == times, "by the clock that also tells the start"


async def test_hints_pass_over_strangers(rig: Rig, eventually: Eventually):
    async with heard(rig, eventually) as ids:
        stranger, work = rig.work(), rig.work()
        await rig.elsewhere().ensure(stranger)
        await rig.elsewhere().remove(stranger.ref)
        await rig.driver.ensure(work)
        await rig.kill(work.ref.object_id)
        await eventually(lambda: ids)
        assert ids == {work.ref.object_id}


async def test_hints_survive_a_dropped_stream(rig: Rig, eventually: Eventually):
    first, second = rig.work(), rig.work()
    async with heard(rig, eventually) as ids:
        await rig.driver.ensure(first)
        await rig.driver.ensure(second)
        await rig.kill(first.ref.object_id)
        await eventually(lambda: first.ref.object_id in ids)
        rig.drop_streams()
        await rig.kill(second.ref.object_id)
        await eventually(lambda: second.ref.object_id in ids)


async def test_a_broken_stream_says_that_anything_may_have_happened(rig: Rig, eventually: Eventually):
    """An engine that restarts forgets its events; whoever follows hints must know that some may be missing."""
    told: list[Hint | None] = []

    async def listen() -> None:
        async for hint in rig.driver.hints():
            told.append(hint)  # noqa: PERF401 - it never ends

    task = asyncio.create_task(listen())
    try:
        await eventually(rig.listening)
        assert told == []
        rig.drop_streams()
        await eventually(lambda: told == [None])
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_hints_tell_late_what_happened_while_the_engine_was_out_of_reach(rig: Rig, eventually: Eventually):
    work = rig.work()
    await rig.driver.ensure(work)
    async with heard(rig, eventually) as ids:
        await rig.down()
        await rig.kill(work.ref.object_id)
        await rig.up()
        await eventually(lambda: work.ref.object_id in ids)


# an engine that is away

VERBS: dict[str, Callable[[Driver, Workload], Awaitable[object]]] = {
    "ensure": lambda driver, work: driver.ensure(work),
    "observe": lambda driver, work: driver.observe(work.ref),
    "pause": lambda driver, work: driver.set_power(work.ref, Power.PAUSED),
    "resume": lambda driver, work: driver.set_power(work.ref, Power.RUNNING),
    "remove": lambda driver, work: driver.remove(work.ref),
    "inventory": lambda driver, work: inventory(driver),
    "fetch": lambda driver, work: driver.fetch(work.image, lambda _: None),
    "image": lambda driver, work: driver.image(work.image.reference),
    "check": lambda driver, work: driver.check(),
    "prepare": lambda driver, work: driver.prepare(),
}


@pytest.mark.parametrize("verb", VERBS)
async def test_an_engine_that_is_down_is_unavailable_and_comes_back(rig: Rig, verb: str):
    work = rig.work()
    await rig.driver.ensure(work)
    await rig.down()
    with pytest.raises(RuntimeUnavailable):
        await VERBS[verb](rig.driver, work)
    await rig.up()
    await VERBS[verb](rig.driver, work)


@pytest.mark.parametrize("call", ["create", "start", "inspect"])
async def test_an_engine_in_trouble_gives_no_verdict(rig: Rig, call: str):
    rig.refuse(call)
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.ensure(rig.work())
