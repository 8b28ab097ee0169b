"""What the Docker driver makes of a workload, seen from behind the driver's back."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiodocker
import msgspec
import pytest

from app.errors import RuntimeRejected, RuntimeUnavailable, SettingsError
from app.runtime.docker import CAPABILITIES, DockerOptions, Ulimit, connect, names
from app.runtime.driver import Limits, Power, Workload
from app.runtime.faults import AttemptFailed
from tests.drivers.rig import BUSYBOX
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine
Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]
SECRET = "s3cr3t-value-of-a-variable"
CAPABILITY_BITS = (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31)
"""Of capabilities(7), those that are left: e.g. 13 is NET_RAW, 21 SYS_ADMIN, 27 MKNOD."""
ENTRYPOINT = "set -e; touch /tmp/f; chown 1234:99 /tmp/f; stat -c %u:%g /tmp/f; su -s /bin/sh nobody -c 'id -u'"
"""What entrypoints of ordinary images do as root before they become another user."""


async def container(rig: DockerRig, work: Workload) -> dict[str, Any]:
    found = await rig.inspect(f"sandbox-{work.ref.object_id}")
    assert found is not None
    return found


async def output(rig: DockerRig, work: Workload, eventually: Eventually) -> str:
    """What the program wrote before it ended."""

    async def ended() -> bool:
        seen = await rig.driver.observe(work.ref)
        return seen is not None and seen.power is Power.EXITED

    await eventually(ended)
    return "".join(await rig.direct.containers.container(f"sandbox-{work.ref.object_id}").log(stdout=True, stderr=True))


async def test_limits_and_privileges_are_really_set(docker_rig: DockerRig):
    work = docker_rig.work(limits=Limits(memory_bytes=64 << 20, cpu_nanos=500_000_000))
    await docker_rig.driver.ensure(work)
    host = (await container(docker_rig, work))["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (64 << 20, 64 << 20, 500_000_000)
    assert host["PidsLimit"] == 4096
    assert host["CapDrop"] == ["ALL"]
    assert {name.removeprefix("CAP_") for name in host["CapAdd"]} == set(CAPABILITIES)
    assert host["Ulimits"] == [{"Name": "core", "Hard": 0, "Soft": 0}]
    assert host["Init"] is False
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}
    assert host["RestartPolicy"]["Name"] in ("", "no")
    assert not host["PortBindings"]
    assert not host["Privileged"]


async def test_limits_are_felt_inside(docker_rig: DockerRig, eventually: Eventually):
    work = docker_rig.work(entrypoint=("cat", "/proc/self/status"))
    await docker_rig.driver.ensure(work)
    told = dict(
        line.split(":\t", 1) for line in (await output(docker_rig, work, eventually)).splitlines() if ":\t" in line
    )
    assert told["NoNewPrivs"] == "1"
    assert int(told["CapEff"], 16) == int(told["CapBnd"], 16) == sum(1 << bit for bit in CAPABILITY_BITS)
    assert told["Seccomp"] == "2"


async def test_an_entrypoint_may_change_owner_and_user(docker_rig: DockerRig, eventually: Eventually):
    work = docker_rig.work(entrypoint=("sh", "-c", ENTRYPOINT))
    await docker_rig.driver.ensure(work)
    assert (await output(docker_rig, work, eventually)).split() == ["1234:99", "65534"]


@pytest.mark.parametrize("changes", [{"capabilities": ()}, {"drop_capabilities": ("cap_chown",)}])
async def test_and_may_not_where_the_operator_took_that_away(
    docker_rig: DockerRig, eventually: Eventually, changes: dict[str, Any]
):
    options = msgspec.structs.replace(docker_rig.options, **changes)
    work = docker_rig.work(entrypoint=("sh", "-c", ENTRYPOINT))
    await docker_rig.with_options(options).ensure(work)
    assert "Operation not permitted" in await output(docker_rig, work, eventually)


async def test_raw_packets_and_device_files_are_not_to_be_had(docker_rig: DockerRig, eventually: Eventually):
    work = docker_rig.work(entrypoint=("sh", "-c", "mknod /tmp/d b 8 0; ping -c 1 127.0.0.1"))
    await docker_rig.driver.ensure(work)
    said = await output(docker_rig, work, eventually)
    assert "mknod: /tmp/d: Operation not permitted" in said
    assert "1 packets received" not in said


async def test_defaults_are_for_requests_without_limits(docker_rig: DockerRig):
    options = msgspec.structs.replace(
        docker_rig.options,
        default_memory_bytes=64 << 20,
        default_cpu_nanos=10**9,
        max_cpu_nanos=500_000_000,
        ulimits=(Ulimit("nofile", 512, 1024),),
        pids_limit=99,
    )
    driver = docker_rig.with_options(options)
    work = docker_rig.work()
    await driver.ensure(work)
    host = (await container(docker_rig, work))["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (64 << 20, 64 << 20, 500_000_000)
    assert (host["PidsLimit"], host["Ulimits"]) == (99, [{"Name": "nofile", "Hard": 1024, "Soft": 512}])

    own = docker_rig.work(limits=Limits(cpu_nanos=250_000_000, memory_bytes=128 << 20))
    await driver.ensure(own)
    host = (await container(docker_rig, own))["HostConfig"]
    assert (host["Memory"], host["NanoCpus"]) == (128 << 20, 250_000_000)

    greedy = docker_rig.work(limits=Limits(cpu_nanos=500_000_001))
    with pytest.raises(RuntimeRejected, match="SPEC_REJECTED: cpu 500000001 is above the operator's maximum"):
        await driver.ensure(greedy)


async def test_a_maximum_without_a_default_holds_for_all(docker_rig: DockerRig):
    options = msgspec.structs.replace(docker_rig.options, max_memory_bytes=64 << 20)
    work = docker_rig.work()
    await docker_rig.with_options(options).ensure(work)
    assert (await container(docker_rig, work))["HostConfig"]["Memory"] == 64 << 20


async def test_with_init_orphans_are_collected(docker_rig: DockerRig, eventually: Eventually):
    options = msgspec.structs.replace(docker_rig.options, init=True)
    work = docker_rig.work(entrypoint=("sh", "-c", "cat /proc/1/comm"))
    await docker_rig.with_options(options).ensure(work)
    assert (await output(docker_rig, work, eventually)).strip() == "docker-init"


async def test_with_init_a_missing_program_is_an_exit(docker_rig: DockerRig, eventually: Eventually):
    """Why it is off by default: the engine's init starts well, and then the verdict is lost."""
    options = msgspec.structs.replace(docker_rig.options, init=True)
    work = docker_rig.work(entrypoint=("/missing/tool",))
    driver = docker_rig.with_options(options)
    await driver.ensure(work)
    await output(docker_rig, work, eventually)
    seen = await driver.observe(work.ref)
    assert seen is not None
    assert seen.exit is not None
    assert seen.exit.code == 127


async def test_the_environment_is_inside(docker_rig: DockerRig, eventually: Eventually):
    options = msgspec.structs.replace(docker_rig.options, sandbox_env={"SITE": "x", "SHARED": "operator"})
    work = docker_rig.work(entrypoint=("env",), env={"SHARED": "request", "WITH": "a=b c", "OPENSANDBOX_ID": "forged"})
    await docker_rig.with_options(options).ensure(work)
    lines = (await output(docker_rig, work, eventually)).splitlines()
    assert {"SITE=x", "SHARED=request", "WITH=a=b c", f"OPENSANDBOX_ID={work.ref.object_id}"} <= set(lines)
    assert "SHARED=operator" not in lines


@pytest.mark.parametrize(
    ("entrypoint", "said"),
    [
        (("echo", "two words", "$HOME"), "two words $HOME"),
        (("echo 'two words' three",), "two words three"),
        (("sh", "-c", "echo one; echo two"), "one\ntwo"),
    ],
)
async def test_the_entrypoint_is_run_as_given(
    docker_rig: DockerRig, eventually: Eventually, entrypoint: tuple[str, ...], said: str
):
    work = docker_rig.work(entrypoint=entrypoint)
    await docker_rig.driver.ensure(work)
    assert (await output(docker_rig, work, eventually)).strip() == said


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"limits": Limits(cpu_nanos=4096 * 10**9)}, "SPEC_REJECTED", "CPUs"),
        ({"limits": Limits(memory_bytes=1000)}, "SPEC_REJECTED", "memory"),
        ({"limits": Limits(gpus_all=True)}, "START_REJECTED", "gpu"),
        ({"limits": Limits(gpus=1)}, "START_REJECTED", "gpu"),
        ({"image": "UPPER/case:1"}, "IMAGE_REFERENCE_INVALID", "lowercase"),
        ({"entrypoint": ("nosuchprogram",)}, "ENTRYPOINT_NOT_FOUND", "nosuchprogram"),
        ({"entrypoint": ("/etc/passwd",)}, "ENTRYPOINT_NOT_EXECUTABLE", "/etc/passwd"),
        ({"entrypoint": ("sleep 'unfinished",)}, "SPEC_REJECTED", "entrypoint"),
        ({"entrypoint": ()}, "SPEC_REJECTED", "entrypoint"),
        ({"env": {"": SECRET}}, "SPEC_REJECTED", "environment"),
        ({"env": {"A=B": SECRET}}, "SPEC_REJECTED", "A=B"),
        ({"env": {"A": f"{SECRET}\0"}}, "SPEC_REJECTED", "'A'"),
        ({"entrypoint": (f"/bin/{SECRET}",), "env": {"A": SECRET}}, "ENTRYPOINT_NOT_FOUND", "/bin/***"),
    ],
)
async def test_what_cannot_run_says_why_and_leaves_nothing(
    docker_rig: DockerRig, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], reason: str, named: str
):
    caplog.set_level(logging.DEBUG)
    work = docker_rig.work(**changes)
    with pytest.raises(RuntimeRejected) as caught:
        await docker_rig.driver.ensure(work)
    assert caught.value.reason == reason
    assert named in caught.value.message
    assert SECRET not in f"{caught.value!r}{work!r}{caplog.text}"
    assert not await docker_rig.exists(f"sandbox-{work.ref.object_id}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"network_mode": "no-such-network"}, "no-such-network"),
        ({"capabilities": ("NO_SUCH",)}, "NO_SUCH"),
        ({"ulimits": (Ulimit("nofile", 1 << 40, 1 << 40),)}, "rlimit"),
        ({"log_max_size": "many"}, "many"),
    ],
)
async def test_settings_that_the_engine_refuses_are_named_and_end_no_sandbox(
    docker_rig: DockerRig, options: dict[str, Any], named: str
):
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, **options))
    work = docker_rig.work()
    with pytest.raises(AttemptFailed, match=named) as caught:
        await driver.ensure(work)
    assert caught.value.reason == "START_FAILED"
    assert not await docker_rig.exists(f"sandbox-{work.ref.object_id}")


async def test_a_seccomp_profile_is_read_from_its_file(docker_rig: DockerRig, tmp_path: Path):
    profile = tmp_path / "seccomp.json"
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW",\n "syscalls": []}')
    options = msgspec.structs.replace(docker_rig.options, seccomp_profile=str(profile))
    work = docker_rig.work()
    await docker_rig.with_options(options).ensure(work)
    security = (await container(docker_rig, work))["HostConfig"]["SecurityOpt"]
    assert 'seccomp={"defaultAction":"SCMP_ACT_ALLOW","syscalls":[]}' in security


@pytest.mark.parametrize("content", [None, "no json", "[]"])
async def test_a_seccomp_profile_that_is_none(docker_rig: DockerRig, tmp_path: Path, content: str | None):
    profile = tmp_path / "seccomp.json"
    if content is not None:
        profile.write_text(content)
    options = msgspec.structs.replace(docker_rig.options, seccomp_profile=str(profile))
    with pytest.raises(SettingsError, match=r"docker\.seccomp_profile"):
        connect(options, docker_rig.proxy.address)


async def test_anonymous_volumes_go_with_the_container(docker_rig: DockerRig):
    work = docker_rig.work()
    labels = names.labels_of(
        docker_rig.options.installation, work.ref.object_id, names.MAIN, tenant="t", generation=1, position=1
    )
    config = {"Image": BUSYBOX, "Entrypoint": ["sleep", "3600"], "Labels": labels, "Volumes": {"/data": {}}}
    made = await docker_rig.direct.containers.create(config, name=f"sandbox-{work.ref.object_id}")
    volume = (await made.show())["Mounts"][0]["Name"]
    await docker_rig.driver.remove(work.ref)
    with pytest.raises(aiodocker.DockerError, match="404"):
        await (await docker_rig.direct.volumes.get(volume)).show()


async def test_no_engine_says_what_to_do(tmp_path: Path):
    driver = connect(DockerOptions(installation=uuid4()), f"unix://{tmp_path}/none.sock")
    with pytest.raises(RuntimeUnavailable, match=r"none\.sock is not running: start it, or set DOCKER_HOST"):
        await driver.check()
    await driver.close()


async def test_docker_host_is_honoured(monkeypatch: pytest.MonkeyPatch, engine: str):
    monkeypatch.setenv("DOCKER_HOST", engine)
    driver = connect(DockerOptions(installation=uuid4()), None)
    assert (await driver.check()).address == engine
    await driver.close()


def test_an_address_that_is_none_is_a_setting_to_change():
    with pytest.raises(SettingsError, match=r"docker\.host"):
        connect(DockerOptions(installation=uuid4()), "not an address")
