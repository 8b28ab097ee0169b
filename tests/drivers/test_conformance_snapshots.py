"""What every driver must do with the images of snapshots."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import Artifact, Power, Ref, Workload
from app.runtime.faults import AttemptFailed
from tests.drivers.looks import power_of
from tests.drivers.rig import Rig

MADE_AT = datetime(2026, 1, 31, 12, 30, 15, 123456, tzinfo=UTC)
ABSENT = f"sha256:{'0' * 64}"


def artifact(**changes: Any) -> Artifact:
    return Artifact(changes.get("snapshot_id") or uuid4(), "default", 7, MADE_AT)


async def frozen(rig: Rig) -> tuple[Workload, str]:
    """An object that stands still, and the id of the image that it was made from."""
    work = rig.work()
    made = await rig.driver.ensure(work)
    assert made.image_id is not None
    await rig.driver.set_power(work.ref, Power.PAUSED)
    return work, made.image_id


async def test_a_commit_is_an_image_that_is_not_for_use(rig: Rig):
    work, _ = await frozen(rig)
    one = artifact()
    made = await rig.driver.commit(work.ref, one)
    assert await power_of(rig.driver, work.ref) is Power.PAUSED, "a commit neither pauses nor resumes"
    (image,) = await rig.driver.snapshot_images(one.snapshot_id)
    assert (image.snapshot_id, image.image_id, image.raw, image.position) == (one.snapshot_id, made.image_id, True, 7)
    again = await rig.another().commit(work.ref, one)
    assert (again.layer, again.image_id != made.image_id) == (made.layer, True)
    found = await rig.driver.snapshot_images(one.snapshot_id)
    assert {each.image_id for each in found} == {made.image_id, again.image_id}, "also the one that lost its name"


async def test_what_is_cleaned_is_the_same_however_often(rig: Rig):
    work, source = await frozen(rig)
    one = artifact()
    first = await rig.driver.commit(work.ref, one)
    clean = await rig.driver.clean(one, first.image_id, source)
    second = await rig.driver.commit(work.ref, one)
    assert (await rig.another().clean(one, second.image_id, source)).image_id == clean.image_id
    for raw in (first, second):
        await rig.driver.drop_image(raw.image_id)
    (image,) = await rig.driver.snapshot_images()
    assert (image.image_id, image.raw) == (clean.image_id, False)
    other = artifact()
    third = await rig.driver.commit(work.ref, other)
    assert (await rig.driver.clean(other, third.image_id, source)).image_id != clean.image_id


async def test_an_object_is_made_from_it_and_keeps_it_there(rig: Rig):
    work, source = await frozen(rig)
    one = artifact()
    raw = await rig.driver.commit(work.ref, one)
    clean = await rig.driver.clean(one, raw.image_id, source)
    await rig.driver.drop_image(raw.image_id)
    await rig.driver.remove(work.ref)
    copy = rig.work(image=clean.image_id)
    made = await rig.driver.ensure(copy)
    assert (made.power, made.image_id) == (Power.RUNNING, clean.image_id)
    with pytest.raises(AttemptFailed, match="IMAGE_IN_USE"):
        await rig.driver.drop_image(clean.image_id)
    assert await power_of(rig.driver, copy.ref) is Power.RUNNING
    await rig.driver.remove(copy.ref)
    # The first attempt may have taken the name away; the labels are enough to find it.
    assert [image.image_id for image in await rig.driver.snapshot_images()] == [clean.image_id]
    await rig.driver.drop_image(clean.image_id)
    await rig.driver.drop_image(clean.image_id)
    assert await rig.driver.snapshot_images() == []
    assert await rig.driver.image(clean.image_id) is None


async def test_what_is_absent_is_named(rig: Rig):
    with pytest.raises(AttemptFailed, match="COMMIT_FAILED"):
        await rig.driver.commit(Ref(uuid4()), artifact())
    work, source = await frozen(rig)
    one = artifact()
    with pytest.raises(RuntimeRejected, match="SNAPSHOT_IMAGE_MISSING"):
        await rig.driver.clean(one, ABSENT, source)
    raw = await rig.driver.commit(work.ref, one)
    with pytest.raises(RuntimeRejected, match="SNAPSHOT_IMAGE_MISSING"):
        await rig.driver.clean(one, raw.image_id, ABSENT)
    await rig.driver.drop_image(ABSENT)


async def test_images_of_another_installation_are_not_shown(rig: Rig):
    work, _ = await frozen(rig)
    one = artifact()
    await rig.driver.commit(work.ref, one)
    stranger = rig.elsewhere()
    assert await stranger.snapshot_images() == []
    assert await stranger.snapshot_images(one.snapshot_id) == []


@pytest.mark.parametrize("call", ["commit", "load"])
async def test_a_lost_reply_is_made_up_for_by_the_next_call(rig: Rig, call: str):
    work, source = await frozen(rig)
    one = artifact()

    async def make() -> None:
        raw = await rig.driver.commit(work.ref, one)
        await rig.driver.clean(one, raw.image_id, source)

    rig.lose_reply(call)
    with pytest.raises(RuntimeUnavailable):
        await make()
    raw = await rig.driver.commit(work.ref, one)
    clean = await rig.driver.clean(one, raw.image_id, source)
    for image in await rig.driver.snapshot_images(one.snapshot_id):
        if image.raw:
            await rig.driver.drop_image(image.image_id)
    (image,) = await rig.driver.snapshot_images()
    assert image.image_id == clean.image_id


@pytest.mark.parametrize("call", ["images", "drop_image"])
async def test_an_engine_in_trouble_is_no_answer(rig: Rig, call: str):
    work, _ = await frozen(rig)
    one = artifact()
    raw = await rig.driver.commit(work.ref, one)
    rig.refuse(call)
    with pytest.raises(RuntimeUnavailable):
        await (rig.driver.snapshot_images() if call == "images" else rig.driver.drop_image(raw.image_id))
