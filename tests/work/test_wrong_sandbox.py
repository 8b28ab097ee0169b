"""A client of one sandbox never gets an answer of another, however fast sandboxes end and begin.

An engine gives the address of a container that ended to the next one at once, and the log knows of the end a moment
later at best. Here it does not get to know: no hint is followed. So an old address is used for as long as the test runs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import UUID, uuid4

import aiodocker
import pytest

from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox.address import Way, own_link, own_network
from app.domain.sandbox.state import Phase
from app.runtime.docker import DockerOptions, connect, names
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.settings import DockerSettings
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from app.work.worker import Worker
from tests.api.conftest import MakeContext, make_context
from tests.proxy.rig import Rig, request, say, serving
from tests.support.marks import remove_mark
from tests.support.needs import refuse_or_skip
from tests.work.stage import Stage

__all__ = ["make_context"]
pytestmark = pytest.mark.engine
IMAGE = "sandledger-demo:1"
PORT, CLIENTS = 3000, 16
ANSWER = (
    "while read -r line && [ ${#line} -gt 1 ]; do :; done; "
    "printf 'HTTP/1.1 200 OK\\r\\nContent-Length: 36\\r\\nConnection: close\\r\\n\\r\\n%s' $OPENSANDBOX_ID"
)
PROGRAM = ("nc", "-ll", "-p", str(PORT), "-e", "sh", "-c", ANSWER)
"""Says whose it is to everybody."""


@pytest.fixture
async def service(database: Database, signal: Signal) -> Service:
    """No engine is known yet."""
    return Service(database, signal)


@pytest.fixture
async def stage(dsn: str, database: Database, service: Service, signal: Signal, sealer: Sealer) -> Stage:
    made = Stage(dsn, database, service, signal, sealer)
    made.installation = uuid4()
    made.engines = Engines(database, signal, made.installation, service.engines)
    return made


@pytest.fixture
async def docker(docker_host: str, stage: Stage) -> AsyncIterator[aiodocker.Docker]:
    async with aiodocker.Docker(docker_host) as docker:
        await ensure_busybox_image(docker, IMAGE)
        yield docker
        await remove_containers(docker, stage.installation)
        await remove_mark(docker, stage.installation)


async def remove_containers(docker: aiodocker.Docker, installation: UUID) -> None:
    ours = json.dumps({"label": [f"{names.INSTALLATION}={installation}"]})
    for row in await docker.containers.list(all="1", filters=ours):
        await row.delete(force=True, v=True)


@pytest.fixture
async def engines_choice(docker: aiodocker.Docker, stage: Stage) -> AsyncIterator[str]:
    """A network of an operator, on which the engine hands out addresses, and nobody else is."""
    name = f"slchoice-{uuid4().hex[:8]}"
    await docker.networks.create({"Name": name, "CheckDuplicate": True, "Driver": "bridge"})
    yield name
    await remove_containers(docker, stage.installation)
    await (await docker.networks.get(name)).delete()


@pytest.fixture
async def hire(stage: Stage, docker_host: str, docker: aiodocker.Docker) -> AsyncIterator[Callable[[str], Worker]]:
    drivers = []

    def make(mode: str) -> Worker:
        subnets = DockerSettings().subnets
        options = DockerOptions(installation=stage.installation, network_mode=mode, subnets=subnets)
        drivers.append(connect(options, docker_host))
        return stage.worker(drivers[-1])

    yield make
    for driver in drivers:
        await driver.close()


class Clients:
    """Of the last sandboxes that there were. They ask all the time."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._tasks: list[asyncio.Task[None]] = []
        self.own = 0
        self.errors = 0
        self.wrong: list[tuple[UUID, str]] = []

    def begin(self, sandbox: UUID) -> None:
        self._tasks.append(asyncio.create_task(self._ask(sandbox)))
        if len(self._tasks) > CLIENTS:
            self._tasks.pop(0).cancel()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self, sandbox: UUID) -> None:
        while True:
            await self.once(sandbox)

    async def once(self, sandbox: UUID) -> bool:
        """True = it got an answer of a sandbox."""
        try:
            async with asyncio.timeout(5):
                got = await say(self._rig.port, request(f"/sandboxes/{sandbox}/proxy/{PORT}/"))
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            self.errors += 1
            return False
        if got.status != 200:
            self.errors += 1
            return False
        said = got.body.decode()
        if said and said != str(sandbox):
            self.wrong.append((sandbox, said))
        self.own += said == str(sandbox)
        return True


async def chase(stage: Stage, worker: Worker, docker: aiodocker.Docker, clients: Clients, rounds: int) -> None:
    """One ends, and the next begins, as fast as the engine can."""
    before: UUID | None = None
    for _ in range(rounds):
        sandbox = await stage.create(image=IMAGE, entrypoint=PROGRAM)
        if before is not None:
            await docker.containers.container(f"sandbox-{before}").kill()
        await stage.turn(worker)
        assert await stage.phase(sandbox) is Phase.RUNNING
        clients.begin(sandbox)
        async with asyncio.timeout(60):
            while not await clients.once(sandbox):  # its program is on its way up
                await asyncio.sleep(0.01)
        if before is not None:
            await clients.once(before)
            assert await stage.phase(before) is Phase.RUNNING, "nobody has told the log"
        before = sandbox


async def played(
    stage: Stage, docker: aiodocker.Docker, make: MakeContext, worker: Worker, network: str, rounds: int
) -> Clients:
    way = Way(own_network=network, stands_on=lambda _: True)
    async with serving(make(api_key=None), way=way) as rig:
        clients = Clients(rig)
        try:
            await chase(stage, worker, docker, clients, rounds)
        finally:
            await clients.end()
    return clients


async def _compared(
    stage: Stage,
    docker: aiodocker.Docker,
    make: MakeContext,
    hire: Callable[[str], Worker],
    choice: str,
    rounds: int,
) -> None:
    ours = hire("bridge")
    await ours.station.contact()
    found = await played(stage, docker, make, ours, own_network(stage.installation), rounds)
    if not (Path("/sys/class/net") / own_link(own_network(stage.installation))).exists():
        refuse_or_skip("the engine is on another machine")
    assert found.wrong == []
    assert found.own >= rounds
    assert found.errors >= rounds - 1, "those of sandboxes that have ended"
    naive = await played(stage, docker, make, hire(choice), choice, 3)
    assert naive.wrong, "without leases an address has the next owner at once"


async def test_an_answer_is_ones_own_or_an_error(
    stage: Stage,
    docker: aiodocker.Docker,
    make_context: MakeContext,
    hire: Callable[[str], Worker],
    engines_choice: str,
):
    await _compared(stage, docker, make_context, hire, engines_choice, 3)


@pytest.mark.proof
@pytest.mark.timeout(900)
async def test_forty_ends_and_beginnings(
    stage: Stage,
    docker: aiodocker.Docker,
    make_context: MakeContext,
    hire: Callable[[str], Worker],
    engines_choice: str,
):
    await _compared(stage, docker, make_context, hire, engines_choice, 40)
