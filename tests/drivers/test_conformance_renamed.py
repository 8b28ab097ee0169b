"""A person may rename a container of ours (`docker rename`). The id that the log knows still finds it."""

from __future__ import annotations

from uuid import uuid4

import msgspec
import pytest

from app.domain.sandbox.observed import Ref
from app.runtime.driver import Misnamed, Observed, Power, Workload
from tests.drivers.looks import Eventually, exited, heard, id_of, inventory, power_of
from tests.drivers.rig import Rig
from tests.drivers.rigs import DockerRig


def known(work: Workload, seen: Observed) -> Workload:
    """The workload once the log knows the engine's id of its container."""
    return msgspec.structs.replace(work, ref=Ref(work.ref.object_id, runtime_id=id_of(seen)))


async def renamed(rig: Rig) -> tuple[Workload, Observed, str]:
    work, name = rig.work(), f"renamed-{uuid4().hex[:8]}"
    seen = await rig.driver.ensure(work)
    await rig.rename(work.ref.object_id, name)
    return known(work, seen), seen, name


async def test_it_is_observed_and_paused_by_its_id(rig: Rig):
    work, seen, name = await renamed(rig)
    assert await rig.driver.observe(Ref(work.ref.object_id)) is None, "nothing but the id leads to it"
    found = await rig.driver.observe(work.ref)
    assert found is not None
    assert (id_of(found), found.power, found.started_at) == (id_of(seen), Power.RUNNING, seen.started_at)
    assert found.main is not None
    assert found.main.name == name
    paused = await rig.driver.set_power(work.ref, Power.PAUSED)
    assert paused is not None
    assert paused.power is Power.PAUSED
    await rig.driver.set_power(work.ref, Power.RUNNING)
    assert await power_of(rig.driver, work.ref) is Power.RUNNING
    await rig.driver.remove(work.ref)


async def test_it_is_removed(rig: Rig):
    work, _, name = await renamed(rig)
    assert await rig.driver.remove(Ref(work.ref.object_id)) is True
    assert await rig.exists(name), "without the id it is out of reach"
    assert await rig.driver.remove(work.ref) is True
    assert not await rig.exists(name)
    assert await rig.driver.remove(work.ref) is True


async def test_ensure_adopts_it_and_makes_no_second_one(rig: Rig):
    work, seen, name = await renamed(rig)
    again = await rig.driver.ensure(work)
    assert (id_of(again), again.adopted) == (id_of(seen), True)
    assert not await rig.exists(f"sandbox-{work.ref.object_id}")
    await rig.driver.remove(work.ref)
    assert not await rig.exists(name)


async def test_where_two_are_there_both_are_removed(rig: Rig):
    """The name was free again, and a server that did not know the id yet made another one."""
    work, seen, name = await renamed(rig)
    second = await rig.driver.ensure(msgspec.structs.replace(work, ref=Ref(work.ref.object_id)))
    assert id_of(second) != id_of(seen)
    assert await rig.driver.remove(work.ref) is True
    assert not await rig.exists(name)
    assert not await rig.exists(f"sandbox-{work.ref.object_id}")


async def test_a_copy_under_its_name_is_not_taken_for_it(rig: Rig):
    """A pause of the copy, or its removal alone, would leave the real one running with nobody knowing."""
    work, seen, name = await renamed(rig)
    copy = await rig.driver.ensure(msgspec.structs.replace(work, ref=Ref(work.ref.object_id)))
    found = await rig.driver.observe(work.ref)
    assert found is not None
    assert id_of(found) == id_of(seen)
    await rig.driver.set_power(work.ref, Power.PAUSED)
    by_name = await rig.driver.observe(Ref(work.ref.object_id))
    assert by_name is not None
    assert (id_of(by_name), by_name.power) == (id_of(copy), Power.RUNNING)
    assert await rig.driver.remove(work.ref) is True
    assert not await rig.exists(name)


async def test_its_end_is_heard(rig: Rig, eventually: Eventually):
    work, _, _ = await renamed(rig)
    async with heard(rig, eventually) as ids:
        await rig.end_by_id(work.ref)
        await eventually(lambda: work.ref.object_id in ids)
    await exited(rig, work, eventually)
    await rig.driver.remove(work.ref)


async def test_an_id_of_another_installation_or_object_is_a_strangers(rig: Rig):
    theirs, ours = rig.work(), rig.work()
    other = rig.elsewhere()
    foreign = await other.ensure(theirs)
    mine = await rig.driver.ensure(ours)
    for object_id, runtime_id in ((theirs.ref.object_id, id_of(foreign)), (uuid4(), id_of(mine))):
        ref = Ref(object_id, runtime_id=runtime_id)
        assert await rig.driver.observe(ref) is None
        assert await rig.driver.remove(ref) is True
    assert await power_of(other, theirs.ref) is Power.RUNNING
    assert await power_of(rig.driver, ours.ref) is Power.RUNNING


async def test_the_inventory_shows_it_apart(rig: Rig):
    """A listing cannot tell it from a copy. Who knows its id can."""
    work, seen, name = await renamed(rig)
    assert await inventory(rig.driver) == []
    (found,) = [one async for one in rig.driver.inventory()]
    assert isinstance(found, Misnamed)
    assert (found.observed.object_id, id_of(found.observed)) == (work.ref.object_id, id_of(seen))
    assert found.observed.main is not None
    assert (found.observed.main.name, found.observed.power) == (name, Power.RUNNING)
    assert [one async for one in rig.elsewhere().inventory()] == []
    await rig.driver.remove(work.ref)


@pytest.mark.engine
async def test_a_stranger_that_is_called_like_the_id_is_left_alone(docker_rig: DockerRig):
    """The engine takes names where it takes ids."""
    work = docker_rig.work()
    seen = await docker_rig.driver.ensure(work)
    await docker_rig.driver.remove(work.ref)
    await docker_rig.stranger(id_of(seen))
    ref = Ref(work.ref.object_id, runtime_id=id_of(seen))
    assert await docker_rig.driver.observe(ref) is None
    assert await docker_rig.driver.remove(ref) is True
    assert await docker_rig.exists(id_of(seen))
