"""What every driver must do with one sandbox, on the fake and on a real Docker engine."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import uuid4

import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import Limits, Part, Power, Ref
from app.runtime.faults import AttemptFailed, ImageMissing
from tests.drivers.looks import Eventually, exited, id_of, inventory, power_of
from tests.drivers.rig import Rig

# ensure


async def test_ensure_runs_what_was_asked(rig: Rig):
    work = rig.work(
        generation=3, position=41, env={"A": "1"}, limits=Limits(memory_bytes=64 << 20, cpu_nanos=500_000_000)
    )
    seen = await rig.driver.ensure(work)
    assert (seen.object_id, seen.power) == (work.ref.object_id, Power.RUNNING)
    assert (seen.generation, seen.position) == (3, 41)
    assert (seen.adopted, seen.exit) == (False, None)
    assert seen.parts == (Part("main", id_of(seen), f"sandbox-{work.ref.object_id}"),)
    assert id_of(seen)
    assert seen.image_id is not None
    assert seen.image_id.startswith("sha256:")
    assert (seen.waiting, seen.verdict) == (None, None)
    assert seen.created_at is not None
    assert seen.started_at is not None
    assert seen.created_at <= seen.started_at
    assert seen.started_at.utcoffset() == timedelta(0)
    assert await rig.driver.observe(work.ref) == seen


async def test_ensure_takes_three_calls(rig: Rig):
    await rig.driver.ensure(rig.work())
    del rig.calls["version"]  # the Docker client asks once for the API version
    assert rig.calls == {"create": 1, "start": 1, "inspect": 1, "image": 1}, "an image's digest is asked for once"
    await rig.driver.ensure(rig.work())
    assert rig.calls == {"create": 2, "start": 2, "inspect": 2, "image": 1}


async def test_ensure_twice_is_one_object(rig: Rig):
    work = rig.work()
    first = await rig.driver.ensure(work)
    second = await rig.another().ensure(work)
    assert id_of(second) == id_of(first)
    assert (first.adopted, second.adopted) == (False, True)
    assert second.started_at == first.started_at
    assert rig.calls["start"] == 1


async def test_two_servers_ensure_at_once(rig: Rig):
    work = rig.work()
    a, b = await asyncio.gather(rig.driver.ensure(work), rig.another().ensure(work))
    assert id_of(a) == id_of(b)
    assert {a.power, b.power} == {Power.RUNNING}
    assert sorted((a.adopted, b.adopted)) == [False, True]
    assert len(await inventory(rig.driver)) == 1


async def test_ensure_after_the_reply_to_create_got_lost(rig: Rig):
    work = rig.work()
    rig.lose_reply("create")
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.ensure(work)
    assert await power_of(rig.driver, work.ref) is Power.CREATED
    seen = await rig.driver.ensure(work)
    assert (seen.power, seen.adopted) == (Power.RUNNING, True)
    assert len(await inventory(rig.driver)) == 1


async def test_ensure_after_the_reply_to_start_got_lost(rig: Rig):
    work = rig.work()
    rig.lose_reply("start")
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.ensure(work)
    before = await rig.driver.observe(work.ref)
    seen = await rig.driver.ensure(work)
    assert (seen.power, seen.adopted) == (Power.RUNNING, True)
    assert before is not None
    assert seen.started_at == before.started_at
    assert rig.calls["start"] == 1


async def test_ensure_rejects_a_name_that_a_stranger_holds(rig: Rig):
    work = rig.work()
    await rig.stranger(f"sandbox-{work.ref.object_id}")
    with pytest.raises(RuntimeRejected) as caught:
        await rig.driver.ensure(work)
    assert caught.value.reason == "NAME_TAKEN"
    assert await rig.exists(f"sandbox-{work.ref.object_id}")
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
    await rig.driver.set_power(work.ref, Power.PAUSED)
    assert (await rig.driver.ensure(work)).power is Power.PAUSED


async def test_ensure_does_not_pull_and_says_what_is_missing(rig: Rig):
    work = rig.work(image=await rig.image_to_pull())
    with pytest.raises(ImageMissing) as caught:
        await rig.driver.ensure(work)
    assert caught.value.reference == work.image.reference
    assert work.image.reference in str(caught.value)
    assert rig.calls["pull"] == 0
    assert await rig.driver.observe(work.ref) is None


async def test_ensure_names_a_missing_program_and_leaves_nothing(rig: Rig):
    work = rig.work(entrypoint=("/missing/tool", "--now"))
    with pytest.raises(RuntimeRejected) as caught:
        await rig.driver.ensure(work)
    assert caught.value.reason == "ENTRYPOINT_NOT_FOUND"
    assert "/missing/tool" in caught.value.message
    assert await rig.driver.observe(work.ref) is None


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
    assert await power_of(rig.driver, work.ref) is Power.RUNNING


async def test_what_is_removed_between_create_and_start_is_reported_as_trouble(rig: Rig):
    work = rig.work()
    gate = rig.hold("start")
    task = asyncio.create_task(rig.driver.ensure(work))
    await gate.reached.wait()
    await rig.another().remove(work.ref)
    gate.open()
    with pytest.raises(AttemptFailed, match="START_FAILED"):  # the engine is well: other sandboxes do not wait
        await task
    assert await inventory(rig.driver) == []


# observe


async def test_observe_of_nothing_is_none(rig: Rig):
    assert await rig.driver.observe(Ref(uuid4())) is None


async def test_observe_does_not_see_strangers(rig: Rig):
    work = rig.work()
    await rig.elsewhere().ensure(work)
    assert await rig.driver.observe(work.ref) is None


@pytest.mark.parametrize("asked", [Limits(), Limits(gpus=2), Limits(gpus_all=True)])
async def test_an_object_tells_how_many_gpus_it_has(rig: Rig, asked: Limits):
    """It is created and not started: no machine that runs this needs a GPU."""
    work = rig.work(limits=asked)
    rig.refuse("start")
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.ensure(work)
    seen = await rig.driver.observe(work.ref)
    assert seen is not None
    assert (seen.power, seen.gpus) == (Power.CREATED, rig.all_gpus if asked.gpus_all else asked.gpus)
    assert [row.gpus for row in await inventory(rig.driver)] == [None], "a listing does not say"


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
    await rig.starve(work.ref.object_id)
    seen = await exited(rig, work, eventually)
    assert seen.exit is not None
    assert (seen.exit.code, seen.exit.oom) == (137, True)


async def test_a_running_object_has_an_address_and_an_exited_one_has_none(rig: Rig, eventually: Eventually):
    work = rig.work()
    seen = await rig.driver.ensure(work)
    assert seen.address is not None
    assert seen.address.network
    assert seen.address.ip
    paused = await rig.driver.set_power(work.ref, Power.PAUSED)
    assert paused is not None
    assert paused.address == seen.address
    await rig.driver.set_power(work.ref, Power.RUNNING)
    await rig.kill(work.ref.object_id)
    assert (await exited(rig, work, eventually)).address is None


async def test_a_restart_from_outside_moves_the_start(rig: Rig):
    work = rig.work()
    first = await rig.driver.ensure(work)
    await rig.restart(work.ref.object_id)
    second = await rig.driver.observe(work.ref)
    assert second is not None
    assert (id_of(second), second.power) == (id_of(first), Power.RUNNING)
    assert first.started_at is not None
    assert second.started_at is not None
    assert second.started_at > first.started_at


# power


async def test_pause_and_resume_may_be_repeated(rig: Rig):
    work = rig.work()
    started = (await rig.driver.ensure(work)).started_at
    for power in (Power.RUNNING, Power.PAUSED, Power.PAUSED, Power.RUNNING, Power.RUNNING):
        seen = await rig.driver.set_power(work.ref, power)
        assert seen is not None
        assert (seen.power, seen.started_at) == (power, started)
        assert await power_of(rig.driver, work.ref) is power
    assert (rig.calls["pause"], rig.calls["unpause"]) == (1, 1)


@pytest.mark.parametrize("power", [Power.PAUSED, Power.RUNNING])
async def test_two_servers_set_one_power_at_once(rig: Rig, power: Power):
    work = rig.work()
    await rig.driver.ensure(work)
    if power is Power.RUNNING:
        await rig.driver.set_power(work.ref, Power.PAUSED)
    both = await asyncio.gather(*(driver.set_power(work.ref, power) for driver in (rig.driver, rig.another())))
    assert [seen and seen.power for seen in both] == [power, power]


@pytest.mark.parametrize("power", [Power.PAUSED, Power.RUNNING])
async def test_power_of_nothing_is_none(rig: Rig, power: Power):
    assert await rig.driver.set_power(Ref(uuid4()), power) is None


@pytest.mark.parametrize("power", [Power.PAUSED, Power.RUNNING])
async def test_what_has_ended_is_returned_as_it_is(rig: Rig, eventually: Eventually, power: Power):
    work = rig.ending(0)
    await rig.driver.ensure(work)
    ended = await exited(rig, work, eventually)
    assert await rig.driver.set_power(work.ref, power) == ended


async def test_a_stranger_is_not_paused(rig: Rig):
    work = rig.work()
    other = rig.elsewhere()
    await other.ensure(work)
    assert await rig.driver.set_power(work.ref, Power.PAUSED) is None
    assert await power_of(other, work.ref) is Power.RUNNING


# remove


async def test_remove_may_be_repeated(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    assert await rig.driver.remove(work.ref) is True
    assert not await rig.exists(f"sandbox-{work.ref.object_id}")
    assert await rig.driver.remove(work.ref) is True


async def test_two_servers_remove_at_once(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    drivers = rig.driver, rig.another(), rig.another()
    while not all(await asyncio.gather(*(driver.remove(work.ref) for driver in drivers))):
        pass  # False: another's removal is under way
    assert not await rig.exists(f"sandbox-{work.ref.object_id}")


async def test_remove_leaves_strangers_alone(rig: Rig):
    object_id = uuid4()
    await rig.stranger(f"sandbox-{object_id}")
    assert await rig.driver.remove(Ref(object_id)) is True
    assert await rig.exists(f"sandbox-{object_id}")


async def test_remove_leaves_other_installations_alone(rig: Rig):
    work = rig.work()
    other = rig.elsewhere()
    await other.ensure(work)
    assert await rig.driver.remove(work.ref) is True
    assert await power_of(other, work.ref) is Power.RUNNING


async def test_what_is_paused_can_be_removed(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    await rig.driver.set_power(work.ref, Power.PAUSED)
    await rig.driver.remove(work.ref)
    assert await rig.driver.observe(work.ref) is None


async def test_ensure_after_remove_makes_a_new_object(rig: Rig):
    work = rig.work()
    first = await rig.driver.ensure(work)
    await rig.driver.remove(work.ref)
    second = await rig.driver.ensure(work)
    assert id_of(second) != id_of(first)
    assert not second.adopted
