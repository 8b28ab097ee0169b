"""A worker: the loops that bring sandboxes to their goals. Any number of them may run on one database.

**Loops.** Claiming, with one task per claimed sandbox; the heartbeat of the claims; the pulls (`app.work.fetches`); the
station of the engine; answers to questions about its objects (`app.work.answers`); and the scheduler (deadlines,
sweeps, partitions, what is not kept any more). `Signal.run` is the process's own business, not the worker's.

**Claiming.** As many rows as there are free slots, when somebody has said that there is work, else every `poll`. From
one claim to the next at least `claim_every` passes, so what becomes due together is claimed together. One tenant holds
at most `policy.share` of the slots; the others find some free. One slot in eight is kept for the background lane,
counted over rounds, so that sweeps cannot starve. While the station is closed, only sandboxes that no engine has taken
yet are claimed: placing them asks no engine, and says what they wait for.

**Stop.** `stop(grace)`: no more claims; runs under way get the grace, then are cancelled, finish what must not be cut
(create and start), and hand their claims back; leases are kept alive meanwhile. Pulls are cancelled, and what waits for
them is due at once, for others. Cancelling `run` is a stop without grace. Nothing counts as an attempt and nothing is
marked failed. A create that an engine does not answer within `create_grace` seconds is left as a crash would leave it:
its claim is not handed back, since the engine may still be making the object.

**How it fails.** No error of one sandbox or of one round ends a loop. `run` raises when a loop ends all the same. A
loop that stands still does not stamp any more, and a run that never ends grows old. In each case `alive` is false, so
that a supervisor of the process knows.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any
from uuid import UUID

from app import __version__
from app.domain.sandbox.deadlines import Limits
from app.domain.stream import Actor, ActorKind, Meta
from app.errors import StoreUnavailable
from app.runtime.driver import Driver
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.service.snapshots import KIND as SNAPSHOT
from app.store import metrics
from app.store.addresses import Addresses
from app.store.database.pool import Database
from app.store.database.statement import Connections
from app.store.deadlines.rows import DeadlineRows
from app.store.diagnostics.kept import KeptEnds
from app.store.diagnostics.requests import EngineRequests
from app.store.log.signal import Signal, Subscription
from app.store.queue.reconcile import UNPLACED, Claim, Queue
from app.store.queue.waiting import WaitingRows
from app.store.stations import Stations
from app.store.vault.seal import Sealer
from app.work.agents import AgentPolicy, Agents
from app.work.answers import Answers
from app.work.commits import Commits
from app.work.diagnostics import Diagnostics
from app.work.fetches import Fetches
from app.work.fire import Deadlines
from app.work.networks import Networks
from app.work.policy import WorkPolicy
from app.work.probes import Probes
from app.work.reconcile.actors import Actors
from app.work.reconcile.leases import Held, Leases
from app.work.reconcile.outcomes import Outcomes
from app.work.reconcile.reconciler import Reconciler
from app.work.reconcile.snapshots import SnapshotReconciler
from app.work.reconcile.workloads import Workloads
from app.work.scheduler import DeadlineStore
from app.work.station import Station
from app.work.sweep import Sweeper
from app.work.timers import Timers
from app.work.watchdog import Watchdog

LOOP = "claims"
_BACKGROUND_SHARE = 8
_CONTENDED_S = 0.01
_PARTITIONS_S = 3600.0
_FORGET_S = 15.0
_REAP_S = 300.0
_AGENTS_S = 300.0
_PURGE_S = 3600.0
_LOG = logging.getLogger(__name__)


class Worker:
    """One worker on one engine."""

    def __init__(
        self,
        *,
        database: Database,
        service: Service,
        signal: Signal,
        engines: Engines,
        driver: Driver,
        sealer: Sealer,
        policy: WorkPolicy,
        worker_id: str,
        name: str | None = None,
        limits: Limits | None = None,
        agent: AgentPolicy | None = None,
    ) -> None:
        """`worker_id` is unique among workers; `name` is for people, by default the host's. `limits`: the service's.
        `agent` None = sandboxes without one.
        """
        self._database = database
        self._service = service
        self._signal = signal
        self._policy = policy
        self._background = 0
        self.watchdog = Watchdog(policy.stall_after)
        worker = Actor(ActorKind.RECONCILER, worker_id, name or socket.gethostname())
        self._actors = Actors(__version__, worker, Actor(ActorKind.RUNTIME, driver.name, driver.name))
        self._stations = Stations(database, worker_id, worker.name, driver.name)
        meta = self._actors.meta(worker, None)
        self.queue = Queue(database, driver.name)
        self.station = Station(driver=driver, engines=engines, connections=database, policy=policy, meta=meta)
        self.sweeper = self._make_sweeper(engines, database, meta)
        self._deadlines = Deadlines(
            DeadlineRows(database.reserved), service, limits or Limits(), timer_id=worker_id, app_version=__version__
        )
        self._timers: Timers | None = None
        self.leases = Leases(self.queue, policy, self.watchdog)
        self.fetches = self._make_fetches(rows := WaitingRows(database))
        self.outcomes = self._make_outcomes(rows)
        self.commits = self._make_commits(rows)
        self.agents = self.probes = None
        if agent is not None:
            self.agents = Agents(station=self.station, engines=engines, policy=agent, meta=meta)
            self.probes = Probes(service=service, actors=self._actors, policy=agent)
        addresses = Addresses(database, driver.name)
        self.networks = Networks(station=self.station, engines=engines, addresses=addresses, meta=meta)
        self.diagnostics = Diagnostics(driver, KeptEnds(database), policy)
        self.answers = self._make_answers(EngineRequests(database), engines.stream_id(driver.name))
        self.reconciler = self._make_reconciler(Workloads(database, sealer, self.agents))
        self.snapshots = self._make_snapshots()
        self._runs: dict[asyncio.Task[None], float] = {}
        """Since when they have been running, by the monotonic clock."""
        self._tenants: Counter[str] = Counter()
        """Slots that each tenant holds."""
        self._hungry = False
        """There was more to claim than there were slots."""
        self._claimed_at = float("-inf")
        self._stopping = asyncio.Event()
        self._grace, self._running = 0.0, False

    def _make_sweeper(self, engines: Engines, connections: Connections, meta: Meta) -> Sweeper:
        return Sweeper(
            station=self.station,
            engines=engines,
            connections=connections,
            queue=self.queue,
            signal=self._signal,
            policy=self._policy,
            meta=meta,
        )

    def _make_fetches(self, rows: WaitingRows) -> Fetches:
        return Fetches(
            station=self.station,
            service=self._service,
            rows=rows,
            signal=self._signal,
            policy=self._policy,
            actors=self._actors,
            watchdog=self.watchdog,
        )

    def _make_outcomes(self, rows: WaitingRows) -> Outcomes:
        return Outcomes(
            service=self._service,
            station=self.station,
            queue=self.queue,
            signal=self._signal,
            policy=self._policy,
            actors=self._actors,
            rows=rows,
        )

    def _make_commits(self, rows: WaitingRows) -> Commits:
        return Commits(
            station=self.station,
            service=self._service,
            queue=self.queue,
            rows=rows,
            signal=self._signal,
            policy=self._policy,
            actors=self._actors,
        )

    def _make_snapshots(self) -> SnapshotReconciler:
        return SnapshotReconciler(
            service=self._service,
            station=self.station,
            commits=self.commits,
            outcomes=self.outcomes,
            policy=self._policy,
            actors=self._actors,
        )

    def _make_reconciler(self, workloads: Workloads) -> Reconciler:
        return Reconciler(
            service=self._service,
            station=self.station,
            workloads=workloads,
            fetches=self.fetches,
            agents=self.agents,
            probes=self.probes,
            networks=self.networks,
            outcomes=self.outcomes,
            diagnostics=self.diagnostics,
            policy=self._policy,
            actors=self._actors,
        )

    def _make_answers(self, requests: EngineRequests, engine_id: UUID) -> Answers:
        return Answers(
            station=self.station,
            engine_id=engine_id,
            requests=requests,
            diagnostics=self.diagnostics,
            view=self._service.view,
            signal=self._signal,
            policy=self._policy,
            watchdog=self.watchdog,
        )

    @property
    def alive(self) -> bool:
        """Every loop goes round, and nobody has asked it to stop."""
        timers = self._timers
        if not self._running or self._stopping.is_set() or timers is None:
            return False
        return timers.alive and self.station.alive and not self.watchdog.standing and not self._is_stuck

    @property
    def _is_stuck(self) -> bool:
        began = min(self._runs.values(), default=float("inf"))
        return time.monotonic() - began >= self._policy.stuck_after

    async def run(self) -> None:
        """Work until `stop` or a cancellation."""
        self._timers = timers = self._make_timers()
        timers.start()
        self._running = True
        try:
            async with asyncio.TaskGroup() as loops:
                others = [
                    loops.create_task(self.leases.run(), name="worker-leases"),
                    loops.create_task(self.fetches.run(), name="worker-fetches"),
                    loops.create_task(self.station.run(), name="worker-station"),
                    loops.create_task(self.sweeper.follow_hints(), name="worker-hints"),
                    loops.create_task(self.answers.run(), name="worker-answers"),
                ]
                try:
                    with self._signal.subscribe_work() as news:
                        self.station.when_usable(news.wake)
                        await self._claim_until_stopped(news)
                finally:
                    self._running = False
                    await asyncio.gather(timers.stop(self._grace), self._drain(self._grace))
                    await self.fetches.close()
                    await self.commits.close()
                    await self.networks.close()
                    if self.probes is not None:
                        await self.probes.close()
                for other in others:
                    other.cancel()
        finally:
            self._running = False

    async def stop(self, grace: float) -> None:
        """Ask `run` to end. Runs under way get `grace` seconds; `run` returns when all claims are given back."""
        self._grace = grace
        self._stopping.set()

    def _make_timers(self) -> Timers:
        policy = self._policy
        timers = Timers(policy.expiry_concurrency)
        store = DeadlineStore(self._deadlines, timers.bridge, timers.executor, policy.expiry_lease)
        timers.add_store("deadlines", store)
        timers.every(_PARTITIONS_S, self._ensure_partitions)
        if self.agents is not None:
            timers.every(_AGENTS_S, self.agents.look_around)
        timers.every(_REAP_S, self.networks.reap)
        timers.every(_FORGET_S, self.answers.requests.purge)
        timers.every(_PURGE_S, self.diagnostics.kept.purge)
        timers.every(_PURGE_S, lambda: metrics.purge(self._database, policy.metrics_days))
        timers.every(policy.engine_beat, self._say_trouble)
        timers.every(min(policy.sweep_tick, policy.sweep_every), self.sweeper.tick)
        return timers

    async def _say_trouble(self) -> None:
        station = self.station
        await self._stations.say((station.trouble or "no contact yet") if station.open else None)

    async def _ensure_partitions(self) -> None:
        if made := await self._service.log.ensure_partitions():
            _LOG.info("made %d partitions of the log ahead of time", made)

    async def _claim_until_stopped(self, news: Subscription) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        stopping.add_done_callback(lambda _: news.wake())
        try:
            while not self._stopping.is_set():
                self.watchdog.stamp(LOOP)
                try:
                    if await self._round(news):
                        continue
                except StoreUnavailable as error:
                    _LOG.warning("nothing can be claimed: %s", error)
                except Exception:  # noqa: BLE001 - the next round may work
                    _LOG.exception("a round of claiming failed")
                await news.wait(self._policy.poll)
        finally:
            stopping.cancel()

    async def _round(self, news: Subscription) -> bool:
        """Claim once. True when there is more and there are slots for it."""
        policy = self._policy
        if len(self._runs) >= policy.slots:
            self._hungry = True
            return False
        claimed_at = await self._paced()
        if self._stopping.is_set():
            return False
        # Counted after the pause: slots that became free in it are filled together.
        free = policy.slots - len(self._runs)
        engines = [UNPLACED] if self.station.open else [self.station.name, UNPLACED]
        found = await self.queue.claim(
            free,
            lease=policy.lease,
            tenant_slots=policy.share,
            background=self._for_background(free),
            held=self._tenants,
            engines=engines,
            left_alone=self.outcomes.left_alone(),
        )
        for claim in found.claims:
            self._start(claim, claimed_at, news)
        more = found.due > len(found.claims)
        self._hungry = more or found.above > 0
        if more and not found.claims:
            # Other workers hold the locks on what is due; by the time we are back they have moved on.
            await asyncio.sleep(random.uniform(0, _CONTENDED_S))  # noqa: S311
        return more and len(self._runs) < policy.slots

    async def _paced(self) -> float:
        """The loop's time, when the next claim may be made."""
        clock = asyncio.get_running_loop().time
        pause = self._policy.claim_every_busy if self._hungry else self._policy.claim_every
        early = self._claimed_at + pause - clock()
        if early > 0:
            await asyncio.sleep(early)
        self._claimed_at = clock()
        return self._claimed_at

    def _for_background(self, free: int) -> int:
        """One slot in eight, counted over rounds; a lane that is empty leaves them to the other."""
        self._background += free
        kept, self._background = divmod(self._background, _BACKGROUND_SHARE)
        return kept

    def _start(self, claim: Claim, claimed_at: float, news: Subscription) -> None:
        held = self.leases.hold(claim, claimed_at)
        run = asyncio.create_task(self.reconcile(held), name=f"{claim.kind}-{claim.stream_id}")
        held.run = run
        self._runs[run] = time.monotonic()
        self._tenants[claim.tenant] += 1

        def ended(task: asyncio.Task[None]) -> None:
            self._runs.pop(task, None)
            self._tenants[claim.tenant] -= 1
            if not self._tenants[claim.tenant]:
                del self._tenants[claim.tenant]
            self.leases.drop(held)
            if self._hungry:
                news.wake()

        run.add_done_callback(ended)

    def reconcile(self, held: Held) -> Coroutine[Any, Any, None]:
        """Work on a claim to its end, whatever kind of stream it is of."""
        return (self.snapshots if held.claim.kind == SNAPSHOT else self.reconciler).run(held)

    async def _drain(self, grace: float) -> None:
        """Let runs finish, then cancel them; they hand their claims back, or are left if that takes too long."""
        if self._runs and grace > 0:
            await asyncio.wait(self._runs, timeout=grace)
        if not self._runs:
            return
        for run in self._runs:
            run.cancel()
        _, left = await asyncio.wait(self._runs, timeout=self._policy.create_grace)
        if left:
            self.leases.leave()
            _LOG.warning("%d creates that the engine does not answer are left to the end of their leases", len(left))
