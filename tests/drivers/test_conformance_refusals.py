"""An engine that answers and does not do it: trouble of this one object, never of the engine."""

from __future__ import annotations

import pytest

from app.errors import RuntimeUnavailable
from app.runtime.driver import Power
from app.runtime.faults import AttemptFailed
from tests.drivers.looks import Eventually, exited, leftovers, power_of
from tests.drivers.rig import Rig


@pytest.mark.parametrize(
    ("call", "power", "reason"),
    [("pause", Power.PAUSED, "PAUSE_REFUSED"), ("unpause", Power.RUNNING, "RESUME_REFUSED")],
)
async def test_a_power_that_is_refused(rig: Rig, call: str, power: Power, reason: str):
    work = rig.work()
    await rig.driver.ensure(work)
    if power is Power.RUNNING:
        await rig.driver.set_power(work.ref, Power.PAUSED)
    before = await rig.driver.observe(work.ref)
    rig.decline(call)
    with pytest.raises(AttemptFailed) as caught:
        await rig.driver.set_power(work.ref, power)
    assert caught.value.reason == reason
    assert "refused by the test" in caught.value.message
    assert await rig.driver.observe(work.ref) == before
    rig.relent()
    seen = await rig.driver.set_power(work.ref, power)
    assert seen is not None
    assert seen.power is power


async def test_a_pause_that_is_refused_because_the_workload_has_ended_is_no_fault(rig: Rig, eventually: Eventually):
    work = rig.ending(0)
    await rig.driver.ensure(work)
    ended = await exited(rig, work, eventually)
    rig.decline("pause")
    assert await rig.driver.set_power(work.ref, Power.PAUSED) == ended


async def test_a_remove_that_is_refused(rig: Rig):
    work = rig.work()
    await rig.driver.ensure(work)
    rig.decline("remove")
    with pytest.raises(AttemptFailed, match=r"REMOVE_REFUSED.*refused by the test"):
        await rig.driver.remove(work.ref)
    assert await power_of(rig.driver, work.ref) is Power.RUNNING
    rig.relent()
    assert await rig.driver.remove(work.ref) is True


async def test_a_leftover_whose_removal_is_refused(rig: Rig):
    await rig.leftover()
    [found] = await leftovers(rig.driver)
    rig.decline("remove")
    with pytest.raises(AttemptFailed, match="REMOVE_REFUSED"):
        await rig.driver.remove_leftover(found)
    assert await leftovers(rig.driver) == [found]


@pytest.mark.parametrize("call", ["create", "start"])
async def test_a_create_or_start_that_is_refused_may_be_tried_again(rig: Rig, call: str):
    work = rig.work()
    rig.decline(call)
    with pytest.raises(AttemptFailed, match=r"START_FAILED.*refused by the test"):
        await rig.driver.ensure(work)
    assert await rig.driver.observe(work.ref) is None, "the next attempt begins anew"
    rig.relent()
    assert (await rig.driver.ensure(work)).power is Power.RUNNING


async def test_the_words_about_a_start_count_also_where_its_container_cannot_be_removed(rig: Rig):
    work = rig.work(entrypoint=("/missing/tool",))
    rig.decline("remove")
    with pytest.raises(Exception, match="ENTRYPOINT_NOT_FOUND"):
        await rig.driver.ensure(work)


@pytest.mark.parametrize("call", ["pause", "remove"])
async def test_an_engine_in_trouble_is_told_apart(rig: Rig, call: str):
    work = rig.work()
    await rig.driver.ensure(work)
    rig.refuse(call)
    with pytest.raises(RuntimeUnavailable):
        await (rig.driver.remove(work.ref) if call == "remove" else rig.driver.set_power(work.ref, Power.PAUSED))
    assert await power_of(rig.driver, work.ref) is Power.RUNNING
