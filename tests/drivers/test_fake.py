"""What the fake offers beyond the protocol: trouble on demand, and several servers on one engine."""

from __future__ import annotations

from uuid import uuid4

import pytest

from app.domain.sandbox.observed import Waiting
from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import Image, Power
from app.runtime.fake import FakeDriver, FakeEngine, Pull
from app.runtime.faults import AttemptFailed
from tests.drivers.looks import inventory, power_of
from tests.drivers.rig import workload


class Crash(BaseException):
    """The process is gone."""


async def test_a_crash_between_create_and_start_is_mended_by_another_server():
    engine, installation, work = FakeEngine(), uuid4(), workload()

    async def die(call: str) -> None:
        if call == "start":
            raise Crash

    with pytest.raises(Crash):
        await FakeDriver(engine, installation, before=die).ensure(work)
    found = engine.of(work.ref.object_id)
    assert found is not None
    assert found.power is Power.CREATED
    seen = await FakeDriver(engine, installation).ensure(work)
    assert (seen.power, seen.adopted) == (Power.RUNNING, True)


async def test_an_engine_that_lists_nothing_still_shows_each():
    engine, work = FakeEngine(), workload()
    driver = FakeDriver(engine, uuid4())
    await driver.ensure(work)
    engine.empty_listing = True
    assert [seen async for seen in driver.inventory()] == []
    assert await driver.observe(work.ref) is not None


async def test_an_exit_on_demand():
    engine, work = FakeEngine(), workload()
    driver = FakeDriver(engine, uuid4())
    await driver.ensure(work)
    engine.exit(work.ref.object_id, 3, message="enough")
    seen = await driver.observe(work.ref)
    assert seen is not None
    assert seen.exit is not None
    assert (seen.power, seen.exit.code, seen.exit.message) == (Power.EXITED, 3, "enough")


async def test_down_is_down_until_it_is_not():
    engine, work = FakeEngine(), workload()
    driver = FakeDriver(engine, uuid4())
    engine.down = True
    with pytest.raises(RuntimeUnavailable):
        await driver.ensure(work)
    engine.down = False
    assert (await driver.ensure(work)).power is Power.RUNNING


async def test_another_engine_at_the_same_address():
    engine, work = FakeEngine(), workload()
    driver = FakeDriver(engine, uuid4())
    before = await driver.prepare()
    await driver.ensure(work)
    engine.become_another()
    after = await driver.check()
    assert after.mark is None
    assert after.engine_id != before.engine_id
    assert await driver.observe(work.ref) is None
    assert await inventory(driver) == []


async def test_a_power_loss_ends_all_and_may_forget_the_young():
    engine, old, young, ended = FakeEngine(), workload(), workload(), workload()
    driver = FakeDriver(engine, uuid4())
    for work in (old, young, ended):
        await driver.ensure(work)
    engine.exit(ended.ref.object_id, 3)
    engine.lose_power(forgetting={young.ref.object_id})
    seen = {one.object_id: one for one in [await driver.observe(work.ref) for work in (old, young, ended)] if one}
    assert (seen[old.ref.object_id].power, seen[young.ref.object_id].power) == (Power.EXITED, Power.CREATED)
    ends = [seen[work.ref.object_id].exit for work in (old, ended)]
    assert [end and end.code for end in ends] == [137, 3]
    assert seen[young.ref.object_id].started_at is None
    assert (await driver.ensure(young)).power is Power.RUNNING


async def test_a_removal_that_takes_time():
    engine, work = FakeEngine(), workload()
    driver = FakeDriver(engine, uuid4())
    await driver.ensure(work)
    engine.slow_removals = True
    assert await driver.remove(work.ref) is False
    assert await driver.remove(work.ref) is False
    assert engine.calls["remove"] == 1
    assert await power_of(driver, work.ref) is Power.EXITED
    with pytest.raises(AttemptFailed, match="is being removed"):
        await driver.ensure(work)
    engine.finish_removals()
    assert await driver.remove(work.ref) is True


async def test_an_object_that_waits():
    engine, work = FakeEngine(), workload()
    driver = FakeDriver(engine, uuid4())
    why = Waiting("ensure", "POD_UNSCHEDULABLE", "0 of 3 nodes have room")
    engine.waiting[work.ref.object_id] = why
    for _ in range(2):
        seen = await driver.ensure(work)
        assert (seen.power, seen.waiting) == (Power.CREATED, why)
    assert engine.calls["create"] == 2
    engine.settle(work.ref.object_id)
    settled = await driver.observe(work.ref)
    assert settled is not None
    assert (settled.power, settled.waiting) == (Power.RUNNING, None)


async def test_a_scripted_pull():
    engine = FakeEngine()
    driver, told = FakeDriver(engine, uuid4()), list[str]()
    engine.to_pull |= {"good:1", "bad:1"}
    engine.pulls["good:1"] = Pull(("0 of 2 layers", "1 of 2 layers"))
    engine.pulls["bad:1"] = Pull(fault=RuntimeRejected("IMAGE_AUTH_REQUIRED", "who are you"))
    await driver.fetch(Image("good:1"), told.append)
    assert told == ["0 of 2 layers", "1 of 2 layers"]
    with pytest.raises(RuntimeRejected, match="IMAGE_AUTH_REQUIRED"):
        await driver.fetch(Image("bad:1"), told.append)
    assert engine.to_pull == {"bad:1"}


async def test_a_refusal_is_a_new_error_each_time():
    engine, work = FakeEngine(), workload()
    driver = FakeDriver(engine, uuid4())
    engine.refusals["create"] = RuntimeUnavailable("busy", retry_after=3)
    caught: list[RuntimeUnavailable] = []
    for _ in range(2):
        with pytest.raises(RuntimeUnavailable) as error:
            await driver.ensure(work)
        caught.append(error.value)
    assert caught[0] is not caught[1]
    assert [error.retry_after for error in caught] == [3, 3]
