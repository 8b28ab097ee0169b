"""The parts around one engine, without a worker: real PostgreSQL, a fake engine, stations, sweepers, deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec

from app.domain.engine import events as engine_events
from app.domain.engine.state import Engine
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.spec import SandboxSpec
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.runtime.driver import Driver, Image, Ref, Workload
from app.runtime.fake import FakeDriver, FakeEngine, Hook, name_of
from app.service.engines import Engines
from app.service.sandboxes import Outcome, Service
from app.store.database.pool import Database
from app.store.deadlines.rows import DeadlineRows
from app.store.log.signal import Signal
from app.store.queue.reconcile import Queue
from app.views.engines import Standing
from app.work.fire import Deadlines
from app.work.policy import WorkPolicy
from app.work.station import Station
from app.work.sweep import Sweeper

SEARCH_PATH = {"search_path": "sandledger, public"}
CLIENT = Meta(Actor(ActorKind.API_KEY, "k1", "default"), "test")
WORKER = Meta(Actor(ActorKind.RECONCILER, "w1", "test"), "test")
QUICK = WorkPolicy(
    breaker_base=0.02, breaker_max=0.1, missing_grace=0, hint_window=0.01, engine_check=5, engine_beat=0.05,
    engine_probe=0.02, seen_throttle=0.02, dark_after=0.3, sweep_every=3600, sweep_tick=0.05, sweep_confirm=3600,
)  # fmt: skip
"""Small times, so that conditions are reached soon; no test depends on how soon."""


class Field:
    """One database, one engine."""

    def __init__(self, dsn: str, database: Database, signal: Signal) -> None:
        self.dsn = dsn
        self.database = database
        self.signal = signal
        self.service = Service(database, signal)
        self.installation = uuid4()
        self.engines = Engines(database, signal, self.installation, self.service.engines)
        self.engine = FakeEngine()

    def driver(
        self, engine: FakeEngine | None = None, before: Hook | None = None, after: Hook | None = None
    ) -> FakeDriver:
        return FakeDriver(engine or self.engine, self.installation, before=before, after=after)

    def station(self, driver: Driver | None = None, policy: WorkPolicy = QUICK, **changes: Any) -> Station:
        return Station(
            driver=driver or self.driver(),
            engines=self.engines,
            connections=self.database,
            policy=msgspec.structs.replace(policy, **changes),
            meta=WORKER,
        )

    def sweeper(self, station: Station | None = None, policy: WorkPolicy = QUICK, **changes: Any) -> Sweeper:
        station = station or self.station(policy=policy, **changes)
        return Sweeper(
            station=station,
            engines=self.engines,
            connections=self.database,
            queue=Queue(self.database, station.name),
            signal=self.signal,
            policy=msgspec.structs.replace(policy, **changes),
            meta=WORKER,
        )

    def deadlines(self, limits: Limits | None = None) -> Deadlines:
        """Jobs under limits that a service of their own has too."""
        limits = limits or Limits()
        service = Service(self.database, self.signal, limits)
        return Deadlines(DeadlineRows(self.database), service, limits, timer_id="t1", app_version="test")

    @asynccontextmanager
    async def running(self, *stations: Station) -> AsyncIterator[None]:
        """Stations keep contact inside the block."""
        tasks = [asyncio.create_task(station.run()) for station in stations]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def create(
        self, *, timeout_s: int | None = None, service: Service | None = None, sandbox_id: UUID | None = None
    ) -> UUID:
        sandbox_id = sandbox_id or uuid4()
        spec = SandboxSpec("busybox", ("sleep", "60"))
        await (service or self.service).create(
            sandbox_id, "default", ev.Requested(spec, "f" * 64, timeout_s=timeout_s), None, CLIENT
        )
        return sandbox_id

    def workload(self, object_id: UUID, position: int = 1) -> Workload:
        return Workload(Ref(object_id), "default", Image("busybox"), ("sleep", "60"), {}, position=position)

    async def run(self, driver: Driver | None = None, **details: Any) -> UUID:
        """A sandbox that runs, as a reconciler would have left it."""
        sandbox_id = await self.create(**details)
        sandbox = await self.sandbox(sandbox_id)
        observed = await (driver or self.driver()).ensure(self.workload(sandbox_id, sandbox.position))
        await self.service.record(sandbox, cmd.RecordSeen(observed), WORKER)
        await self.sql("DELETE FROM reconcile_queue WHERE stream_id = $1", sandbox_id)
        assert await self.phase(sandbox_id) is Phase.RUNNING
        return sandbox_id

    def orphan(
        self, object_id: UUID | None = None, *, age_s: float = 3600, position: int = 1, engine: FakeEngine | None = None
    ) -> UUID:
        """A container of ours that runs, whoever knows it."""
        object_id, engine = object_id or uuid4(), engine or self.engine
        made = engine.make(name_of(object_id), self.workload(object_id, position), self.installation)
        engine.start(made.name)
        born = datetime.now(UTC) - timedelta(seconds=age_s)
        engine.containers[made.name] = msgspec.structs.replace(engine.containers[made.name], created_at=born)
        return object_id

    async def ask(self, sandbox_id: UUID, command: cmd.Command, service: Service | None = None) -> Outcome:
        return await (service or self.service).execute(sandbox_id, ANY_TENANT, command, CLIENT)

    async def sandbox(self, sandbox_id: UUID) -> Sandbox:
        loaded = await self.service.view.load(sandbox_id, ANY_TENANT)
        assert loaded is not None
        return loaded[0]

    async def phase(self, sandbox_id: UUID) -> Phase:
        return (await self.sandbox(sandbox_id)).phase

    async def told(self, sandbox_id: UUID) -> list[str]:
        """Names of a sandbox's events, without `sandbox.`."""
        history = await self.service.history(sandbox_id, "default")
        return [ev.REGISTRY.name_of(one.event).removeprefix("sandbox.") for one in history]

    async def last(self, sandbox_id: UUID) -> ev.Recorded:
        return (await self.service.history(sandbox_id, "default"))[-1]

    async def known_engine(self, name: str = "fake") -> Engine:
        found = await self.engines.load(name)
        assert found is not None
        return found

    async def standing(self, name: str = "fake") -> Standing:
        return next(one for one in await self.engines.view.standings() if one.engine.name == name)

    async def engine_told(self, name: str = "fake") -> list[str]:
        """Names of an engine's events, without `engine.`."""
        return [
            engine_events.REGISTRY.name_of(one.event).removeprefix("engine.")
            for one in await self.engines.history(name)
        ]

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """As the owner, outside of the application."""
        connection = await asyncpg.connect(self.dsn, server_settings=SEARCH_PATH)
        try:
            return await connection.fetch(query, *arguments)
        finally:
            await connection.close()

    async def deadline(self, sandbox_id: UUID, name: str) -> Any:
        rows = await self.sql("SELECT * FROM deadlines WHERE stream_id = $1 AND name = $2", sandbox_id, name)
        return rows[0] if rows else None
