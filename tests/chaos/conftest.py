"""Real servers, a real engine, and what must be true after each test: nothing of ours is left."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from uuid import UUID

import aiodocker
import asyncpg
import pytest

from app.cli.local_image import ensure_busybox_image
from tests.chaos.harness import Engine, ServerProcess, end, write_config
from tests.conftest import ROOT, as_server
from tests.drivers.proxy import EngineProxy
from tests.engine.own import OwnEngine

IMAGE = "sandledger-test:1"


@pytest.fixture
def home() -> Iterator[Path]:
    """A short-lived folder for configuration, state and logs."""
    path = Path(tempfile.mkdtemp(prefix="sandledger-chaos-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
async def docker(docker_host: str) -> AsyncIterator[aiodocker.Docker]:
    """The engine's own client."""
    async with aiodocker.Docker(url=docker_host) as client:
        yield client


@pytest.fixture
async def image(docker: aiodocker.Docker) -> str:
    """A tiny local image."""
    return await ensure_busybox_image(docker, IMAGE)


@pytest.fixture
async def installation(dsn: str) -> UUID:
    """The label of this test's objects."""
    connection = await asyncpg.connect(dsn)
    try:
        return UUID(str(await connection.fetchval("SELECT id FROM installation")))
    finally:
        await connection.close()


@pytest.fixture
async def engine(docker: aiodocker.Docker, installation: UUID) -> AsyncIterator[Engine]:
    """The engine seen from outside; cleared at the end, whatever the test left."""
    seen = Engine(docker)
    yield seen
    await seen.forget(installation)


@pytest.fixture
async def serve(
    home: Path, dsn: str, docker_host: str, docker: aiodocker.Docker
) -> AsyncIterator[Callable[..., Awaitable[ServerProcess]]]:
    """Start server processes on this test's database. At the end all are killed, and the engine has nothing of them."""
    started: list[ServerProcess] = []

    async def start(
        role: str = "all",
        name: str = "server",
        host: str | None = None,
        environ: dict[str, str] | None = None,
        database: str = dsn,
        tree: Path = ROOT,
        **tables: str,
    ) -> ServerProcess:
        config = write_config(home, as_server(database), host or docker_host, name, database, **tables)
        process = ServerProcess(config, role, tree, **(environ or {}))
        started.append(process)
        # In a thread: the engine's proxy may live in this very loop.
        return await asyncio.to_thread(process.start)

    yield start
    await end(docker, started)


@pytest.fixture
def own() -> Iterator[OwnEngine]:
    """An engine that the test may kill."""
    engine = OwnEngine()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
async def proxy(docker_host: str) -> AsyncIterator[EngineProxy]:
    """The engine behind a proxy that can refuse, delay and go away."""
    made = EngineProxy(docker_host)
    await made.up()
    yield made
    await made.close()
