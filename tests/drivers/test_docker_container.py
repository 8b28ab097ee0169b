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
from app.runtime.docker import DockerOptions, connect
from app.runtime.docker.spec import LABEL_GENERATION, LABEL_ID, LABEL_INSTALLATION, LABEL_TENANT
from app.runtime.driver import Limits, Power, Workload
from tests.drivers.rigs import BUSYBOX, DockerRig

pytestmark = pytest.mark.engine
Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]
SECRET = "s3cr3t-value-of-a-variable"


async def container(rig: DockerRig, work: Workload) -> dict[str, Any]:
    found = await rig.inspect(f"sandbox-{work.sandbox_id}")
    assert found is not None
    return found


async def output(rig: DockerRig, work: Workload, eventually: Eventually) -> str:
    """What the program wrote before it ended."""

    async def ended() -> bool:
        seen = await rig.driver.observe(work.sandbox_id)
        return seen is not None and seen.power is Power.EXITED

    await eventually(ended)
    return "".join(await rig.direct.containers.container(f"sandbox-{work.sandbox_id}").log(stdout=True, stderr=True))


async def test_limits_and_privileges_are_really_set(docker_rig: DockerRig):
    work = docker_rig.work(limits=Limits(memory_bytes=64 << 20, nano_cpus=500_000_000))
    await docker_rig.driver.ensure(work)
    host = (await container(docker_rig, work))["HostConfig"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (64 << 20, 64 << 20, 500_000_000)
    assert host["PidsLimit"] == 4096
    assert {name.removeprefix("CAP_") for name in host["CapDrop"]} >= {"NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE"}
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
    assert int(told["CapEff"], 16) & (1 << 21) == 0, "CAP_SYS_ADMIN"
    assert told["Seccomp"] == "2"


async def test_labels_are_identity_and_nothing_else(docker_rig: DockerRig):
    work = docker_rig.work(tenant="acme", generation=7, env={"TOKEN": SECRET})
    await docker_rig.driver.ensure(work)
    assert (await container(docker_rig, work))["Config"]["Labels"] == {
        LABEL_ID: str(work.sandbox_id),
        LABEL_INSTALLATION: str(docker_rig.options.installation),
        LABEL_TENANT: "acme",
        LABEL_GENERATION: "7",
    }


async def test_the_environment_is_inside(docker_rig: DockerRig, eventually: Eventually):
    options = msgspec.structs.replace(docker_rig.options, sandbox_env={"SITE": "x", "SHARED": "operator"})
    work = docker_rig.work(entrypoint=("env",), env={"SHARED": "request", "WITH": "a=b c", "OPENSANDBOX_ID": "forged"})
    await docker_rig.with_options(options).ensure(work)
    lines = (await output(docker_rig, work, eventually)).splitlines()
    assert {"SITE=x", "SHARED=request", "WITH=a=b c", f"OPENSANDBOX_ID={work.sandbox_id}"} <= set(lines)
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
        ({"limits": Limits(nano_cpus=4096 * 10**9)}, "SPEC_REJECTED", "CPUs"),
        ({"limits": Limits(memory_bytes=1000)}, "SPEC_REJECTED", "memory"),
        ({"limits": Limits(gpus=-1)}, "START_REJECTED", "gpu"),
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
    assert not await docker_rig.exists(f"sandbox-{work.sandbox_id}")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"network_mode": "no-such-network"}, "no-such-network"),
        ({"drop_capabilities": ("NO_SUCH",)}, "NO_SUCH"),
        ({"log_max_size": "many"}, "many"),
    ],
)
async def test_settings_that_the_engine_refuses_are_named(docker_rig: DockerRig, options: dict[str, Any], named: str):
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, **options))
    work = docker_rig.work()
    with pytest.raises(RuntimeRejected, match=named):
        await driver.ensure(work)
    assert not await docker_rig.exists(f"sandbox-{work.sandbox_id}")


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


async def test_a_copy_that_carries_our_labels_is_a_stranger(docker_rig: DockerRig):
    """As when somebody commits a sandbox to an image and runs that: labels travel with images."""
    work = docker_rig.work()
    labels = {LABEL_INSTALLATION: str(docker_rig.options.installation), LABEL_ID: str(work.sandbox_id)}
    copy = f"copy-{uuid4()}"
    config = {"Image": BUSYBOX, "Entrypoint": ["sleep", "3600"], "Labels": labels}
    await docker_rig.direct.containers.create(config, name=copy)
    assert [seen async for seen in docker_rig.driver.inventory()] == []
    await docker_rig.driver.remove(work.sandbox_id)
    assert await docker_rig.exists(copy)
    assert not (await docker_rig.driver.ensure(work)).adopted


async def test_anonymous_volumes_go_with_the_container(docker_rig: DockerRig):
    work = docker_rig.work()
    labels = {LABEL_INSTALLATION: str(docker_rig.options.installation), LABEL_ID: str(work.sandbox_id)}
    config = {"Image": BUSYBOX, "Entrypoint": ["sleep", "3600"], "Labels": labels, "Volumes": {"/data": {}}}
    made = await docker_rig.direct.containers.create(config, name=f"sandbox-{work.sandbox_id}")
    volume = (await made.show())["Mounts"][0]["Name"]
    await docker_rig.driver.remove(work.sandbox_id)
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
