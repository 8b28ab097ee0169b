"""Pulls by a real engine from a registry that misbehaves: typed causes, one pull for all, no secret anywhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import Power, RegistryAuth
from app.runtime.faults import ImagePullFailed
from tests.drivers.registry import FOREIGN, NATIVE, Fault, Registry
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine
PASSWORD = "correct horse battery staple"
RIGHT = RegistryAuth("reader", PASSWORD)
WRONG = RegistryAuth("reader", "wrong horse battery staple")


async def fault_of(rig: DockerRig, image: str, **changes: Any) -> RuntimeRejected | ImagePullFailed:
    work = rig.work(image=image, **changes)
    with pytest.raises((RuntimeRejected, ImagePullFailed)) as caught:
        await rig.driver.ensure(work)
    assert await rig.driver.observe(work.ref) is None
    return caught.value


async def test_a_missing_image_is_pulled_once_and_kept(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    assert (await docker_rig.driver.ensure(docker_rig.work(image=image))).power is Power.RUNNING
    before = registry.counts.copy()
    assert (await docker_rig.driver.ensure(docker_rig.work(image=image))).power is Power.RUNNING
    assert registry.counts == before
    assert docker_rig.calls["pull"] == 1


async def test_twenty_ensures_of_one_missing_image_are_one_pull(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    seen = await asyncio.gather(*(docker_rig.driver.ensure(docker_rig.work(image=image)) for _ in range(20)))
    assert {one.power for one in seen} == {Power.RUNNING}
    assert len({id_of(one) for one in seen}) == 20
    assert docker_rig.calls["pull"] == 1
    assert (registry.counts["manifest"], registry.counts["blob"]) == (1, 2)  # one layer, one configuration


async def test_a_waiter_that_is_cancelled_leaves_alone(
    docker_rig: DockerRig, registry: Registry, eventually: Callable[[Callable[[], Any]], Awaitable[Any]]
):
    image = registry.add()
    registry.blob_gate = asyncio.Event()
    works = [docker_rig.work(image=image) for _ in range(4)]
    tasks = [asyncio.create_task(docker_rig.driver.ensure(work)) for work in works]
    await registry.blob_started.wait()
    await eventually(lambda: docker_rig.calls["create"] == 4)
    tasks[0].cancel()  # the one that began the pull
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    registry.blob_gate.set()
    seen = await asyncio.gather(*tasks[1:])
    assert {one.power for one in seen} == {Power.RUNNING}
    assert docker_rig.calls["pull"] == 1
    assert await docker_rig.driver.observe(works[0].ref) is None


async def test_a_pull_ends_with_its_last_waiter_and_can_begin_anew(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    registry.blob_gate = asyncio.Event()
    tasks = [asyncio.create_task(docker_rig.driver.ensure(docker_rig.work(image=image))) for _ in range(2)]
    await registry.blob_started.wait()
    for task in tasks:
        task.cancel()
    assert [type(end) for end in await asyncio.gather(*tasks, return_exceptions=True)] == [asyncio.CancelledError] * 2
    registry.blob_gate.set()
    registry.blob_gate = None
    assert (await docker_rig.driver.ensure(docker_rig.work(image=image))).power is Power.RUNNING
    assert docker_rig.calls["pull"] == 2


async def test_every_waiter_gets_the_cause(docker_rig: DockerRig, registry: Registry):
    image = registry.reference("nobody/has-this")
    ends = await asyncio.gather(
        *(docker_rig.driver.ensure(docker_rig.work(image=image)) for _ in range(5)), return_exceptions=True
    )
    assert [getattr(end, "reason", end) for end in ends] == ["IMAGE_NOT_FOUND"] * 5
    assert len({id(end) for end in ends}) == 5


@pytest.mark.parametrize("bearer", [False, True], ids=["basic", "bearer"])
async def test_credentials(docker_rig: DockerRig, registry: Registry, caplog: pytest.LogCaptureFixture, bearer: bool):
    caplog.set_level(logging.DEBUG)
    image = registry.add()
    registry.credentials, registry.bearer = (RIGHT.username, RIGHT.password), bearer
    without = await fault_of(docker_rig, image)
    assert (type(without), without.reason) == (RuntimeRejected, "IMAGE_AUTH_REQUIRED")
    wrong = await fault_of(docker_rig, image, auth=WRONG)
    assert (type(wrong), wrong.reason) == (RuntimeRejected, "IMAGE_AUTH_FAILED")
    right = docker_rig.work(image=image, auth=RIGHT)
    assert (await docker_rig.driver.ensure(right)).power is Power.RUNNING
    said = f"{without!r}{wrong!r}{right!r}{caplog.text}{await docker_rig.inspect(f'sandbox-{right.ref.object_id}')}"
    assert RIGHT.password not in said
    assert WRONG.password not in said


async def test_pulls_with_different_credentials_share_nothing(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    registry.credentials = (RIGHT.username, RIGHT.password)
    gate = docker_rig.hold("pull")
    works = [docker_rig.work(image=image, auth=auth) for auth in (None, WRONG, RIGHT)]
    tasks = [asyncio.create_task(docker_rig.driver.ensure(work)) for work in works]
    await gate.reached.wait()
    gate.open()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert docker_rig.calls["pull"] == 3
    assert getattr(ends[0], "reason", "") == "IMAGE_AUTH_REQUIRED"
    assert getattr(ends[1], "reason", "") == "IMAGE_AUTH_FAILED"
    assert getattr(ends[2], "power", None) is Power.RUNNING


@pytest.mark.parametrize(
    ("fault", "kind", "reason"),
    [
        (Fault(404, "NAME_UNKNOWN", "repository name not known to registry"), RuntimeRejected, "IMAGE_NOT_FOUND"),
        (Fault(403, "DENIED", "requested access to the resource is denied"), RuntimeRejected, "IMAGE_AUTH_REQUIRED"),
        (Fault(429, "TOOMANYREQUESTS", "pull rate limit reached"), ImagePullFailed, "REGISTRY_RATE_LIMITED"),
        (Fault(500, "UNKNOWN", "boom"), ImagePullFailed, "REGISTRY_UNREACHABLE"),
        (Fault(503, "UNAVAILABLE", "down"), ImagePullFailed, "REGISTRY_UNREACHABLE"),
    ],
)
async def test_what_the_registry_refuses(
    docker_rig: DockerRig, registry: Registry, fault: Fault, kind: type[Exception], reason: str
):
    image = registry.add()
    registry.manifest_fault = fault
    caught = await fault_of(docker_rig, image)
    assert (type(caught), caught.reason) == (kind, reason)
    registry.manifest_fault = None
    assert (await docker_rig.driver.ensure(docker_rig.work(image=image))).power is Power.RUNNING


async def test_a_registry_that_is_not_there(docker_rig: DockerRig):
    caught = await fault_of(docker_rig, "127.0.0.1:1/nobody/listens:1")
    assert (type(caught), caught.reason) == (ImagePullFailed, "REGISTRY_UNREACHABLE")


async def test_a_pull_that_takes_too_long(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    registry.blob_gate = asyncio.Event()
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, pull_timeout=0.5))
    with pytest.raises(ImagePullFailed) as caught:
        await driver.ensure(docker_rig.work(image=image))
    assert caught.value.reason == "IMAGE_PULL_TIMEOUT"
    assert image in caught.value.message


async def test_an_engine_that_goes_away_in_a_pull_is_the_engines_trouble(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    registry.blob_gate = asyncio.Event()
    task = asyncio.create_task(docker_rig.driver.ensure(docker_rig.work(image=image)))
    await registry.blob_started.wait()
    await docker_rig.down()
    with pytest.raises(RuntimeUnavailable):
        await task


async def test_platforms(docker_rig: DockerRig, registry: Registry):
    listed = registry.add("listed", platform=FOREIGN, as_list=True)
    caught = await fault_of(docker_rig, listed)
    assert (type(caught), caught.reason) == (RuntimeRejected, "IMAGE_PLATFORM_MISMATCH")
    caught = await fault_of(docker_rig, listed, platform="linux/s390x")
    assert caught.reason == "IMAGE_PLATFORM_MISMATCH"

    single = registry.add("single")
    assert (await docker_rig.driver.ensure(docker_rig.work(image=single, platform=NATIVE))).power is Power.RUNNING
    caught = await fault_of(docker_rig, single, platform=FOREIGN)
    assert (type(caught), caught.reason) == (RuntimeRejected, "IMAGE_PLATFORM_MISMATCH")


async def test_a_local_image_of_another_platform_is_pulled_again(docker_rig: DockerRig, registry: Registry):
    image = registry.add(platform=FOREIGN)
    with pytest.raises(RuntimeRejected):
        await docker_rig.driver.ensure(docker_rig.work(image=image, platform=NATIVE))
    registry.add(platform=NATIVE)
    work = docker_rig.work(image=image, platform=NATIVE)
    assert (await docker_rig.driver.ensure(work)).power is Power.RUNNING
    assert docker_rig.calls["pull"] == 2


async def test_no_tag_means_latest_and_nothing_else(docker_rig: DockerRig, registry: Registry):
    registry.add(tag="other")
    registry.add(tag="latest")
    name = registry.reference().rpartition(":")[0]
    assert (await docker_rig.driver.ensure(docker_rig.work(image=name))).power is Power.RUNNING
    assert registry.counts["manifest"] == 1


async def test_by_digest(docker_rig: DockerRig, registry: Registry):
    registry.add()
    image = registry.by_digest()
    work = docker_rig.work(image=image)
    assert (await docker_rig.driver.ensure(work)).power is Power.RUNNING
    missing = image.rpartition("@")[0] + "@sha256:" + "0" * 64
    assert (await fault_of(docker_rig, missing)).reason == "IMAGE_NOT_FOUND"


@pytest.mark.parametrize("image", ["UPPER/case:1", "a b", "x:!!", "x@sha256:12"])
async def test_a_reference_that_is_none(docker_rig: DockerRig, image: str):
    caught = await fault_of(docker_rig, image)
    assert (type(caught), caught.reason) == (RuntimeRejected, "IMAGE_REFERENCE_INVALID")


async def test_the_images_own_name_does_not_decide(docker_rig: DockerRig, registry: Registry):
    caught = await fault_of(docker_rig, registry.reference("denied/timeout"))
    assert caught.reason == "IMAGE_NOT_FOUND"
