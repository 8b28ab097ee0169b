"""Snapshots on a real Docker engine."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import aiodocker
import pytest
from aiodocker.containers import DockerContainer

from app.agent import agent_token
from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.snapshot.state import SnapshotState
from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect
from app.runtime.driver import Misnamed, Observed, Ref
from app.runtime.faults import ImageMissing
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer, Secrets
from app.work.agents import AgentPolicy
from tests.agent.image import ensure_tiny_agent_image
from tests.drivers.rig import workload
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
    ours = json.dumps({"label": [f"sandledger.io/installation={stage.installation}"]})
    for each in await docker.containers.list(all=True, filters=ours):  # that of the agent's files
        await each.delete(force=True, v=True)
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


async def root_of(docker: aiodocker.Docker) -> Path:
    return Path((await docker.system.info())["DockerRootDir"])


def on_disk(root: Path, word: str) -> list[Path]:
    """Files of images and containers that the engine keeps, layers apart, in which the word stands."""
    folders = [folder for folder in (root / "image", root / "containers") if os.access(folder, os.R_OK | os.X_OK)]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if word.encode() in _content(file)]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:  # of another test's container, gone meanwhile
        return b""


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
        assert not on_disk(await root_of(docker), CANARY)
    told = await stage.told(source)
    assert [event for event in told if event != "waiting"][4:10] == [
        "started",
        "ready",
        "freeze_requested",
        "frozen",
        "thaw_requested",
        "thawed",
    ]


async def test_neither_token_nor_environment_of_a_source_with_an_agent_stays(
    stage: Stage, database: Database, signal: Signal, docker: aiodocker.Docker, driver: DockerDriver, until: Any
):
    """Its agent never answers, which makes it Running all the same."""
    key = b"k" * 32
    stage.limits = Limits(ready_s=0.5)
    stage.agent = AgentPolicy(await ensure_tiny_agent_image(docker), key)
    stage.service = Service(database, signal, stage.limits)
    async with stage.working(stage.worker(driver)):
        source = await stage.create(image=IMAGE, secrets=Secrets({"TOKEN": CANARY}))
        await until(stage.is_phase(Phase.RUNNING, source))
        sandbox = await stage.sandbox(source)
        assert sandbox.object_id is not None
        token = agent_token(key, sandbox.object_id, sandbox.generation)
        assert token in json.dumps((await (await container(docker, sandbox)).show())["Config"]["Env"])
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(SnapshotState.READY, snapshot_id))
        await stage.ask(source, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, source))
        content = await saved(docker, f"sandledger-snapshots:{snapshot_id}")
        for secret in (token, CANARY, "EXECD"):
            assert not [name for name, data in content.items() if secret.encode() in data]
        root = await root_of(docker)
        assert not on_disk(root, token)
        assert not on_disk(root, CANARY)


async def test_a_copy_that_a_person_disturbs_is_not_used(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until: Any
):
    """The engine itself answers that all is well."""
    worker = stage.worker(driver)
    async with stage.working(worker):
        script = "dd if=/dev/urandom of=/big bs=1M count=48 2>/dev/null; i=0; while true; do i=$((i+1)); echo $i >> /lines; done"
        source = await stage.create(image=IMAGE, entrypoint=("sh", "-c", script))
        await until(stage.is_phase(Phase.RUNNING, source))
        found = await container(docker, await stage.sandbox(source))

        async def writes() -> bool:
            return bool((await said(found, "sh", "-c", "cat /lines 2>/dev/null")).strip())

        await until(writes)
        snapshot_id = await stage.take(source)

        async def copying() -> bool:
            return worker.commits.busy

        await until(copying)
        await found.unpause()
        await until(stage.is_snapshot(SnapshotState.READY, snapshot_id), 60)
        await until(stage.is_idle())
        reasons = [r.event.reason for r in await stage.history(source) if isinstance(r.event, ev.ThawRequested)]
        assert reasons[-1] == "DONE"
        assert reasons[:-1], "the first copy was used"
        assert set(reasons[:-1]) == {"BROKEN"}
        copy = await stage.create(image="", snapshot_id=snapshot_id, entrypoint=("sleep", "600"))
        await until(stage.is_phase(Phase.RUNNING, copy))
        lines = (await said(await container(docker, await stage.sandbox(copy)), "cat", "/lines")).split("\n")[:-1]
        assert [int(line) for line in lines] == list(range(1, len(lines) + 1))
        for each in (copy, source):
            await stage.ask(each, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, copy, source))


async def test_the_beginning_of_an_id_is_no_name_of_an_image(
    stage: Stage, docker: aiodocker.Docker, driver: DockerDriver, until: Any
):
    """The engine would run it, of whichever tenant it is: a few digits are soon guessed."""
    async with stage.working(stage.worker(driver)):
        source = await stage.create(image=IMAGE)
        await until(stage.is_phase(Phase.RUNNING, source))
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(SnapshotState.READY, snapshot_id))
        image_id = (await stage.snapshot(snapshot_id)).image_id
        assert image_id is not None
        digits = image_id.removeprefix("sha256:")[:12]
        assert (await docker.images.inspect(digits))["Id"] == image_id, "the engine takes it for the image"
        with pytest.raises(ImageMissing):
            await driver.ensure(workload(image=digits))
        assert await driver.image(digits) is None, "nor does a pull find it there and tell its id"
        await stage.ask(source, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, source))
