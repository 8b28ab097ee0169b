"""The engine that we install: its containers outlive it, and its stop leaves nothing."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiodocker
import pytest

from app.cli.local_image import ensure_busybox_image
from tests.engine.own import SYSTEM_PATH, OwnEngine

IMAGE = "sandledger-test:1"


@pytest.fixture
def own() -> Iterator[OwnEngine]:
    engine = OwnEngine()
    try:
        yield engine
    finally:
        engine.close()


@asynccontextmanager
async def client(own: OwnEngine) -> AsyncIterator[aiodocker.Docker]:
    async with aiodocker.Docker(url=own.address) as docker:
        yield docker


async def run(docker: aiodocker.Docker, *command: str, **more: Any) -> str:
    config: dict[str, Any] = {"Image": IMAGE, "Cmd": list(command), "StopTimeout": 1, **more}
    container = await docker.containers.create(config)
    await container.start()
    return str(container.id)


async def state(docker: aiodocker.Docker, container: str) -> dict[str, Any]:
    return (await docker.containers.container(container).show())["State"]


async def said(docker: aiodocker.Docker, container: str, *command: str) -> bytes:
    execution = await docker.containers.container(container).exec(list(command))
    async with execution.start() as stream:
        answer = await stream.read_out()
    return b"" if answer is None else answer.data


async def test_a_container_outlives_a_killed_dockerd_and_is_adopted_by_the_next(own: OwnEngine) -> None:
    own.start()
    async with client(own) as docker:
        assert (await docker.system.info())["LiveRestoreEnabled"]
        await ensure_busybox_image(docker, IMAGE)
        running = await run(docker, "sh", "-c", "echo kept >/tmp/f; exec sleep 3600")
        paused = await run(docker, "sleep", "3600")
        await docker.containers.container(paused).pause()
        before = [await state(docker, each) for each in (running, paused)]
    own.kill_dockerd()
    own.start()
    async with client(own) as docker:
        after = [await state(docker, each) for each in (running, paused)]
        for was, now in zip(before, after, strict=True):
            assert {name: was[name] for name in ("Status", "Pid", "StartedAt")} == {
                name: now[name] for name in ("Status", "Pid", "StartedAt")
            }
        assert await said(docker, running, "cat", "/tmp/f") == b"kept\n"
        await docker.containers.container(paused).unpause()
        assert await said(docker, paused, "echo", "awake") == b"awake\n"


async def test_without_live_restore_it_would_have_ended(own: OwnEngine) -> None:
    script = own.script.read_text()
    assert script.count("live_restore true\n") == 1
    own.script.write_text(script.replace("live_restore true\n", "live_restore false\n"))
    own.start()
    async with client(own) as docker:
        await ensure_busybox_image(docker, IMAGE)
        container = await run(docker, "sleep", "3600")
    own.kill_dockerd()
    own.start()
    async with client(own) as docker:
        seen = await state(docker, container)
        assert (seen["Status"], seen["ExitCode"]) == ("exited", 137)


@pytest.mark.parametrize("killed", [False, True], ids=["a running dockerd", "a killed dockerd"])
async def test_stop_leaves_nothing(own: OwnEngine, killed: bool) -> None:
    own.start()
    async with client(own) as docker:
        await ensure_busybox_image(docker, IMAGE)
        network = await docker.networks.create({"Name": "n", "Driver": "bridge"})
        published = {"NetworkMode": "n", "PortBindings": {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}}
        containers = [
            await run(docker, "httpd", "-f", ExposedPorts={"80/tcp": {}}, HostConfig=published),
            await run(docker, "sleep", "3600"),
            # Its second process does not end with its first.
            await run(docker, "sh", "-c", "sleep 3600 & exec sleep 3600", HostConfig={"PidMode": "host"}),
        ]
        await docker.containers.container(containers[1]).pause()
        assert f"br-{network.id[:12]}" in own.links()
    assert own.processes(*containers)
    assert own.cgroups(*containers)
    if killed:
        own.kill_dockerd()
    own.stop()
    assert own.processes(*containers) == []
    assert own.cgroups(*containers) == []
    assert own.mounts() == []
    assert own.links() == {"lo"}
    for show in ("iptables-legacy-save", "iptables-nft-save"):
        if shutil.which(show, path=SYSTEM_PATH):
            assert "-i br-" not in own.within(show)
