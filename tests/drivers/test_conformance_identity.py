"""How every driver tells engines apart: by a mark that the first to come leaves there."""

from __future__ import annotations

import asyncio

from tests.drivers.rig import Rig


async def test_check_says_who_the_engine_is_and_leaves_nothing(rig: Rig):
    info = await rig.driver.check()
    assert info.kind == rig.driver.kind
    assert info.version
    assert info.api
    assert info.engine_id
    assert info.address
    assert info.capabilities == rig.driver.can
    assert info.capacity.cpu_nanos
    assert info.capacity.memory_bytes
    assert info.live_restore is not None
    assert info.mark is None
    assert (await rig.driver.check()).mark is None


async def test_prepare_leaves_a_mark_that_stays(rig: Rig):
    first = await rig.driver.prepare()
    assert first.mark
    assert await rig.driver.check() == first
    assert await rig.another().prepare() == first


async def test_whoever_comes_first_decides(rig: Rig):
    infos = await asyncio.gather(*(rig.another().prepare() for _ in range(8)))
    assert len({info.mark for info in infos}) == 1
    assert (await rig.driver.check()).mark == infos[0].mark


async def test_each_installation_has_a_mark_of_its_own(rig: Rig):
    other = rig.elsewhere()
    theirs = await other.prepare()
    assert (await rig.driver.check()).mark is None
    ours = await rig.driver.prepare()
    assert ours.mark != theirs.mark
    assert (await other.check()).mark == theirs.mark


async def test_a_mark_that_is_gone_is_absent_and_a_new_one_is_another(rig: Rig):
    """As when the engine was replaced or its data was emptied."""
    first = await rig.driver.prepare()
    await rig.forget_mark()
    assert (await rig.driver.check()).mark is None
    again = await rig.driver.prepare()
    assert again.mark not in (None, first.mark)


async def test_prepare_after_its_reply_got_lost(rig: Rig):
    rig.lose_reply("make_volume")
    try:
        await rig.driver.prepare()
    except Exception:
        left = (await rig.driver.check()).mark
        assert left
        assert (await rig.driver.prepare()).mark == left
    else:
        raise AssertionError("the reply was not lost")
