"""Snapshots on a real Docker engine."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import aiodocker
import pytest
from aiodocker.containers import DockerContainer

from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.snapshot.state import SnapshotState
from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect
from app.runtime.driver import Misnamed, Observed, Ref
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer, Secrets
from tests.support.marks import remove_mark
from tests.support.needs import refuse_or_skip
from tests.work.stage import CLIENT, Stage

IMAGE = "sandledger-demo:1"
CANARY = "canary-7f3b9c1de4"


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
    for image in await made.snapshot_images():
        await made.drop_image(image.image_id)
    await remove_mark(docker, stage.installation)
    await made.close()


async def container(docker: aiodocker.Docker, sandbox: Sandbox) -> DockerContainer:
    assert sandbox.runtime is not None
    assert sandbox.runtime.main is not None
    return docker.containers.container(sandbox.runtime.main.runtime_id)


async def said(found: DockerContainer, *command: str) -> str:
    """What a command in the container writes."""
    run = await found.exec(list(command))
    async with run.start() as stream:
        parts: list[bytes] = []
        while (message := await stream.read_out()) is not None:
            parts.append(message.data)
    return b"".join(parts).decode()


async def saved(docker: aiodocker.Docker, name: str) -> dict[str, bytes]:
    """Everything that an image consists of, the files of its layers opened."""
    found: dict[str, bytes] = {}
    async with docker.images.export_image(name) as content:
        archive = await content.read()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                found[member.name] = file.read()
    return found


async def test_a_snapshot_has_the_files_and_nothing_else(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until: Any
):
    async with stage.working(stage.worker(driver)):
        source = await stage.create(
            image=IMAGE,
            secrets=Secrets({"TOKEN": CANARY}),
            entrypoint=("sh", "-c", "echo kept > /kept; sleep 600"),
        )
        await until(stage.is_phase(Phase.RUNNING, source))
        assert CANARY in await said(await container(docker, await stage.sandbox(source)), "env")
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(SnapshotState.READY, snapshot_id))
        await until(stage.is_idle())
        sandbox, snapshot = await stage.sandbox(source), await stage.snapshot(snapshot_id)
        assert (sandbox.phase, sandbox.frozen_by) == (Phase.RUNNING, None)
        assert (await (await container(docker, sandbox)).show())["State"]["Paused"] is False

        images = await driver.snapshot_images()
        assert [(image.snapshot_id, image.raw, image.image_id) for image in images] == [
            (snapshot_id, False, snapshot.image_id)
        ]
        content = await saved(docker, f"sandledger-snapshots:{snapshot_id}")
        assert len(content) >= 4
        assert not [name for name, data in content.items() if CANARY.encode() in data]

        copy = await stage.create(image="", snapshot_id=snapshot_id, entrypoint=("sleep", "600"))
        await until(stage.is_phase(Phase.RUNNING, copy))
        found = await container(docker, await stage.sandbox(copy))
        assert await said(found, "cat", "/kept") == "kept\n"
        assert CANARY not in json.dumps(await found.show())

        await stage.ask(copy, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, copy))
        await stage.service.snapshots.delete(snapshot_id, "default", CLIENT)
        await until(stage.is_snapshot(SnapshotState.REMOVED, snapshot_id))
        assert await driver.snapshot_images() == []
        await stage.ask(source, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, source))
        await until(stage.is_idle())
    told = await stage.told(source)
    assert [event for event in told if event != "waiting"][4:10] == [
        "started",
        "ready",
        "freeze_requested",
        "frozen",
        "thaw_requested",
        "thawed",
    ]
