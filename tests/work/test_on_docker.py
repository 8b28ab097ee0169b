"""The same worker on a real Docker engine: one life of each kind, and nothing left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import aiodocker
import pytest

from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase
from app.domain.stream import ActorKind
from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect
from app.store.vault.seal import Secrets
from tests.work.stage import Stage

IMAGE = "sandledger-demo:1"


@pytest.fixture
async def docker(docker_host: str) -> AsyncIterator[aiodocker.Docker]:
    async with aiodocker.Docker(docker_host) as docker:
        try:
            await ensure_busybox_image(docker, IMAGE)
        except RuntimeUnavailable as error:
            if os.environ.get("REQUIRE_ENGINE") == "1":
                pytest.fail(f"REQUIRE_ENGINE=1, and no engine can be used: {error}")
            pytest.skip(f"no container engine: {error}")
        yield docker


@pytest.fixture
async def driver(stage: Stage, docker: aiodocker.Docker, docker_host: str) -> AsyncIterator[DockerDriver]:
    stage.engine_name = DockerDriver.name
    made = connect(DockerOptions(installation=stage.installation), docker_host)
    yield made
    async for found in made.inventory():
        await made.remove(found.sandbox_id)
    await made.close()


async def left(driver: DockerDriver) -> int:
    return len([found async for found in driver.inventory()])


async def test_lives_on_docker(stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until):
    worker = stage.worker(driver, sweep_every=3600)
    async with stage.working(worker):
        long, short, killed = await asyncio.gather(
            stage.create(image=IMAGE, secrets=Secrets({"GREETING": "hello"}), timeout_s=600),
            stage.create(image=IMAGE, entrypoint=("sh", "-c", "exit 3")),
            stage.create(image=IMAGE),
        )
        await until(stage.is_phase(Phase.RUNNING, long, killed))
        await until(stage.is_phase(Phase.FAILED, short))
        sandbox = await stage.sandbox(killed)
        assert sandbox.runtime is not None
        env = (await docker.containers.container((await stage.sandbox(long)).runtime.id).show())["Config"]["Env"]
        assert "GREETING=hello" in env

        await docker.containers.container(sandbox.runtime.id).kill()
        await until(stage.is_phase(Phase.FAILED, killed))  # by a hint
        last = (await stage.history(killed))[-1]
        assert isinstance(last.event, ev.RuntimeExited)
        assert (last.event.exit_code, last.meta.actor.kind) == (137, ActorKind.RUNTIME)

        await stage.ask(long, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, long))
        await stage.ask(long, cmd.Resume())
        await until(stage.is_phase(Phase.RUNNING, long))
        for sandbox_id in (long, short, killed):
            await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, long, short, killed))
        await until(stage.is_idle())
    assert await left(driver) == 0
    assert (await stage.told(long))[:3] == ["requested", "runtime_created", "started"]
    assert (await stage.told(short))[:4] == ["requested", "runtime_created", "started", "runtime_exited"]


async def test_one_image_that_is_nowhere_fails_and_leaves_nothing(stage: Stage, driver: DockerDriver, until):
    """On an engine without a way out the registry is unreachable, which is retried; a bad reference is final."""
    async with stage.working(stage.worker(driver)):
        sandbox_id = await stage.create(image="NOT/A VALID/reference")
        await until(stage.is_phase(Phase.FAILED, sandbox_id))
    failure = (await stage.sandbox(sandbox_id)).failure
    assert failure is not None
    assert failure.reason != "RECONCILE_EXHAUSTED"
    assert await left(driver) == 0


async def test_a_container_taken_away_is_lost_after_two_looks(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until
):
    async with stage.working(stage.worker(driver)):
        sandbox_id = await stage.create(image=IMAGE)
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        runtime = (await stage.sandbox(sandbox_id)).runtime
        assert runtime is not None
        await docker.containers.container(runtime.id).delete(force=True)

        async def ended() -> bool:
            return await stage.phase(sandbox_id) is Phase.FAILED

        await until(ended)
    assert (await stage.told(sandbox_id))[-1] in ("runtime_lost", "runtime_exited")


async def test_an_orphan_on_docker_is_swept(stage: Stage, driver: DockerDriver, until):
    worker = stage.worker(driver, orphan_grace=0)
    sandbox_id = await stage.create(image=IMAGE)
    work = await worker.reconciler._workloads.of(await stage.sandbox(sandbox_id))
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    await driver.ensure(work)  # a create that came too late
    assert await left(driver) == 1

    async def swept() -> bool:
        await worker.resync.sweep()
        return await left(driver) == 0

    await until(swept)
