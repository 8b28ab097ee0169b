"""What every driver must do with one sandbox, on the fake and on a real Docker engine."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import Limits, Power
from tests.drivers.looks import Eventually, exited, inventory, power_of
from tests.drivers.rigs import Rig

# ensure


async def test_ensure_runs_what_was_asked(rig: Rig):
    work = rig.work(generation=3, env={"A": "1"}, limits=Limits(memory_bytes=64 << 20, nano_cpus=500_000_000))
    seen = await rig.driver.ensure(work)
    assert (seen.sandbox_id, seen.power, seen.generation) == (work.sandbox_id, Power.RUNNING, 3)
    assert (seen.adopted, seen.exit) == (False, None)
    assert seen.name == f"sandbox-{work.sandbox_id}"
    assert seen.runtime_id
    assert seen.image_digest is not None
    assert seen.image_digest.startswith("sha256:")
    assert seen.created_at is not None
    assert seen.started_at is not None
    assert seen.created_at <= seen.started_at
    assert seen.started_at.utcoffset() == timedelta(0)
    assert await rig.driver.observe(work.sandbox_id) == seen


async def test_ensure_takes_three_calls(rig: Rig):
    await rig.driver.ensure(rig.work())
    del rig.calls["version"]  # the Docker client asks once for the API version
    assert rig.calls == {"create": 1, "start": 1, "inspect": 1}


async def test_ensure_twice_is_one_object(rig: Rig):
    work = rig.work()
    first = await rig.driver.ensure(work)
    second = await rig.another().ensure(work)
    assert second.runtime_id == first.runtime_id
    assert (first.adopted, second.adopted) == (False, True)
    assert second.started_at == first.started_at
    assert rig.calls["start"] == 1


async def test_two_servers_ensure_at_once(rig: Rig):
    work = rig.work()
    a, b = await asyncio.gather(rig.driver.ensure(work), rig.another().ensure(work))
    assert a.runtime_id == b.runtime_id
    assert {a.power, b.power} == {Power.RUNNING}
    assert sorted((a.adopted, b.adopted)) == [False, True]
    assert len(await inventory(rig.driver)) == 1


async def test_ensure_after_the_reply_to_create_got_lost(rig: Rig):
    work = rig.work()
    rig.lose_reply("create")
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.ensure(work)
    assert await power_of(rig.driver, work.sandbox_id) is Power.CREATED
    seen = await rig.driver.ensure(work)
    assert (seen.power, seen.adopted) == (Power.RUNNING, True)
    assert len(await inventory(rig.driver)) == 1


async def test_ensure_after_the_reply_to_start_got_lost(rig: Rig):
    work = rig.work()
    rig.lose_reply("start")
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.ensure(work)
    before = await rig.driver.observe(work.sandbox_id)
    seen = await rig.driver.ensure(work)
    assert (seen.power, seen.adopted) == (Power.RUNNING, True)
    assert before is not None
    assert seen.started_at == before.started_at
    assert rig.calls["start"] == 1


async def test_ensure_rejects_a_name_that_a_stranger_holds(rig: Rig):
    work = rig.work()
    await rig.stranger(f"sandbox-{work.sandbox_id}")
    with pytest.raises(RuntimeRejected) as caught:
        await rig.driver.ensure(work)
    assert caught.value.reason == "NAME_TAKEN"
    assert await rig.exists(f"sandbox-{work.sandbox_id}")
    assert rig.calls["start"] == 0


async def test_ensure_rejects_a_name_that_another_installation_holds(rig: Rig):
    work = rig.work()
    await rig.elsewhere().ensure(work)
    with pytest.raises(RuntimeRejected, match="NAME_TAKEN"):
        await rig.driver.ensure(work)


async def test_ensure_never_runs_a_second_time_what_has_ended(rig: Rig, eventually: Eventually):
    work = rig.ending(3)
    await rig.driver.ensure(work)
    ended = await exited(rig, work, eventually)
    again = await rig.driver.ensure(work)
    assert (again.power, again.exit, again.adopted) == (Power.EXITED, ended.exit, True)
    assert rig.calls["start"] == 1


async def test_ensure_leaves_paused_what_is_paused(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    await rig.driver.set_power(work.sandbox_id, Power.PAUSED)
    assert (await rig.driver.ensure(work)).power is Power.PAUSED


async def test_ensure_names_a_missing_image(rig: Rig):
    work = rig.work(image=rig.missing_image())
    with pytest.raises(RuntimeRejected) as caught:
        await rig.driver.ensure(work)
    assert caught.value.reason == "IMAGE_NOT_FOUND"
    assert rig.missing_image() in caught.value.message
    assert await rig.driver.observe(work.sandbox_id) is None


async def test_ensure_names_a_missing_program_and_leaves_nothing(rig: Rig):
    work = rig.work(entrypoint=("/missing/tool", "--now"))
    with pytest.raises(RuntimeRejected) as caught:
        await rig.driver.ensure(work)
    assert caught.value.reason == "ENTRYPOINT_NOT_FOUND"
    assert "/missing/tool" in caught.value.message
    assert await rig.driver.observe(work.sandbox_id) is None


@pytest.mark.parametrize("call", ["create", "start"])
async def test_a_cancelled_ensure_finishes_create_and_start_first(rig: Rig, call: str):
    work = rig.work()
    gate = rig.hold(call)
    task = asyncio.create_task(rig.driver.ensure(work))
    await gate.reached.wait()
    task.cancel()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await power_of(rig.driver, work.sandbox_id) is Power.RUNNING


async def test_an_ensure_that_pulls_is_cancelled_at_once(rig: Rig):
    work = rig.work(image=rig.image_to_pull())
    gate = rig.hold("pull")
    task = asyncio.create_task(rig.driver.ensure(work))
    await gate.reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await rig.driver.observe(work.sandbox_id) is None


async def test_what_is_removed_between_create_and_start_is_reported_as_trouble(rig: Rig):
    work = rig.work()
    gate = rig.hold("start")
    task = asyncio.create_task(rig.driver.ensure(work))
    await gate.reached.wait()
    await rig.another().remove(work.sandbox_id)
    gate.open()
    with pytest.raises(RuntimeUnavailable):
        await task
    assert await inventory(rig.driver) == []


# observe


async def test_observe_of_nothing_is_none(rig: Rig):
    assert await rig.driver.observe(uuid4()) is None


async def test_observe_does_not_see_strangers(rig: Rig):
    work = rig.work()
    await rig.elsewhere().ensure(work)
    assert await rig.driver.observe(work.sandbox_id) is None


@pytest.mark.parametrize("code", [0, 3])
async def test_an_exit_tells_its_code_and_time(rig: Rig, eventually: Eventually, code: int):
    work = rig.ending(code)
    await rig.driver.ensure(work)
    seen = await exited(rig, work, eventually)
    assert seen.exit is not None
    assert (seen.exit.code, seen.exit.oom) == (code, False)
    assert seen.exit.at is not None
    assert seen.started_at is not None
    assert seen.started_at <= seen.exit.at


async def test_running_out_of_memory_is_told(rig: Rig, eventually: Eventually):
    work = rig.greedy()
    await rig.driver.ensure(work)
    await rig.starve(work.sandbox_id)
    seen = await exited(rig, work, eventually)
    assert seen.exit is not None
    assert (seen.exit.code, seen.exit.oom) == (137, True)


# power


async def test_pause_and_resume_may_be_repeated(rig: Rig):
    work = rig.work()
    started = (await rig.driver.ensure(work)).started_at
    for power in (Power.RUNNING, Power.PAUSED, Power.PAUSED, Power.RUNNING, Power.RUNNING):
        seen = await rig.driver.set_power(work.sandbox_id, power)
        assert seen is not None
        assert (seen.power, seen.started_at) == (power, started)
        assert await power_of(rig.driver, work.sandbox_id) is power
    assert (rig.calls["pause"], rig.calls["unpause"]) == (1, 1)


@pytest.mark.parametrize("power", [Power.PAUSED, Power.RUNNING])
async def test_two_servers_set_one_power_at_once(rig: Rig, power: Power):
    work = rig.work()
    await rig.driver.ensure(work)
    if power is Power.RUNNING:
        await rig.driver.set_power(work.sandbox_id, Power.PAUSED)
    both = await asyncio.gather(*(driver.set_power(work.sandbox_id, power) for driver in (rig.driver, rig.another())))
    assert [seen and seen.power for seen in both] == [power, power]


@pytest.mark.parametrize("power", [Power.PAUSED, Power.RUNNING])
async def test_power_of_nothing_is_none(rig: Rig, power: Power):
    assert await rig.driver.set_power(uuid4(), power) is None


@pytest.mark.parametrize("power", [Power.PAUSED, Power.RUNNING])
async def test_what_has_ended_is_returned_as_it_is(rig: Rig, eventually: Eventually, power: Power):
    work = rig.ending(0)
    await rig.driver.ensure(work)
    ended = await exited(rig, work, eventually)
    assert await rig.driver.set_power(work.sandbox_id, power) == ended


async def test_a_stranger_is_not_paused(rig: Rig):
    work = rig.work()
    other = rig.elsewhere()
    await other.ensure(work)
    assert await rig.driver.set_power(work.sandbox_id, Power.PAUSED) is None
    assert await power_of(other, work.sandbox_id) is Power.RUNNING


# remove


async def test_remove_may_be_repeated(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    await rig.driver.remove(work.sandbox_id)
    assert not await rig.exists(f"sandbox-{work.sandbox_id}")
    await rig.driver.remove(work.sandbox_id)


async def test_two_servers_remove_at_once(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    await asyncio.gather(*(driver.remove(work.sandbox_id) for driver in (rig.driver, rig.another(), rig.another())))
    assert not await rig.exists(f"sandbox-{work.sandbox_id}")


async def test_remove_leaves_strangers_alone(rig: Rig):
    sandbox_id = uuid4()
    await rig.stranger(f"sandbox-{sandbox_id}")
    await rig.driver.remove(sandbox_id)
    assert await rig.exists(f"sandbox-{sandbox_id}")


async def test_remove_leaves_other_installations_alone(rig: Rig):
    work = rig.work()
    other = rig.elsewhere()
    await other.ensure(work)
    await rig.driver.remove(work.sandbox_id)
    assert await power_of(other, work.sandbox_id) is Power.RUNNING


async def test_what_is_paused_can_be_removed(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    await rig.driver.set_power(work.sandbox_id, Power.PAUSED)
    await rig.driver.remove(work.sandbox_id)
    assert await rig.driver.observe(work.sandbox_id) is None


async def test_ensure_after_remove_makes_a_new_object(rig: Rig):
    work = rig.work()
    first = await rig.driver.ensure(work)
    await rig.driver.remove(work.sandbox_id)
    second = await rig.driver.ensure(work)
    assert second.runtime_id != first.runtime_id
    assert not second.adopted
