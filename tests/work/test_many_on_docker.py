"""Many sandboxes with an agent on a real engine: ports that strangers have, and what is left afterwards."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from typing import Any
from uuid import uuid4

import aiodocker
import pytest

from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.address import Way, own_network
from app.domain.sandbox.state import Phase
from app.runtime.docker import DockerDriver, DockerOptions, connect, names
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.settings import DockerSettings
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from app.work.agents import AgentPolicy
from tests.agent.image import ensure_agent_image
from tests.support.marks import remove_mark
from tests.work.stage import Stage

pytestmark = pytest.mark.engine
IMAGE = "sandledger-demo:1"
STAYS = ("sleep", "3600")


class Rig:
    def __init__(self, docker: aiodocker.Docker, host: str) -> None:
        self.docker = docker
        self.installation = uuid4()
        self._host = host
        self._drivers: list[DockerDriver] = []

    def driver(self, **options: Any) -> DockerDriver:
        subnets = DockerSettings().subnets
        given = DockerOptions(installation=self.installation, network_mode="bridge", subnets=subnets, **options)
        self._drivers.append(connect(given, self._host))
        return self._drivers[-1]

    @property
    def ours(self) -> str:
        return json.dumps({"label": [f"{names.INSTALLATION}={self.installation}"]})

    async def census(self) -> dict[str, set[str]]:
        """What the engine has of this installation."""
        volumes = (await self.docker.volumes.list(filters=json.loads(self.ours)))["Volumes"] or []
        return {
            "containers": {each.id for each in await self.docker.containers.list(all="1", filters=self.ours)},
            "volumes": {each["Name"] for each in volumes},
            "networks": {each["Id"] for each in await self.docker.networks.list(filters=json.loads(self.ours))},
            "images": {each["Id"] for each in await self.docker.images.list() if self._is_ours(each)},
        }

    def _is_ours(self, image: dict[str, Any]) -> bool:
        return (image["Labels"] or {}).get(names.INSTALLATION) == str(self.installation)

    async def close(self) -> None:
        for driver in self._drivers:
            await driver.close()
        rows = await self.docker.containers.list(all="1", filters=self.ours)
        await asyncio.gather(*(row.delete(force=True, v=True) for row in rows))
        await remove_mark(self.docker, self.installation)


@pytest.fixture
async def rig(docker_host: str) -> AsyncIterator[Rig]:
    async with aiodocker.Docker(docker_host) as docker:
        await ensure_busybox_image(docker, IMAGE)
        rig = Rig(docker, docker_host)
        try:
            yield rig
        finally:
            await rig.close()


def half_taken(stack: ExitStack, count: int) -> tuple[int, int]:
    """A range of so many ports, and strangers on a random half of them. Below what the machine gives to clients."""
    first = random.randint(12000, 32000 - count)
    for port in random.sample(range(first, first + count), count // 2):
        with suppress(OSError):  # somebody else has it already
            _listen(stack, port)
    return first, first + count - 1


def _listen(stack: ExitStack, port: int) -> None:
    taken = stack.enter_context(socket.socket())
    taken.bind(("127.0.0.1", port))
    taken.listen()


@pytest.fixture
async def stage(dsn: str, database: Database, signal: Signal, sealer: Sealer, rig: Rig) -> Stage:
    service = Service(database, signal)
    made = Stage(dsn, database, service, signal, sealer)
    made.installation = rig.installation
    made.engines = Engines(database, signal, made.installation, service.engines)
    return made


@pytest.mark.parametrize(
    "creates", [4, pytest.param(200, marks=[pytest.mark.proof, pytest.mark.timeout(900)])], ids=["few", "many"]
)
async def test_half_of_the_range_is_taken_and_none_fails(stage: Stage, rig: Rig, until: Any, creates: int):
    """An attempt may: it tries a few ports. Then there is another."""
    agent = AgentPolicy(await ensure_agent_image(rig.docker), b"k" * 32)
    with ExitStack() as stack:
        ports = half_taken(stack, 8 * creates)
        async with stage.working(stage.worker(rig.driver(port_range=ports), agent=agent)):
            made = await asyncio.gather(*(stage.create(image=IMAGE, entrypoint=STAYS) for _ in range(creates)))
            async with asyncio.timeout(30 + 3 * creates):
                while not await stage.is_phase(Phase.RUNNING, *made)():
                    await asyncio.sleep(0.1)
        addresses = [(await stage.sandbox(each)).address for each in made]
        published = {int(port.rpartition(":")[2]) for each in addresses if each for port in each.ports.values()}
        assert len(published) == 2 * creates
        assert all(ports[0] <= port <= ports[1] for port in published)
        assert len({each.ip for each in addresses if each}) == creates


@pytest.mark.parametrize(
    "cycles", [1, pytest.param(100, marks=[pytest.mark.proof, pytest.mark.timeout(900)])], ids=["few", "many"]
)
async def test_what_is_left_is_what_was_there(stage: Stage, rig: Rig, until: Any, cycles: int):
    """After one life everything is there that stays: network, mark, the agent's files. More lives add nothing."""
    image = await ensure_agent_image(rig.docker)
    way = Way(own_network=own_network(rig.installation))
    agent = AgentPolicy(image, b"k" * 32, way=way)

    async def live() -> None:
        sandbox_id = await stage.create(image=IMAGE, entrypoint=STAYS)
        await until(stage.is_phase(Phase.RUNNING, sandbox_id))
        await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        await until(stage.is_idle())

    async with stage.working(stage.worker(rig.driver(), agent=agent)):
        await live()
        before, open_before = await rig.census(), len(os.listdir("/proc/self/fd"))
        assert len(before["networks"]) == 1
        assert len(before["volumes"]) == 2
        for _ in range(cycles):
            await live()
        assert await rig.census() == before
        assert len(os.listdir("/proc/self/fd")) <= open_before + 8, "connections that are kept"
    leased = await stage.sql("SELECT count(*) AS leased FROM addresses WHERE freed_at IS NULL")
    assert leased[0]["leased"] == 0
