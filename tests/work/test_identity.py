"""Whole workers and the wrong engine, a copy of the database, outages; and identity on a real engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import aiodocker
import pytest

from app.domain.engine import events as engine_events
from app.domain.engine.state import EngineState
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase
from app.domain.stream import Actor, ActorKind, Meta
from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect, names
from app.runtime.driver import EngineInfo, Image, Ref, Workload
from app.runtime.fake import FakeDriver, FakeEngine, name_of
from app.work.outages import ENGINE_STOPPED
from app.work.station import State
from tests.conftest import SIGHTING
from tests.work.field import Field
from tests.work.stage import Stage

OPERATOR = Meta(Actor(ActorKind.OPERATOR, "root", "root"), "test")


def at_another(stage: Stage, other: FakeEngine) -> FakeDriver:
    """A worker's driver with a stale address: an empty engine answers there."""
    return FakeDriver(other, stage.installation, name=stage.engine_name)


def many(engine: FakeEngine, call: str, times: int = 20):
    """A condition: the engine is asked so many times more."""
    start = engine.calls[call]

    async def asked() -> bool:
        return engine.calls[call] > start + times

    return asked


async def engine_told(stage: Stage) -> list[str]:
    history = await stage.engines.history(stage.engine_name)
    return [engine_events.REGISTRY.name_of(one.event).removeprefix("engine.") for one in history]


def says(stage: Stage, event: str):
    async def told() -> bool:
        return event in await engine_told(stage)

    return told


async def test_a_worker_at_another_engine_loses_and_removes_nothing(stage: Stage, until):
    """A stale DOCKER_HOST was enough to record every sandbox lost and to remove the containers on return."""
    right = stage.worker()
    kept, deleted = await stage.running(right), await stage.running(right)
    await stage.ask(deleted, cmd.Terminate())
    before = [await stage.told(one) for one in (kept, deleted)]
    other = FakeEngine()
    worker = stage.worker(at_another(stage, other), dark_after=0.3)
    async with stage.working(worker):
        await until(says(stage, "mismatch"))
        pending = await stage.create()
        await until(many(other, "mark"))
        assert worker.station.state is State.WRONG
        assert worker.alive
    assert set(other.calls) <= {"version", "info", "mark", "events"}, "no verb but check"
    assert [await stage.told(one) for one in (kept, deleted)] == before
    assert (await stage.sandbox(pending)).engine is None, "no placing on an engine that is not the right one"
    assert stage.container(kept) is not None
    assert stage.container(deleted) is not None
    async with stage.working(right):
        await until(says(stage, "back"))
        await until(stage.is_phase(Phase.TERMINATED, deleted))
        await until(stage.is_phase(Phase.RUNNING, kept, pending))
    assert stage.container(deleted) is None
    assert (await stage.told(kept)) == before[0]


async def test_without_the_comparison_everything_would_be_lost(stage: Stage, until):
    """The naive way of the test above: whatever answers is believed."""
    sandbox_id = await stage.running(stage.worker())

    class Believed(FakeDriver):
        async def check(self) -> EngineInfo:
            self.engine.marks[self.installation] = SIGHTING.mark or ""
            return await super().check()

    worker = stage.worker(Believed(FakeEngine(), stage.installation, name=stage.engine_name))
    async with stage.working(worker):
        await until(stage.is_phase(Phase.FAILED, sandbox_id))
    assert "runtime_lost" in await stage.told(sandbox_id)
    assert stage.container(sandbox_id) is not None, "while it runs"


async def test_an_engine_swapped_between_two_observations_loses_nothing(stage: Stage, until):
    worker = stage.worker(dark_after=0.3)
    sandbox_id = await stage.running(worker)
    mark, container = stage.engine.marks[stage.installation], stage.engine.containers[name_of(sandbox_id)]
    async with stage.working(worker):
        for _ in range(3):
            stage.engine.become_another()
            await until(many(stage.engine, "mark", 3))
            stage.engine.containers[container.name] = container
            stage.engine.marks[stage.installation] = mark
            await until(many(stage.engine, "mark", 3))
    assert "runtime_lost" not in await stage.told(sandbox_id)
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_a_worker_on_a_copy_of_the_database_harms_nothing(stage: Stage, until):
    """The copy knows a sandbox that the original still has, and the original made more since."""
    worker = stage.worker()
    kept = await stage.running(worker)
    await stage.ask(kept, cmd.Terminate())  # only the copy believes this
    later = uuid4()
    work = Workload(Ref(later), "default", Image("busybox"), ("sleep",), {}, position=1_000_000)
    stage.engine.make(name_of(later), work, stage.installation)
    async with stage.working(stage.worker()):
        await until(says(stage, "mismatch"))
        await until(many(stage.engine, "mark"))
    assert stage.container(kept) is not None
    assert stage.container(later) is not None
    engine = await stage.engines.load(stage.engine_name)
    assert engine is not None
    assert engine.state is EngineState.MISMATCH
    assert engine.trouble.startswith("LOG_WENT_BACK")
    await stage.engines.trust(stage.engine_name, OPERATOR)
    async with stage.working(stage.worker(orphan_grace=0, sweep_confirm=0.01)):
        await until(stage.is_phase(Phase.TERMINATED, kept))

        async def swept() -> bool:
            return stage.container(later) is None

        await until(swept)


async def test_an_exit_while_the_engine_was_away_says_so(stage: Stage, until):
    """Without it clients read "exited with code 137", and nothing of the engine."""
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    alone = await stage.running(worker)
    async with stage.working(worker):
        await until(many(stage.engine, "mark", 2))
        stage.engine.exit(alone, 137)
        await until(stage.is_phase(Phase.FAILED, alone))
        stage.engine.down = True

        async def away() -> bool:
            return worker.station.state is State.AWAY

        await until(away)
        stage.engine.lose_power()
        stage.engine.down = False
        await until(stage.is_phase(Phase.FAILED, sandbox_id))
    last = (await stage.history(sandbox_id))[-1].event
    assert isinstance(last, ev.RuntimeExited)
    assert (last.exit_code, last.reason) == (137, ENGINE_STOPPED)
    assert "The engine was away" in last.message
    first = (await stage.history(alone))[-1].event
    assert isinstance(first, ev.RuntimeExited)
    assert first.reason is None


async def test_work_goes_on_at_once_when_the_engine_is_back(stage: Stage, until):
    """The waits of sandboxes had grown during the outage; they do not count any more."""
    worker = stage.worker()
    async with stage.working(worker):
        await until(many(stage.engine, "mark", 2))
        stage.engine.down = True
        sandboxes = [await stage.create() for _ in range(5)]

        async def away() -> bool:
            return worker.station.state is State.AWAY

        await until(away)
        await stage.sql("UPDATE reconcile_queue SET due_at = clock_timestamp() + interval '5 minutes'")
        stage.engine.down = False
        await until(stage.is_phase(Phase.RUNNING, *sandboxes))


# --- a real engine


@pytest.fixture
async def docker(docker_host: str, field: Field) -> AsyncIterator[tuple[DockerDriver, aiodocker.Docker]]:
    driver = connect(DockerOptions(installation=field.installation), docker_host)
    async with aiodocker.Docker(docker_host) as direct:
        try:
            yield driver, direct
        finally:
            await driver.close()
            await forget(direct, field)


async def forget(direct: aiodocker.Docker, field: Field) -> None:
    volume = await direct.volumes.get(names.mark_name(field.installation))
    await volume.delete()


@pytest.mark.engine
async def test_identity_on_a_real_engine(field: Field, docker: tuple[DockerDriver, aiodocker.Docker], until):
    driver, direct = docker
    station = field.station(driver, engine_check=30)
    assert await station.confirm_identity()
    engine = await field.known_engine(driver.name)
    assert (engine.kind, engine.state) == ("docker", EngineState.UP)
    assert engine.capacity.memory_bytes
    found = await direct.volumes.get(names.mark_name(field.installation))
    labels = (await found.show())["Labels"]
    assert engine.mark in labels.values()
    await forget(direct, field)
    assert not await station.confirm_identity()
    assert station.state is State.WRONG
    async with field.running(station):

        async def told() -> bool:
            return (await field.engine_told(driver.name))[-1] == "mismatch"

        await until(told)
    for volume in (await direct.volumes.list())["Volumes"] or []:
        assert volume["Name"] != names.mark_name(field.installation), "it is not made a second time"
    await direct.volumes.create({"Name": names.mark_name(field.installation), "Labels": labels})
    assert await station.contact()
    assert (await field.engine_told(driver.name))[-1] == "back"


@pytest.mark.engine
async def test_an_address_where_no_engine_is(field: Field, tmp_path):
    driver = connect(DockerOptions(installation=field.installation), f"unix://{tmp_path}/none.sock")
    try:
        station = field.station(driver)
        assert not await station.contact()
        assert station.state is State.AWAY
        assert station.trouble
        wait = await station.suspect(uuid4(), RuntimeUnavailable("refused"))
        assert wait <= field.station()._policy.engine_probe
    finally:
        await driver.close()
