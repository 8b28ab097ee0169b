"""What the fake offers beyond the protocol: trouble on demand, and several servers on one engine."""

from __future__ import annotations

from uuid import uuid4

import pytest

from app.errors import RuntimeUnavailable
from app.runtime.driver import Power
from app.runtime.fake import FakeDriver, FakeEngine
from tests.drivers.rigs import workload


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
