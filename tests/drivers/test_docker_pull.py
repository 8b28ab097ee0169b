"""Pulls by a real engine from a registry that misbehaves: typed causes, one pull for all, no secret anywhere."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import sys
from typing import Any

import msgspec
import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import FetchedImage, Image, Power, RegistryAuth
from app.runtime.faults import ImageMissing, ImagePullFailed
from tests.drivers.looks import fetch, run
from tests.drivers.proxy import Refusal
from tests.drivers.registry import FOREIGN, NATIVE, Fault, Registry
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine
PASSWORD = "correct horse battery staple"
RIGHT = RegistryAuth("reader", PASSWORD)
WRONG = RegistryAuth("reader", "wrong horse battery staple")


async def fault_of(rig: DockerRig, image: str, **changes: Any) -> RuntimeRejected | ImagePullFailed:
    with pytest.raises((RuntimeRejected, ImagePullFailed)) as caught:
        await fetch(rig.driver, image, **changes)
    return caught.value


async def test_twenty_fetches_of_one_missing_image_ask_the_registry_once(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    ends = await asyncio.gather(*(fetch(docker_rig.driver, image) for _ in range(20)))
    assert len(set(ends)) == 1
    assert docker_rig.calls["pull"] == 1
    assert (registry.counts["manifest"], registry.counts["blob"]) == (1, 2)  # one layer, one configuration


async def test_the_digest_is_the_registrys(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    fetched = await fetch(docker_rig.driver, image)
    assert registry.by_digest().endswith(f"@{fetched.image_digest}")
    seen = await docker_rig.driver.ensure(docker_rig.work(image=image))
    assert (seen.image_id, seen.image_digest) == (fetched.image_id, fetched.image_digest)
    assert (await fetch(docker_rig.driver, registry.by_digest())) == fetched


async def test_a_tag_that_moved_does_not_change_what_runs(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    first, work = await fetch(docker_rig.driver, image), docker_rig.work(image=image)
    await docker_rig.driver.ensure(work)
    registry.add()
    await docker_rig.direct.images.delete(image, force=True)
    second = await fetch(docker_rig.driver, image)
    assert second.image_digest != first.image_digest
    seen = await docker_rig.another().ensure(work)
    assert seen.image_id == first.image_id
    assert seen.image_digest in (first.image_digest, None), "never that of the new image"


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
    assert (await run(docker_rig.driver, right)).power is Power.RUNNING
    said = f"{without!r}{wrong!r}{right!r}{caplog.text}{await docker_rig.inspect(f'sandbox-{right.ref.object_id}')}"
    assert RIGHT.password not in said
    assert WRONG.password not in said


async def test_pulls_with_different_credentials_share_nothing(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    registry.credentials = (RIGHT.username, RIGHT.password)
    gate = docker_rig.hold("pull")
    tasks = [asyncio.create_task(fetch(docker_rig.driver, image, auth=auth)) for auth in (None, WRONG, RIGHT)]
    await gate.reached.wait()
    gate.open()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert docker_rig.calls["pull"] == 3
    assert getattr(ends[0], "reason", "") == "IMAGE_AUTH_REQUIRED"
    assert getattr(ends[1], "reason", "") == "IMAGE_AUTH_FAILED"
    assert isinstance(ends[2], FetchedImage)


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
    assert (await run(docker_rig.driver, docker_rig.work(image=image))).power is Power.RUNNING


async def test_a_registry_that_is_not_there(docker_rig: DockerRig):
    caught = await fault_of(docker_rig, "127.0.0.1:1/nobody/listens:1")
    assert (type(caught), caught.reason) == (ImagePullFailed, "REGISTRY_UNREACHABLE")


async def test_a_pull_that_takes_too_long(docker_rig: DockerRig, registry: Registry):
    image = registry.add()
    registry.blob_gate = asyncio.Event()
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, pull_timeout=0.5))
    with pytest.raises(ImagePullFailed) as caught:
        await fetch(driver, image)
    assert caught.value.reason == "IMAGE_PULL_TIMEOUT"
    assert image in caught.value.message


async def test_a_killed_process_ends_its_pull_and_another_one_begins_anew(
    docker_rig: DockerRig, registry: Registry, engine: str
):
    image = registry.add()
    registry.blob_gate = asyncio.Event()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.drivers.child", engine, str(docker_rig.options.installation), "fetch", image),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await registry.blob_started.wait()
    assert b"layers" in await process.stdout.readline()
    process.kill()
    assert await process.wait() == -signal.SIGKILL
    assert await docker_rig.driver.image(image) is None
    registry.blob_gate.set()
    registry.blob_gate = None
    fetched = await fetch(docker_rig.driver, image)
    assert registry.by_digest().endswith(f"@{fetched.image_digest}")
    assert (await docker_rig.driver.ensure(docker_rig.work(image=image))).power is Power.RUNNING


async def test_progress_has_layers_and_bytes(docker_rig: DockerRig, registry: Registry):
    image, told = registry.add(), list[str]()
    await docker_rig.driver.fetch(Image(image), told.append)
    assert told
    assert all(re.fullmatch(r"\d+ of \d+ layers(, \d+\.\d of \d+\.\d MB)?", text) for text in told), told


async def test_platforms(docker_rig: DockerRig, registry: Registry):
    listed = registry.add("listed", platform=FOREIGN, as_list=True)
    caught = await fault_of(docker_rig, listed)
    assert (type(caught), caught.reason) == (RuntimeRejected, "IMAGE_PLATFORM_MISMATCH")
    caught = await fault_of(docker_rig, listed, platform="linux/s390x")
    assert caught.reason == "IMAGE_PLATFORM_MISMATCH"

    single = registry.add("single")
    assert (await run(docker_rig.driver, docker_rig.work(image=single, platform=NATIVE))).power is Power.RUNNING
    caught = await fault_of(docker_rig, single, platform=FOREIGN)
    assert (type(caught), caught.reason) == (RuntimeRejected, "IMAGE_PLATFORM_MISMATCH")


async def test_a_local_image_of_another_platform_is_pulled_again(docker_rig: DockerRig, registry: Registry):
    image = registry.add(platform=FOREIGN)
    with pytest.raises(RuntimeRejected):
        await fetch(docker_rig.driver, image, platform=NATIVE)
    assert await docker_rig.driver.image(image) is not None, "the other platform's"
    registry.add(platform=NATIVE)
    work = docker_rig.work(image=image, platform=NATIVE)
    with pytest.raises(ImageMissing):
        await docker_rig.driver.ensure(work)
    assert (await run(docker_rig.driver, work)).power is Power.RUNNING
    assert docker_rig.calls["pull"] == 2


async def test_no_tag_means_latest_and_nothing_else(docker_rig: DockerRig, registry: Registry):
    registry.add(tag="other")
    registry.add(tag="latest")
    name = registry.reference().rpartition(":")[0]
    assert (await run(docker_rig.driver, docker_rig.work(image=name))).power is Power.RUNNING
    assert registry.counts["manifest"] == 1


async def test_by_digest(docker_rig: DockerRig, registry: Registry):
    registry.add()
    image = registry.by_digest()
    work = docker_rig.work(image=image)
    assert (await run(docker_rig.driver, work)).power is Power.RUNNING
    missing = image.rpartition("@")[0] + "@sha256:" + "0" * 64
    assert (await fault_of(docker_rig, missing)).reason == "IMAGE_NOT_FOUND"


@pytest.mark.parametrize(
    "image",
    ["UPPER/case:1", "a b", "x:!!", "x@sha256:12", "x/../../containers", "x?y=z", "x#y", "", "x//y", "x\x1b[2J"],
)
async def test_a_reference_that_is_none(docker_rig: DockerRig, image: str):
    caught = await fault_of(docker_rig, image)
    assert (type(caught), caught.reason) == (RuntimeRejected, "IMAGE_REFERENCE_INVALID")
    assert "\x1b" not in str(caught)
    assert await docker_rig.driver.image(image) is None


async def test_an_id_cannot_be_pulled(docker_rig: DockerRig):
    caught = await fault_of(docker_rig, f"sha256:{'0' * 64}")
    assert (type(caught), caught.reason) == (RuntimeRejected, "IMAGE_NOT_FOUND")
    assert docker_rig.calls["pull"] == 0


@pytest.mark.parametrize(
    "refusal",
    [
        Refusal(403, "<html><body><h1>403 Forbidden</h1></body></html>", is_json=False),
        Refusal(403, "authorization denied by plugin gate: not images"),
        Refusal(401, "Unauthorized", is_json=False),
    ],
)
async def test_a_proxy_that_forbids_pulls_says_nothing_about_the_image(
    docker_rig: DockerRig, registry: Registry, refusal: Refusal
):
    image = registry.add()
    docker_rig.proxy.refusals["pull"] = refusal
    with pytest.raises(RuntimeUnavailable, match="proxy or plugin"):
        await fetch(docker_rig.driver, image)


async def test_the_images_own_name_does_not_decide(docker_rig: DockerRig, registry: Registry):
    caught = await fault_of(docker_rig, registry.reference("denied/timeout"))
    assert caught.reason == "IMAGE_NOT_FOUND"
