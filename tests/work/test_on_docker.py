"""The same worker on a real Docker engine: one life of each kind, and nothing left."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import aiodocker
import pytest
from aiodocker.containers import DockerContainer

from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.stream import ActorKind
from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect
from app.runtime.driver import Misnamed, Observed, Ref
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer, Secrets
from app.work.policy import WorkPolicy
from tests.support.marks import remove_mark
from tests.support.needs import refuse_or_skip
from tests.work.stage import BEGUN, Stage

IMAGE = "sandledger-demo:1"


@pytest.fixture
async def docker(docker_host: str) -> AsyncIterator[aiodocker.Docker]:
    async with aiodocker.Docker(docker_host) as docker:
        try:
            await ensure_busybox_image(docker, IMAGE)
        except RuntimeUnavailable as error:
            refuse_or_skip(f"no engine can be used: {error}")
        yield docker


@pytest.fixture
async def stage(dsn: str, database: Database, signal: Signal, sealer: Sealer) -> Stage:
    """No engine is known yet: the first worker registers the real one."""
    service = Service(database, signal)
    made = Stage(dsn, database, service, signal, sealer)
    made.installation = uuid4()
    made.engines = Engines(database, signal, made.installation, service.engines)
    return made


@pytest.fixture
async def driver(stage: Stage, docker: aiodocker.Docker, docker_host: str) -> AsyncIterator[DockerDriver]:
    made = connect(DockerOptions(installation=stage.installation), docker_host)
    yield made
    async for found in made.inventory():
        one = found.observed if isinstance(found, Misnamed) else found
        main = one.main if isinstance(one, Observed) else None
        assert one.object_id is not None
        await made.remove(Ref(one.object_id, runtime_id=None if main is None else main.runtime_id))
    await remove_mark(docker, stage.installation)
    await made.close()


async def left(driver: DockerDriver) -> int:
    return len([found async for found in driver.inventory()])


async def container(docker: aiodocker.Docker, sandbox: Sandbox) -> DockerContainer:
    assert sandbox.runtime is not None
    assert sandbox.runtime.main is not None
    return docker.containers.container(sandbox.runtime.main.runtime_id)


async def test_lives_on_docker(stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until):
    async with stage.working(stage.worker(driver)):
        long, short, killed = await asyncio.gather(
            stage.create(image=IMAGE, secrets=Secrets({"GREETING": "hello"}), timeout_s=600),
            stage.create(image=IMAGE, entrypoint=("sh", "-c", "exit 3")),
            stage.create(image=IMAGE),
        )
        await until(stage.is_phase(Phase.RUNNING, long, killed))
        await until(stage.is_phase(Phase.FAILED, short))
        env = (await (await container(docker, await stage.sandbox(long))).show())["Config"]["Env"]
        assert "GREETING=hello" in env

        await (await container(docker, await stage.sandbox(killed))).kill()
        await until(stage.is_phase(Phase.FAILED, killed))  # by a hint
        last = (await stage.history(killed))[-1]
        assert isinstance(last.event, ev.RuntimeExited)
        assert (last.event.exit_code, last.event.reason, last.meta.actor.kind) == (137, None, ActorKind.RUNTIME)

        await stage.ask(long, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, long))
        await stage.ask(long, cmd.Resume())
        await until(stage.is_phase(Phase.RUNNING, long))
        for sandbox_id in (long, short, killed):
            await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, long, short, killed))
        await until(stage.is_idle())
    assert await left(driver) == 0
    assert without_waiting(await stage.told(long))[:6] == BEGUN
    assert without_waiting(await stage.told(short))[:7] == [*BEGUN, "runtime_exited"]


def without_waiting(told: list[str]) -> list[str]:
    """They were created before the engine was known."""
    return [event for event in told if event != "waiting"]


async def test_a_restart_from_outside_is_recorded(stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until):
    """Its processes began anew, and the log would not say so; or worse, it would take the moment between for the end."""
    async with stage.working(stage.worker(driver, exit_settle=WorkPolicy().exit_settle)):
        sandbox_id = await stage.create(image=IMAGE, entrypoint=("sh", "-c", "trap 'exit 0' TERM; sleep 600 & wait"))
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await until(stage.is_idle())
        await (await container(docker, await stage.sandbox(sandbox_id))).restart()
        await until(stage.is_told(sandbox_id, "restarted"))
        sandbox = await stage.sandbox(sandbox_id)
        assert (sandbox.phase, sandbox.run, sandbox.generation) == (Phase.RUNNING, 2, 1)
        await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
    assert await left(driver) == 0


async def test_a_renamed_container_is_neither_lost_nor_left(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until
):
    """Without its id in the log it would be judged lost by a sweep, and removed by a delete while it runs on."""
    async with stage.working(worker := stage.worker(driver)):
        sandbox_id, other = await asyncio.gather(*(stage.create(image=IMAGE) for _ in range(2)))
        await until(stage.is_phase(Phase.RUNNING, sandbox_id, other))
        await until(stage.is_idle())
        found = await container(docker, await stage.sandbox(sandbox_id))
        await found.rename(f"renamed-{sandbox_id}")
        assert (await worker.sweeper.sweep()).enqueued == 0, "its id is known, whatever its name is"
        assert await stage.phase(sandbox_id) is Phase.RUNNING
        await stage.ask(sandbox_id, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, sandbox_id))
        await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        with pytest.raises(aiodocker.DockerError, match="No such container"):
            await found.show()
        await stage.ask(other, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, other))
    assert "runtime_lost" not in await stage.told(sandbox_id)


async def test_a_copy_that_takes_the_name_of_a_renamed_container_gets_nothing_of_it(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until, caplog: pytest.LogCaptureFixture
):
    """`docker commit` copies the labels. By name first, the pause hit the copy and the delete left the real one."""
    async with stage.working(worker := stage.worker(driver)):
        sandbox_id = await stage.create(image=IMAGE)
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await until(stage.is_idle())
        real = await container(docker, await stage.sandbox(sandbox_id))
        labels = (await real.show())["Config"]["Labels"]
        await real.rename(f"renamed-{sandbox_id}")
        config = {"Image": IMAGE, "Entrypoint": ["sleep", "600"], "Labels": labels}
        copy = await docker.containers.create(config, name=f"sandbox-{sandbox_id}")
        await copy.start()
        assert (await worker.sweeper.sweep()).enqueued == 0
        assert f"({copy.id[:12]})" in caplog.text, "the operator is told of it"
        await stage.ask(sandbox_id, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, sandbox_id))
        assert (await real.show())["State"]["Status"] == "paused"
        assert (await copy.show())["State"]["Status"] == "running"
        await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        for one in (real, copy):
            with pytest.raises(aiodocker.DockerError, match="No such container"):
                await one.show()
    assert {"restarted", "runtime_adopted"} & set(await stage.told(sandbox_id)) == set()


async def test_one_image_that_is_nowhere_fails_and_leaves_nothing(stage: Stage, driver: DockerDriver, until):
    """On an engine without a way out the registry is unreachable, which is retried; a bad reference is final."""
    async with stage.working(stage.worker(driver)):
        sandbox_id = await stage.create(image="NOT/A VALID/reference")
        await until(stage.is_phase(Phase.FAILED, sandbox_id))
    failure = (await stage.sandbox(sandbox_id)).failure
    assert failure is not None
    assert failure.reason == "IMAGE_REFERENCE_INVALID"
    assert await left(driver) == 0


async def test_a_pull_that_cannot_work_holds_nobody_up(stage: Stage, driver: DockerDriver, until):
    async with stage.working(stage.worker(driver)):
        pulling = await stage.create(image="127.0.0.1:9/nothing/there:1")
        await until(stage.is_told(pulling, "reconcile_failed"))
        other = await stage.create(image=IMAGE)
        await until(stage.is_phase(Phase.RUNNING, other))
        failed = next(one.event for one in await stage.history(pulling) if isinstance(one.event, ev.ReconcileFailed))
        assert failed.step == "fetch"
        for sandbox_id in (pulling, other):
            await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, pulling, other))
    assert await left(driver) == 0


async def test_a_container_taken_away_is_lost_after_two_looks(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until
):
    async with stage.working(stage.worker(driver)):
        sandbox_id = await stage.create(image=IMAGE)
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await (await container(docker, await stage.sandbox(sandbox_id))).delete(force=True)
        await until(stage.is_phase(Phase.FAILED, sandbox_id))
    last = (await stage.history(sandbox_id))[-1].event
    # Whoever looks between the kill and the removal sees an exit.
    assert isinstance(last, ev.RuntimeLost) or (isinstance(last, ev.RuntimeExited) and last.exit_code == 137)


async def engine_times(docker: aiodocker.Docker, runtime_id: str, action: str) -> list[datetime]:
    """When the engine says that it happened to a container, cut to microseconds as in the log."""
    filters = json.dumps({"container": [runtime_id], "event": [action]})
    params = {"since": "0", "until": f"{time.time():.6f}", "filters": filters}
    async with docker._query("events", params=params) as answer:
        moments = [json.loads(line)["timeNano"] for line in (await answer.text()).splitlines()]
    return [datetime.fromtimestamp(at // 10**9, UTC) + timedelta(microseconds=at % 10**9 // 1000) for at in moments]


async def test_what_is_done_from_outside_has_the_time_of_the_engines_event(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until
):
    async def told(kind: type[ev.Paused | ev.Resumed]) -> list[datetime | None]:
        return [one.event.occurred_at for one in await stage.history(sandbox_id) if isinstance(one.event, kind)]

    async def paused_three_times() -> bool:
        return len(await told(ev.Paused)) == 3

    # A forced removal kills first. An exit that is looked at again so late is gone by then.
    async with stage.working(stage.worker(driver, exit_settle=5)):
        sandbox_id = await stage.create(image=IMAGE)
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await until(stage.is_idle())
        there = await container(docker, await stage.sandbox(sandbox_id))

        await there.pause()
        await until(stage.is_told(sandbox_id, "resumed"))  # by us: nobody had asked for a pause
        await until(stage.is_idle())
        await stage.ask(sandbox_id, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, sandbox_id))
        await until(stage.is_idle())
        await there.unpause()
        await until(paused_three_times)  # by us again
        await until(stage.is_idle())
        outside, *_ = await engine_times(docker, there.id, "pause")
        assert await told(ev.Paused) == [outside, None, None]
        _, outside = await engine_times(docker, there.id, "unpause")
        assert await told(ev.Resumed) == [None, outside]

        await there.delete(force=True)
        await until(stage.is_phase(Phase.FAILED, sandbox_id))
        lost = (await stage.history(sandbox_id))[-1].event
        assert isinstance(lost, ev.RuntimeLost)
        assert [lost.occurred_at] == await engine_times(docker, there.id, "destroy")


async def test_an_orphan_on_docker_is_swept(stage: Stage, driver: DockerDriver, until):
    worker = stage.worker(driver, orphan_grace=0)
    await worker.station.contact()
    sandbox_id: UUID = await stage.create(image=IMAGE)
    work = await worker.reconciler._workloads.of(await stage.sandbox(sandbox_id))
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    await driver.ensure(work)  # a create that came too late
    assert await left(driver) == 1

    async def swept() -> bool:
        await worker.sweeper.sweep()
        return await left(driver) == 0

    await until(swept)
