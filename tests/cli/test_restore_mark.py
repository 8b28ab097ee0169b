"""`sandledger engines restore-mark`: the way out where somebody removed the volume by which an engine is known."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import aiodocker
import pytest

from app.cli import engines as cli
from app.cli.local_image import ensure_busybox_image
from app.domain.engine import events as engine_events
from app.domain.engine.state import EngineState
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase
from app.domain.stream import ActorKind
from app.errors import RuntimeUnavailable, SettingsError
from app.runtime.docker import DockerOptions, connect, names
from app.runtime.driver import Driver
from app.runtime.fake import FakeDriver, FakeEngine
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.settings import Settings
from app.store.database.installation import read_installation
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from app.work.station import State
from tests.work.stage import Stage


@pytest.fixture
async def stage(dsn: str, database: Database, signal: Signal, sealer: Sealer) -> Stage:
    """As the servers of this database see it: the command reads the installation from there."""
    service = Service(database, signal)
    made = Stage(dsn, database, service, signal, sealer)
    made.installation = (await read_installation(database)).id
    made.engines = Engines(database, signal, made.installation, service.engines)
    made.engine_name = "fake"
    return made


async def restore(stage: Stage, settings: Settings, engine: FakeEngine | None = None, **options: Any) -> str:
    """Run the command at this engine; what it said."""
    said: list[str] = []

    def make(_settings: Settings, installation: UUID) -> Driver:
        return FakeDriver(engine or stage.engine, installation, name=options.pop("driver", "fake"))

    await cli.restore_mark(
        settings, options.pop("name", "fake"), said.append, force=options.get("force", False), make_driver=make
    )
    return said[-1]


async def told(stage: Stage) -> list[str]:
    return [engine_events.REGISTRY.name_of(one.event) for one in await stage.engines.history("fake")]


async def test_a_container_of_the_log_proves_it_and_work_goes_on(stage: Stage, settings: Settings):
    worker = stage.worker()
    kept, ended = await stage.running(worker), await stage.running(worker)
    stage.engine.marks.clear()
    stage.engine.destroy(f"sandbox-{ended}")
    assert not await worker.station.contact()
    assert worker.station.state is State.WRONG
    assert "restore" not in " ".join(await told(stage))

    assert "1 of 2 objects" in await restore(stage, settings)
    last = (await stage.engines.history("fake"))[-1]
    known = await stage.engines.load("fake")
    assert known is not None
    assert last.event == engine_events.MarkRestored(known.mark, 2, 1)
    assert last.meta.actor.kind == ActorKind.OPERATOR
    assert stage.engine.marks[stage.installation] == known.mark

    assert await worker.station.contact()
    assert await stage.phase(kept) is Phase.RUNNING
    await stage.ask(kept, cmd.Terminate())
    await stage.settle(worker)
    assert await stage.phase(kept) in (Phase.STOPPING, Phase.TERMINATED)


async def test_a_renamed_container_proves_it_too(stage: Stage, settings: Settings):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    stage.engine.rename(sandbox_id, "renamed")
    stage.engine.marks.clear()
    assert "1 of 1 objects" in await restore(stage, settings)


async def test_another_engine_proves_nothing(stage: Stage, settings: Settings):
    """A mark on the wrong engine would have every sandbox recorded as lost."""
    worker = stage.worker()
    await stage.running(worker)
    other = FakeEngine()
    with pytest.raises(SettingsError, match=r"none of the 1 objects .* seems to be another one"):
        await restore(stage, settings, other)
    assert other.marks == {}
    assert "engine.mark_restored" not in await told(stage)
    await restore(stage, settings, other, force=True)
    assert other.marks[stage.installation] == stage.engine.marks[stage.installation]


async def test_copies_of_labels_prove_nothing(stage: Stage, settings: Settings):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    other = FakeEngine()
    copied = stage.engine.of(sandbox_id)
    assert copied is not None
    other.make("a stranger")  # its id is the one that the log has, so the copies have others
    other.make("a copy", copied.work, stage.installation)
    other.make(copied.name, copied.work, stage.installation)
    with pytest.raises(SettingsError, match="none of the 1 objects"):
        await restore(stage, settings, other)


async def test_without_objects_the_engines_own_id_proves_it(stage: Stage, settings: Settings):
    worker = stage.worker()
    assert await worker.station.contact()
    stage.engine.marks.clear()
    assert "0 of 0 objects" in await restore(stage, settings)
    other = FakeEngine()
    with pytest.raises(SettingsError, match="add --force"):
        await restore(stage, settings, other)


async def test_it_does_nothing_where_nothing_is_lost(stage: Stage, settings: Settings):
    worker = stage.worker()
    assert await worker.station.contact()
    before = await told(stage)
    assert "nothing to do" in await restore(stage, settings)
    stage.engine.marks[stage.installation] = "another"
    with pytest.raises(SettingsError, match="bears another mark"):
        await restore(stage, settings, force=True)
    with pytest.raises(SettingsError, match="sandledger engines ls"):
        await restore(stage, settings, name="other")
    with pytest.raises(SettingsError, match="these settings lead to engine elsewhere"):
        await restore(stage, settings, driver="elsewhere")
    assert await told(stage) == before


async def test_a_mark_that_could_not_be_made_is_made_by_the_next_run(stage: Stage, settings: Settings):
    worker = stage.worker()
    await stage.running(worker)
    stage.engine.marks.clear()

    async def away(call: str) -> None:
        if call == "make_volume":
            raise RuntimeUnavailable("away")

    def make(_settings: Settings, installation: UUID) -> Driver:
        return FakeDriver(stage.engine, installation, name="fake", before=away)

    with pytest.raises(RuntimeUnavailable):
        await cli.restore_mark(settings, "fake", print, force=False, make_driver=make)
    assert stage.engine.marks == {}
    await restore(stage, settings)
    assert await worker.station.contact()


@pytest.mark.engine
async def test_on_a_real_engine(stage: Stage, settings: Settings, docker_host: str, until: Any):
    """`docker volume rm` under a worker, the command, and the same sandboxes go on."""
    volume = names.mark_name(stage.installation)
    driver = connect(DockerOptions(installation=stage.installation), docker_host)
    async with aiodocker.Docker(docker_host) as docker:
        await ensure_busybox_image(docker, "sandledger-demo:1")
        worker = stage.worker(driver)
        try:
            async with stage.working(worker):
                sandbox_id = await stage.create(image="sandledger-demo:1")
                await until(stage.is_phase(Phase.RUNNING, sandbox_id))
                await (await docker.volumes.get(volume)).delete()

                async def is_wrong() -> bool:
                    return worker.station.state is State.WRONG

                await until(is_wrong)
                said: list[str] = []
                # What a person would try first. No event may say that a mark was made then.
                await docker.volumes.create({"Name": volume})

                def make(_settings: Settings, installation: UUID) -> Driver:
                    return connect(DockerOptions(installation=installation), docker_host)

                with pytest.raises(SettingsError, match=f"docker volume rm {volume}"):
                    await cli.restore_mark(settings, driver.name, said.append, force=True, make_driver=make)
                history = await stage.engines.history(driver.name)
                assert not any(isinstance(one.event, engine_events.MarkRestored) for one in history)
                await (await docker.volumes.get(volume)).delete()
                await cli.restore_mark(settings, driver.name, said.append, force=False, make_driver=make)
                assert "1 of 1 objects" in said[-1]

                async def is_usable() -> bool:
                    return worker.station.state is State.USABLE

                await until(is_usable)
                assert await stage.phase(sandbox_id) is Phase.RUNNING
                await stage.ask(sandbox_id, cmd.Terminate())
                await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        finally:
            await driver.close()
            await (await docker.volumes.get(volume)).delete()
    engine = await stage.engines.load(driver.name)
    assert engine is not None
    assert engine.state is EngineState.UP
    assert "runtime_lost" not in await stage.told(sandbox_id)
