"""Calls to an engine that hangs, was replaced by another version, is overloaded, or stands behind a proxy."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from uuid import UUID

import msgspec
import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.docker import DockerOptions
from app.runtime.docker.options import Times
from app.runtime.driver import Power
from tests.drivers.looks import Eventually, fetch
from tests.drivers.proxy import Refusal
from tests.drivers.rig import workload
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine
HTML = "<html><body><h1>403 Forbidden</h1>Request forbidden by administrative rules.</body></html>"


def test_time_limits_by_verb():
    options = DockerOptions(installation=workload().ref.object_id)
    assert options.times == Times(inspect=10, change=60, power=10, volume=30)
    assert msgspec.structs.replace(options, api_timeout=120).times == Times(inspect=20, change=120, power=20, volume=60)


async def test_an_engine_that_hangs_is_noticed_by_a_look_and_not_by_a_create(docker_rig: DockerRig):
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, api_timeout=3.0))
    held, work = [docker_rig.hold(call) for call in ("create", "inspect")], docker_rig.work()
    await driver.check()
    create = asyncio.create_task(driver.ensure(work))
    await held[0].reached.wait()
    look = asyncio.create_task(driver.observe(work.ref))
    done, _ = await asyncio.wait((create, look), return_when=asyncio.FIRST_COMPLETED)
    assert done == {look}, "although the create began first"
    with pytest.raises(RuntimeUnavailable, match="did not answer in time"):
        await look
    with pytest.raises(RuntimeUnavailable, match="did not answer in time"):
        await create


@pytest.mark.parametrize("before", ["1.99", "1.5"], ids=["too new", "too old"])
async def test_an_engine_of_another_version_is_asked_anew(docker_rig: DockerRig, before: str):
    """As after an upgrade or downgrade: the version that we speak is not the engine's any more."""
    docker_rig.proxy.canned["version"] = [{"Version": "other", "ApiVersion": before}]
    assert (await docker_rig.driver.ensure(docker_rig.work())).power is Power.RUNNING
    assert docker_rig.proxy.versions[0] == f"v{before}"
    assert f"v{before}" not in docker_rig.proxy.versions[1:]
    assert docker_rig.calls["version"] == 2


async def test_an_engine_that_refuses_its_own_version_is_in_trouble(docker_rig: DockerRig):
    docker_rig.proxy.canned["version"] = [{"Version": "other", "ApiVersion": "1.99"}] * 2
    with pytest.raises(RuntimeUnavailable, match=r"client version 1\.99 is too new"):
        await docker_rig.driver.ensure(docker_rig.work())
    assert (await docker_rig.driver.ensure(docker_rig.work())).power is Power.RUNNING


async def test_check_speaks_the_present_version_from_then_on(docker_rig: DockerRig):
    await docker_rig.driver.observe(docker_rig.work().ref)
    docker_rig.proxy.canned["version"] = [{"Version": "new", "ApiVersion": "1.40"}]
    with pytest.raises(RuntimeUnavailable, match="too old"):
        await docker_rig.driver.check()
    await docker_rig.driver.observe(docker_rig.work().ref)
    assert docker_rig.proxy.versions[-1] == "v1.40"


@pytest.mark.parametrize("answer", [{"Version": "1"}, {"Version": "1", "ApiVersion": "../x"}])
async def test_what_names_no_version_is_no_engine(docker_rig: DockerRig, answer: dict[str, object]):
    docker_rig.proxy.canned["version"] = [answer]
    with pytest.raises(RuntimeUnavailable):
        await docker_rig.driver.observe(docker_rig.work().ref)


@pytest.mark.parametrize("refusal", [Refusal(403, HTML, is_json=False), Refusal(401), Refusal(403)])
@pytest.mark.parametrize("call", ["create", "start", "inspect", "pause", "remove", "list", "make_volume", "info"])
async def test_a_proxy_that_forbids_a_call_ends_no_sandbox(docker_rig: DockerRig, call: str, refusal: Refusal):
    driver, work = docker_rig.driver, docker_rig.work()
    if call not in ("create", "start"):
        await driver.ensure(work)
    docker_rig.proxy.refusals[call] = refusal
    verbs = {
        "create": lambda: driver.ensure(work),
        "start": lambda: driver.ensure(work),
        "inspect": lambda: driver.observe(work.ref),
        "pause": lambda: driver.set_power(work.ref, Power.PAUSED),
        "remove": lambda: driver.remove(work.ref),
        "list": lambda: anext(driver.inventory()),
        "make_volume": driver.prepare,
        "info": driver.check,
    }
    with pytest.raises(RuntimeUnavailable, match="let it through the proxy or plugin"):
        await verbs[call]()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("call", ["create", "inspect", "pull"])
async def test_an_overloaded_engine_says_when_to_come_back(docker_rig: DockerRig, call: str, status: int):
    docker_rig.proxy.refusals[call] = Refusal(status, "slow down", {"Retry-After": "17"}, is_json=call != "create")
    if call == "pull":
        docker_rig.proxy.refusals[call] = Refusal(status, "slow down", {"Retry-After": "17"}, is_json=False)
    work = docker_rig.work(image=await docker_rig.image_to_pull() if call == "pull" else "sandledger-demo:1")
    with pytest.raises(RuntimeUnavailable) as caught:
        await (docker_rig.driver.fetch(work.image, print) if call == "pull" else docker_rig.driver.ensure(work))
    assert caught.value.retry_after == 17


async def test_the_moment_to_come_back_may_be_a_date(docker_rig: DockerRig):
    at = datetime.now(UTC) + timedelta(hours=1)
    docker_rig.proxy.refusals["inspect"] = Refusal(429, headers={"Retry-After": format_datetime(at, usegmt=True)})
    with pytest.raises(RuntimeUnavailable) as caught:
        await docker_rig.driver.observe(docker_rig.work().ref)
    assert caught.value.retry_after is not None
    assert 3000 < caught.value.retry_after <= 3600


@pytest.mark.parametrize("header", ["soon", "-1", ""])
async def test_a_moment_that_is_none(docker_rig: DockerRig, header: str):
    docker_rig.proxy.refusals["inspect"] = Refusal(429, headers={"Retry-After": header})
    with pytest.raises(RuntimeUnavailable) as caught:
        await docker_rig.driver.observe(docker_rig.work().ref)
    assert caught.value.retry_after is None


async def test_control_characters_of_an_engine_do_not_reach_a_terminal(docker_rig: DockerRig):
    for call, refusal in (("inspect", Refusal(503, "\x1b[2J\x00gone")), ("start", Refusal(500, "\x1b]0;x\x07bad"))):
        docker_rig.proxy.refusals = {call: refusal}
        with pytest.raises(Exception) as caught:
            await docker_rig.driver.ensure(docker_rig.work())
        assert not {"\x1b", "\x00", "\x07"} & set(str(caught.value))
        assert "\\x1b" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "kind"),
    [("cgroup freezer not supported", RuntimeRejected), ("cgroup: pause: not implemented", RuntimeRejected)],
)
async def test_an_engine_that_can_never_pause_says_so_for_good(
    docker_rig: DockerRig, words: str, kind: type[Exception]
):
    work = docker_rig.work()
    await docker_rig.driver.ensure(work)
    docker_rig.proxy.refusals["pause"] = Refusal(500, f"Cannot pause container x: {words}")
    with pytest.raises(kind, match="PAUSE_NOT_SUPPORTED"):
        await docker_rig.driver.set_power(work.ref, Power.PAUSED)


async def test_a_removal_that_another_asked_for_is_not_waited_for(docker_rig: DockerRig):
    work = docker_rig.work()
    await docker_rig.driver.ensure(work)
    docker_rig.proxy.refusals["remove"] = Refusal(409, "removal of container abc is already in progress")
    assert await docker_rig.driver.remove(work.ref) is False
    docker_rig.relent()
    assert await docker_rig.driver.remove(work.ref) is True


async def test_a_container_that_is_being_removed_is_asked_for_once(docker_rig: DockerRig):
    work = docker_rig.work()
    await docker_rig.driver.ensure(work)
    shown = await docker_rig.inspect(f"sandbox-{work.ref.object_id}")
    assert shown is not None
    shown["State"]["Status"] = "removing"
    docker_rig.proxy.canned["inspect"] = [shown]
    assert await docker_rig.driver.remove(work.ref) is False
    assert docker_rig.calls["remove"] == 0


async def test_a_quiet_event_stream_is_no_reason_to_look_at_everything(docker_rig: DockerRig, eventually: Eventually):
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, event_silence=0.2))
    work, told = docker_rig.work(), list[UUID | None]()

    async def listen() -> None:
        async for hint in driver.hints():
            told.append(None if hint is None else hint.object_id)

    task = asyncio.create_task(listen())
    try:
        await driver.ensure(work)
        await eventually(lambda: docker_rig.calls["events"] > 3)
        assert told == []
        await docker_rig.kill(work.ref.object_id)
        await eventually(lambda: told == [work.ref.object_id])
        docker_rig.drop_streams()
        await eventually(lambda: None in told)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_pulls_that_hang_leave_the_connections_of_other_verbs_alone(
    docker_rig: DockerRig, eventually: Eventually
):
    """A client has a hundred connections. With one client for all, this hangs."""
    docker_rig.hold("pull")
    await docker_rig.driver.observe(docker_rig.work().ref)
    pulls = [asyncio.create_task(fetch(docker_rig.driver, f"127.0.0.1:1/hangs:{n}")) for n in range(120)]
    await eventually(lambda: docker_rig.calls["pull"] >= 100)
    assert (await docker_rig.driver.ensure(docker_rig.work())).power is Power.RUNNING
    for pull in pulls:
        pull.cancel()
    await asyncio.gather(*pulls, return_exceptions=True)
