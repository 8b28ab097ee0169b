"""What every driver must do with images: fetch outside of `ensure`, one pull for all, with progress."""

from __future__ import annotations

import asyncio

import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import FetchedImage, Image, Power
from app.runtime.faults import AttemptFailed, ImageMissing
from tests.drivers.looks import Eventually, fetch, run
from tests.drivers.rig import Rig


def ignore(_: str) -> None:
    """Progress that nobody reads."""


async def test_a_fetch_brings_what_ensure_lacked(rig: Rig):
    work = rig.work(image=await rig.image_to_pull())
    assert await rig.driver.image(work.image.reference) is None
    with pytest.raises(ImageMissing):
        await rig.driver.ensure(work)
    fetched = await rig.driver.fetch(work.image, ignore)
    assert fetched.image_id.startswith("sha256:")
    assert fetched.image_digest is not None
    assert fetched.image_digest.startswith("sha256:")
    assert fetched.image_digest != fetched.image_id
    assert fetched.size_bytes
    assert await rig.driver.image(work.image.reference) == fetched
    seen = await rig.driver.ensure(work)
    assert seen.power is Power.RUNNING
    assert (seen.image_id, seen.image_digest) == (fetched.image_id, fetched.image_digest)


async def test_another_server_finds_the_digest_too(rig: Rig):
    work = rig.work(image=await rig.image_to_pull())
    fetched = await fetch(rig.driver, work.image.reference)
    seen = await rig.another().ensure(work)
    assert (seen.image_id, seen.image_digest) == (fetched.image_id, fetched.image_digest)


async def test_a_fetch_of_what_is_there_pulls_nothing(rig: Rig):
    reference = await rig.image_to_pull()
    first = await fetch(rig.driver, reference)
    assert await fetch(rig.another(), reference) == first
    assert rig.calls["pull"] == 1


async def test_many_fetches_of_one_image_are_one_pull_and_all_are_told(rig: Rig, eventually: Eventually):
    slow = await rig.slow_image()
    told: list[list[str]] = [[] for _ in range(20)]
    tasks = [asyncio.create_task(rig.driver.fetch(Image(slow.reference), heard.append)) for heard in told]
    await slow.reached()
    await eventually(lambda: all(told))
    assert all("of 1 layers" in text for heard in told for text in heard)
    slow.gate.set()
    assert len(set(await asyncio.gather(*tasks))) == 1
    assert rig.calls["pull"] == 1


async def test_who_joins_late_is_told_at_once(rig: Rig, eventually: Eventually):
    slow = await rig.slow_image()
    first: list[str] = []
    late: list[str] = []
    one = asyncio.create_task(rig.driver.fetch(Image(slow.reference), first.append))
    await slow.reached()
    await eventually(lambda: first)
    two = asyncio.create_task(rig.driver.fetch(Image(slow.reference), late.append))
    await eventually(lambda: late)
    assert late[0] in first
    slow.gate.set()
    await asyncio.gather(one, two)


async def test_one_that_is_cancelled_leaves_alone(rig: Rig):
    slow = await rig.slow_image()
    tasks = [asyncio.create_task(fetch(rig.driver, slow.reference)) for _ in range(3)]
    await slow.reached()
    tasks[0].cancel()  # the one that began the pull
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    slow.gate.set()
    one, two = await asyncio.gather(*tasks[1:])
    assert one == two
    assert isinstance(one, FetchedImage)
    assert rig.calls["pull"] == 1


async def test_a_pull_ends_with_the_last_who_waits_and_can_begin_anew(rig: Rig):
    slow = await rig.slow_image()
    tasks = [asyncio.create_task(fetch(rig.driver, slow.reference)) for _ in range(2)]
    await slow.reached()
    for task in tasks:
        task.cancel()
    assert [type(end) for end in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 2
    slow.gate.set()
    await fetch(rig.driver, slow.reference)
    assert rig.calls["pull"] == 2


async def test_a_closing_driver_ends_its_pulls(rig: Rig):
    slow, driver = await rig.slow_image(), rig.another()
    task = asyncio.create_task(fetch(driver, slow.reference))
    await slow.reached()
    await driver.close()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await rig.driver.image(slow.reference) is None


async def test_an_image_that_no_registry_has(rig: Rig):
    reference = await rig.missing_image()
    with pytest.raises(ImageMissing):
        await rig.driver.ensure(rig.work(image=reference))
    ends = await asyncio.gather(*(fetch(rig.driver, reference) for _ in range(5)), return_exceptions=True)
    assert [type(end) for end in ends] == [RuntimeRejected] * 5
    assert {getattr(end, "reason", "") for end in ends} == {"IMAGE_NOT_FOUND"}
    assert len({id(end) for end in ends}) == 5, "each has an error of its own"
    assert reference in str(ends[0])


async def test_a_pull_that_is_refused_may_be_tried_again(rig: Rig):
    reference = await rig.image_to_pull()
    rig.decline("pull")
    with pytest.raises(AttemptFailed, match="refused by the test"):
        await fetch(rig.driver, reference)
    rig.relent()
    await fetch(rig.driver, reference)


async def test_an_engine_that_goes_away_in_a_pull_is_unavailable(rig: Rig):
    slow = await rig.slow_image()
    task = asyncio.create_task(fetch(rig.driver, slow.reference))
    await slow.reached()
    await rig.down()
    slow.gate.set()
    with pytest.raises(RuntimeUnavailable):
        await task
    await rig.up()
    assert (await run(rig.driver, rig.work(image=slow.reference))).power is Power.RUNNING


async def test_ensure_does_not_wait_for_a_pull_of_its_image(rig: Rig):
    slow = await rig.slow_image()
    task = asyncio.create_task(fetch(rig.driver, slow.reference))
    await slow.reached()
    with pytest.raises(ImageMissing):
        await rig.driver.ensure(rig.work(image=slow.reference))
    slow.gate.set()
    await task
