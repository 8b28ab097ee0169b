"""What every case stands on: databases on one embedded server, configuration files, and a server's parts in process."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from app.domain.sandbox import events as ev
from app.domain.sandbox.spec import SandboxSpec
from app.domain.sandbox.state import Phase
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.runtime.driver import Driver
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from app.work.policy import WorkPolicy
from app.work.worker import Worker

LIMITS = {"cpu": "500m", "memory": "64Mi"}
META = Meta(Actor(ActorKind.OPERATOR, "bench", "bench"), "bench")
LARGE = os.environ.get("SIZE") == "large"
"""SIZE=large measures at full size."""


class Bench:
    """One run."""

    def __init__(self, home: Path, server: EmbeddedPostgres, docker_host: str | None) -> None:
        self.home = home
        self.server = server
        self.docker_host = docker_host
        self._made = 0

    async def fresh(self) -> str:
        """A new migrated database."""
        self._made += 1
        name = f"bench_{self._made}"
        connection = await asyncpg.connect(self.server.dsn)
        await connection.execute(f"CREATE DATABASE {name}")
        # For the floors, which name tables without a schema.
        await connection.execute(f"ALTER DATABASE {name} SET search_path = sandledger, public")
        await connection.close()
        head, _, query = self.server.dsn.partition("?")
        dsn = f"{head.rpartition('/')[0]}/{name}?{query}"
        await migrate(dsn)
        return dsn

    def config(self, dsn: str, docker_host: str | None = None) -> str:
        """A configuration file for a server process."""
        path = self.home / f"{uuid4().hex}.toml"
        host = f"[docker]\nhost = {json.dumps(docker_host)}\n" if docker_host else ""
        path.write_text(
            f'[server]\nport = 0\n[log]\nlevel = "WARNING"\n[runtime]\nexecd_image = ""\n[store.postgresql]\ndsn = {json.dumps(dsn)}\n{host}'
            f"[sandledger]\nstate_dir = {json.dumps(str(self.home / 'state'))}\n"
        )
        return str(path)


def request(image: str) -> dict[str, Any]:
    """The body of a create."""
    return {
        "image": {"uri": image},
        "entrypoint": ["sleep", "3600"],
        "timeout": 3600,
        "resourceLimits": LIMITS,
        "metadata": {"bench": "yes"},
    }


class CountingDatabase(Database):
    """Counts the statements that claim work. They run on the connections that are kept back."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.claims = 0
        fetch = self.reserved.fetch

        async def count(statement: Statement, **values: Any) -> Sequence[asyncpg.Record]:
            self.claims += "SKIP LOCKED" in statement.sql
            return await fetch(statement, **values)

        self.reserved.fetch = count


class Parts:
    """A service and a worker in this process."""

    def __init__(self, database: CountingDatabase, signal: Signal, service: Service, worker: Worker) -> None:
        self.database = database
        self.signal = signal
        self.service = service
        self.worker = worker

    async def create(self, image: str = "img", tenant: str = "default") -> UUID:
        """One create, without HTTP."""
        sandbox = uuid4()
        spec = SandboxSpec(image, ("sleep", "1"), LIMITS)
        await self.service.create(sandbox, tenant, ev.Requested(spec, "f", timeout_s=3600), None, META)
        return sandbox

    async def reaches(self, sandbox: UUID, *phases: Phase) -> float:
        """Wait, and say how many seconds that took."""
        began = time.perf_counter()
        with self.signal.subscribe(sandbox) as news:
            while True:
                loaded = await self.service.view.load(sandbox, ANY_TENANT)
                if loaded is not None and loaded[0].phase in phases:
                    return time.perf_counter() - began
                await news.wait(1)


@asynccontextmanager
async def working(dsn: str, driver: Driver, installation: UUID) -> AsyncGenerator[Parts]:
    """A worker runs inside the block, and its engine can be used."""
    database = CountingDatabase(dsn)
    signal = Signal(database)
    service = Service(database, signal)
    worker = Worker(
        database=database,
        service=service,
        signal=signal,
        engines=Engines(database, signal, installation, service.engines),
        driver=driver,
        sealer=Sealer(os.urandom(32)),
        policy=WorkPolicy(),
        worker_id="bench",
    )
    usable = asyncio.Event()
    worker.station.when_usable(usable.set)
    tasks = [asyncio.create_task(signal.run()), asyncio.create_task(worker.run())]
    try:
        await usable.wait()
        yield Parts(database, signal, service, worker)
    finally:
        await worker.stop(0)
        await tasks[1]
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await database.close()
