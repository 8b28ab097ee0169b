"""Shared parts: a real PostgreSQL for each process, a fresh migrated database for each test, a real engine if one runs.

The suite runs in one process (`pytest`) or in several (`pytest -n 3`, pytest-xdist). Servers: `tests.support.clusters`.
"""

from __future__ import annotations

import asyncio
import os
import signal as signals
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiodocker
import asyncpg
import pytest

from app.domain.engine.decide import Sighting
from app.domain.stream import Actor, ActorKind, Meta
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.dsn import address
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from tests.support import clusters, drift
from tests.support.needs import refuse_or_skip

ROOT = Path(__file__).resolve().parents[1]
INSTALLATION = uuid.UUID("0198f000-0000-7000-8000-00000000aaaa")
SIGHTING = Sighting("default", "fake", "fake-engine", "fake-mark", "1", "1")
STATION = Meta(Actor(ActorKind.RECONCILER, "station", "test"), "test")
SERVER = "sandledger_server"
"""The login of servers."""


def _run(dsn: str, *statements: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(dsn)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())


_FOLDER = pytest.StashKey[Path]()
"""The folder of this run's servers, in the process that made it."""
MAX_WORKERS = 8
"""All of them share one engine."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder, unless this process was started by the one that made it."""
    if not hasattr(config, "workerinput"):
        config.stash[_FOLDER] = clusters.make_folder()
        # SIGTERM (of `timeout`, of CI) ends the run as Ctrl-C does. Otherwise nobody would stop the servers.
        signals.signal(signals.SIGTERM, signals.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each worker of pytest-xdist where the folder is."""
    node.workerinput["clusters"] = str(node.config.stash[_FOLDER])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` means. One process more than there are cores: many tests wait for an engine or for a timer."""
    return min(len(os.sched_getaffinity(0)) + 1, MAX_WORKERS)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Runs after a failed or interrupted run too, when all workers have ended."""
    if folder := config.stash.get(_FOLDER, None):
        clusters.end(folder)


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> Iterator[EmbeddedPostgres]:
    """The embedded server of this process."""
    worker: dict[str, str] = getattr(pytestconfig, "workerinput", {})
    folder = Path(worker["clusters"]) if worker else pytestconfig.stash[_FOLDER]
    server = EmbeddedPostgres.start(clusters.home(folder, worker.get("workerid", "main")))
    try:
        # Each test copies and drops a database, which would have the disk flush thousands of files. A killed process
        # loses nothing by it. Only tests of a server of their own say anything about durability.
        settings = ("fsync = off", "max_wal_size = '256MB'")
        _run(server.dsn, *[f"ALTER SYSTEM SET {one}" for one in settings], "SELECT pg_reload_conf()")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def template(postgres: EmbeddedPostgres) -> str:
    """A migrated database to copy from."""
    _run(postgres.dsn, "CREATE DATABASE template_test")
    asyncio.run(migrate(on_database(postgres.dsn, "template_test"), admit=address(as_server(postgres.dsn))))
    return "template_test"


def on_database(dsn: str, name: str) -> str:
    """The same server, another database."""
    head, _, query = dsn.partition("?")
    return f"{head.rpartition('/')[0]}/{name}" + (f"?{query}" if query else "")


def cloned(name: str, template: str) -> tuple[str, ...]:
    """Statements that copy a migrated database, with what belongs to the database itself and is not copied."""
    return (
        f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy",
        # For plain connections of tests; servers pin their own.
        f"ALTER DATABASE {name} SET search_path = sandledger, public",
        f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC",
    )


def as_server(dsn: str) -> str:
    """The same database, as servers log in."""
    return dsn.replace("postgres@", f"{SERVER}@")


@pytest.fixture
def dsn(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """A fresh database, as its owner. At the end every stream in it must fold to its head row."""
    name = f"t_{uuid.uuid4().hex}"
    _run(postgres.dsn, *cloned(name, template))
    address = on_database(postgres.dsn, name)
    try:
        yield address
        asyncio.run(drift.assert_no_drift(address))
    finally:
        _run(postgres.dsn, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """The application's pool on the fresh database."""
    opened = Database(as_server(dsn))
    yield opened
    await opened.close()


@pytest.fixture
async def signal(database: Database) -> AsyncIterator[Signal]:
    """A running signal."""
    made = Signal(database)
    task = asyncio.create_task(made.run())
    yield made
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def service(database: Database, signal: Signal) -> Service:
    """The write path, with one engine to place sandboxes on."""
    made = Service(database, signal)
    await Engines(database, signal, INSTALLATION, made.engines).register(SIGHTING, STATION)
    return made


@pytest.fixture
def sealer() -> Sealer:
    """A sealer with a key of its own."""
    return Sealer(os.urandom(32))


@pytest.fixture(scope="session")
def docker_host() -> str:
    """Address of a reachable engine; skips where there is none, unless REQUIRE_ENGINE=1."""
    host = os.environ.get("DOCKER_HOST")
    recorded = ROOT / ".state" / "engine.env"
    if host is None and recorded.exists():
        lines = dict(
            line.removeprefix("export ").split("=", 1) for line in recorded.read_text().split("\n") if "=" in line
        )
        host = lines.get("DOCKER_HOST", "").strip("'\"") or None
    host = host or "unix:///var/run/docker.sock"
    if trouble := asyncio.run(_silence(host)):
        refuse_or_skip(f"no engine answers at {host}: {trouble}; run make engine")
    return host


async def _silence(host: str) -> str | None:
    """Why the engine does not answer, None when it does: a socket can outlive its engine."""
    try:
        async with asyncio.timeout(30), aiodocker.Docker(host) as docker:
            await docker.version()
    except (aiodocker.DockerError, OSError, ValueError) as error:
        return str(error) or type(error).__name__
    return None


@pytest.fixture
def until() -> Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]:
    """Poll a condition with a deadline."""

    async def wait(condition: Callable[[], Awaitable[bool]], deadline_s: float = 30) -> None:
        async with asyncio.timeout(deadline_s):
            while not await condition():
                await asyncio.sleep(0.02)

    return wait
