"""A stage for the workers: real PostgreSQL, a fake engine, and hands that turn single claims."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import msgspec

from app.domain.engine.decide import RecordSighting, RecordSilence
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.observed import Exit
from app.domain.sandbox.quantity import ALL_GPUS
from app.domain.sandbox.spec import SandboxSpec, parse_limits
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.snapshot.state import Snapshot, SnapshotState
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.errors import NotFound, StoreUnavailable
from app.runtime.driver import Driver
from app.runtime.fake import FakeContainer, FakeDriver, FakeEngine, Hook, Pull
from app.service.engines import Engines
from app.service.sandboxes import Outcome, Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.queue.reconcile import Claim
from app.store.vault.seal import Sealer, Secrets
from app.work.agents import AgentPolicy
from app.work.policy import WorkPolicy
from app.work.reconcile.leases import Held
from app.work.worker import Worker
from tests.conftest import INSTALLATION, SIGHTING

CLIENT = Meta(Actor(ActorKind.API_KEY, "k1", "default"), "test")
QUICK = WorkPolicy(
    poll=0.05, exit_settle=0, claim_every=0.001, claim_every_busy=0.001, backoff_base=0.02, backoff_max=0.1, removal_retry_max=0.1, breaker_base=0.02,
    breaker_max=0.1, missing_grace=0.1, hint_window=0.01, sweep_every=3600, sweep_tick=0.05, sweep_confirm=3600,
    expiry_lease=2, engine_beat=0.05, engine_probe=0.02, seen_throttle=0.02, progress_every=0.02, place_again=0.05,
)  # fmt: skip
"""Small times, so that conditions are reached soon; no test depends on how soon. No sweep after the first."""
MADE = ["fetched", "runtime_created", "started", "ready"]
"""What follows the first placing when all goes well and the image is on the engine."""
BEGUN = ["requested", "placed", *MADE]
ADOPTED = ["requested", "placed", "fetched", "runtime_adopted", "started", "ready"]
ENDED = ["termination_requested", "runtime_removed", "terminated"]


def name_of(event: ev.Event) -> str:
    """Its type, without `sandbox.`."""
    return ev.REGISTRY.name_of(event).removeprefix("sandbox.")


class Gate:
    """A hook that stops at one call until it is opened."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def __call__(self, call: str) -> None:
        if call == self.call:
            self.reached.set()
            await self.open.wait()


class Raiser:
    """A hook that raises at some calls while it is armed."""

    def __init__(self, error: Callable[[], Exception], *calls: str) -> None:
        self.error = error
        self.calls = calls
        self.armed = True
        self.raised = 0

    async def __call__(self, call: str) -> None:
        if self.armed and call in self.calls:
            self.raised += 1
            raise self.error()


class Stage:
    def __init__(self, dsn: str, database: Database, service: Service, signal: Signal, sealer: Sealer) -> None:
        self.dsn = dsn
        self.database = database
        self.service = service
        self.signal = signal
        self.sealer = sealer
        self.installation = INSTALLATION
        self.engines = Engines(database, signal, INSTALLATION, service.engines)
        self.engine = FakeEngine()
        self.engine.engine_id, self.engine.marks[INSTALLATION] = SIGHTING.engine_id, SIGHTING.mark or ""
        self.engine_name = SIGHTING.name
        self.limits: Limits | None = None
        """Those of the service, where a test gave it some."""
        self.agent: AgentPolicy | None = None

    def driver(self, before: Hook | None = None, after: Hook | None = None) -> FakeDriver:
        return FakeDriver(self.engine, self.installation, before=before, after=after, name=self.engine_name)

    def worker(
        self,
        driver: Driver | None = None,
        policy: WorkPolicy = QUICK,
        worker_id: str = "w1",
        agent: AgentPolicy | None = None,
        **changes: Any,
    ) -> Worker:
        return Worker(
            database=self.database,
            service=self.service,
            signal=self.signal,
            engines=self.engines,
            driver=driver or self.driver(),
            sealer=self.sealer,
            policy=msgspec.structs.replace(policy, **changes),
            worker_id=worker_id,
            name="test",
            limits=self.limits,
            agent=agent or self.agent,
        )

    @asynccontextmanager
    async def working(self, *workers: Worker) -> AsyncIterator[None]:
        """Workers run inside the block."""
        running = [asyncio.create_task(worker.run()) for worker in workers]
        try:
            yield
        finally:
            for worker in workers:
                await worker.stop(10)
            await asyncio.gather(*running)

    async def turn(self, worker: Worker, slots: int = 100) -> list[Claim]:
        """One round of claims, worked on one after the other, as the worker would."""
        if worker.station.open:
            await worker.station.contact()
        found = await worker.queue.claim(slots, lease=30, tenant_slots=slots)
        for claim in found.claims:
            await self.run(worker, claim)
        return list(found.claims)

    async def run(self, worker: Worker, claim: Claim) -> None:
        held = self.hold(worker, claim)
        held.run = asyncio.create_task(worker.reconcile(held))
        try:
            await asyncio.wait([held.run])
        finally:
            worker.leases.drop(held)
        if not held.run.cancelled():
            held.run.result()

    def hold(self, worker: Worker, claim: Claim) -> Held:
        return worker.leases.hold(claim, asyncio.get_running_loop().time())

    async def settle(self, worker: Worker) -> None:
        """Turn until nothing is due and no pull is under way."""
        while await self.turn(worker) or await self.land(worker):
            pass

    async def land(self, worker: Worker) -> bool:
        """Let the pulls end. False = there were none."""
        flying = worker.fetches.busy
        async with asyncio.timeout(30):
            while worker.fetches.busy:
                await asyncio.sleep(0.001)
        return flying

    async def create(
        self,
        *,
        image: str = "busybox",
        tenant: str = "default",
        timeout_s: int | None = None,
        secrets: Secrets | None = None,
        ends: Exit | None = None,
        sandbox_id: UUID | None = None,
        service: Service | None = None,
        entrypoint: tuple[str, ...] = ("sleep", "60"),
        **spec: Any,
    ) -> UUID:
        sandbox_id = sandbox_id or uuid4()
        if ends is not None:
            self.engine.scripts[sandbox_id] = ends
        asked = SandboxSpec(
            image,
            entrypoint,
            env=dict.fromkeys(secrets.env, "digest") if secrets else {},
            registry_auth=bool(secrets and secrets.registry_password),
            **spec,
        )
        amounts = parse_limits(asked.resource_limits)
        gpus = amounts.get("gpu")
        event = ev.Requested(
            asked,
            "f" * 64,
            timeout_s=timeout_s,
            cpu_nanos=amounts.get("cpu"),
            memory_bytes=amounts.get("memory"),
            gpus=None if gpus == ALL_GPUS else gpus,
            gpus_all=gpus == ALL_GPUS,
        )
        sealed = None if secrets is None else self.sealer.seal(sandbox_id, secrets)
        await (service or self.service).create(sandbox_id, tenant, event, sealed, CLIENT)
        return sandbox_id

    async def take(self, sandbox_id: UUID, name: str | None = None) -> UUID:
        """Ask for a snapshot."""
        snapshot_id = uuid4()
        sandbox = await self.sandbox(sandbox_id)
        await self.service.snapshots.create(snapshot_id, sandbox.tenant, sandbox_id, name, CLIENT)
        return snapshot_id

    async def snapshot(self, snapshot_id: UUID) -> Snapshot:
        loaded = await self.service.snapshots.view.load(snapshot_id, ANY_TENANT)
        assert loaded is not None
        return loaded[0]

    def is_snapshot(self, state: SnapshotState, *ids: UUID) -> Callable[[], Awaitable[bool]]:
        async def reached() -> bool:
            return all([(await self.snapshot(each)).state is state for each in ids])

        return reached

    async def create_unplaced(self, **details: Any) -> UUID:
        """One for which no engine was there; the engine is dark."""
        now = (await self.sql("SELECT clock_timestamp() AS now"))[0]["now"]
        await self.engines.execute(self.engine_name, RecordSilence(now, "test"), CLIENT)
        sandbox_id = await self.create(**details)
        assert (await self.sandbox(sandbox_id)).engine is None
        return sandbox_id

    async def light_up(self) -> None:
        """The engine that was dark is there again."""
        await self.engines.execute(self.engine_name, RecordSighting(SIGHTING), CLIENT)

    def pull(self, image: str, **how: Any) -> Pull:
        """The image has to be pulled, in this way."""
        self.engine.to_pull.add(image)
        self.engine.pulls[image] = pull = Pull(**how)
        return pull

    async def running(self, worker: Worker, **details: Any) -> UUID:
        """A sandbox that has come to run."""
        sandbox_id = await self.create(**details)
        await self.settle(worker)
        assert await self.phase(sandbox_id) is Phase.RUNNING
        return sandbox_id

    async def ask(self, sandbox_id: UUID, command: cmd.Command, **options: Any) -> Outcome:
        return await self.service.execute(sandbox_id, ANY_TENANT, command, CLIENT, **options)

    async def sandbox(self, sandbox_id: UUID) -> Sandbox:
        loaded = await self.service.view.load(sandbox_id, ANY_TENANT)
        assert loaded is not None
        return loaded[0]

    async def phase(self, sandbox_id: UUID) -> Phase:
        return (await self.sandbox(sandbox_id)).phase

    async def history(self, sandbox_id: UUID, tenant: str = "default") -> list[ev.Recorded]:
        return await self.service.history(sandbox_id, tenant)

    async def told(self, sandbox_id: UUID, tenant: str = "default") -> list[str]:
        """Names of its events, without `sandbox.`."""
        return [name_of(one.event) for one in await self.history(sandbox_id, tenant)]

    def container(self, sandbox_id: UUID) -> FakeContainer | None:
        return self.engine.of(sandbox_id)

    async def sql(self, query: str, *arguments: Any) -> list[Any]:
        """As the owner, outside of the application."""
        connection = await asyncpg.connect(self.dsn)
        try:
            return await connection.fetch(query, *arguments)
        finally:
            await connection.close()

    async def cut_connections(self) -> None:
        """Every connection of the application breaks."""
        await self.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'sandledger' AND datname = current_database()"
        )

    @asynccontextmanager
    async def locked(self, table: str) -> AsyncIterator[None]:
        """Nobody reads or writes this table inside the block."""
        connection = await asyncpg.connect(self.dsn)
        try:
            async with connection.transaction():
                await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
                yield
        finally:
            await connection.close()

    async def blocked(self) -> None:
        """Until somebody waits for a lock."""
        async with asyncio.timeout(30):
            while not await self.sql("SELECT 1 FROM pg_locks WHERE NOT granted"):
                await asyncio.sleep(0.01)

    async def row(self, sandbox_id: UUID) -> Any:
        """Its queue row, or None."""
        rows = await self.sql("SELECT * FROM reconcile_queue WHERE stream_id = $1", sandbox_id)
        return rows[0] if rows else None

    async def make_due(self, sandbox_id: UUID) -> None:
        """Let its wait be over."""
        await self.sql("UPDATE reconcile_queue SET due_at = clock_timestamp() WHERE stream_id = $1", sandbox_id)

    async def make_overdue(self, sandbox_id: UUID, seconds: float = 0) -> None:
        """Let its lease be over, as if its holder had died."""
        await self.sql(
            "UPDATE reconcile_queue SET due_at = clock_timestamp(), lease_until = clock_timestamp() "
            "- make_interval(secs => $2) WHERE stream_id = $1",
            sandbox_id,
            seconds,
        )

    def is_phase(self, phase: Phase, *sandboxes: UUID) -> Callable[[], Awaitable[bool]]:
        """A condition to wait for."""

        async def reached() -> bool:
            return all([await self.phase(sandbox_id) is phase for sandbox_id in sandboxes])

        return reached

    def is_told(self, sandbox_id: UUID, event: str, tenant: str = "default") -> Callable[[], Awaitable[bool]]:
        """The log has it."""

        async def reached() -> bool:
            return event in await self.told(sandbox_id, tenant)

        return reached

    async def until_stored(self, do: Callable[[], Awaitable[Any]]) -> None:
        """Again and again, until the database takes it or has taken it before."""
        async with asyncio.timeout(30):
            while True:
                try:
                    await do()
                except StoreUnavailable:
                    await asyncio.sleep(0.02)
                except NotFound:
                    return
                else:
                    return

    def is_idle(self) -> Callable[[], Awaitable[bool]]:
        """Nothing is queued."""

        async def idle() -> bool:
            return not await self.sql("SELECT 1 FROM reconcile_queue")

        return idle
