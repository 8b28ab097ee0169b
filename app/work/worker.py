"""A worker: the loops that bring sandboxes to their goals. Any number of them may run on one database.

**Loops.** Claiming, with one task per claimed sandbox; the heartbeat of the claims; hints from the engine; and the
timers (expiry, sweeps, partitions). `Signal.run` is the process's own business, not the worker's.

**Claiming.** As many rows as there are free slots, at once when there is news in this process or another, else every
`poll`. One slot in eight is kept for the background lane, counted over rounds, so that sweeps cannot starve. While the
breaker is open nothing is claimed; the engine is asked again when its time has come.

**Stop.** `stop(grace)`: no more claims; runs under way get the grace, then are cancelled, finish what must not be cut
(create and start), and hand their claims back; leases are kept alive meanwhile. Cancelling `run` is a stop without
grace. Nothing counts as an attempt and nothing is marked failed. A create that an engine does not answer within
`uncut` seconds is left as a crash would leave it: its claim is not handed back, since the engine may still be making
the object.

**How it fails.** No error of one sandbox or of one round ends a loop. If a loop ends all the same, `run` raises and
`alive` is false, so that whoever supervises the process knows.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket

from app import __version__
from app.domain.sandbox.events import Actor, ActorKind
from app.errors import StoreUnavailable
from app.runtime.driver import Driver
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal, Subscription
from app.store.queue.reconcile import Claim, Queue
from app.store.vault.seal import Sealer
from app.work.expiry import ExpiryJobs, ExpiryJobStore
from app.work.policy import WorkPolicy
from app.work.reconcile.leases import Leases
from app.work.reconcile.reconciler import Actors, Reconciler
from app.work.reconcile.troubles import Breaker
from app.work.reconcile.workloads import Workloads
from app.work.resync import Resync
from app.work.timers import Timers

_BACKGROUND_SHARE = 8
_PARTITIONS_S = 3600.0
_CONTENDED_S = 0.01
_LOG = logging.getLogger(__name__)


class Worker:
    """One worker on one engine."""

    def __init__(
        self,
        *,
        database: Database,
        service: Service,
        signal: Signal,
        driver: Driver,
        sealer: Sealer,
        policy: WorkPolicy,
        worker_id: str,
        name: str | None = None,
    ) -> None:
        """`worker_id` is unique among workers; `name` is for people, by default the host's."""
        self._service = service
        self._signal = signal
        self._policy = policy
        self._background = 0
        worker = Actor(ActorKind.RECONCILER, worker_id, name or socket.gethostname())
        runtime = Actor(ActorKind.RUNTIME, driver.name, driver.name)
        self.queue = Queue(database, driver.name)
        self.leases = Leases(self.queue, service.view, policy)
        self.resync = Resync(database, driver, self.queue, signal, policy)
        self.breaker = Breaker(driver, policy, recovered=self.resync.owe)
        self.reconciler = Reconciler(
            service=service,
            driver=driver,
            workloads=Workloads(database, sealer),
            queue=self.queue,
            breaker=self.breaker,
            policy=policy,
            actors=Actors(__version__, worker, runtime),
        )
        timer = Actor(ActorKind.TIMER, worker_id, "expiry")
        self._expiry = ExpiryJobs(database, service, policy, timer, __version__)
        self._timers: Timers | None = None
        self._runs: set[asyncio.Task[None]] = set()
        self._hungry = False
        """There was more to claim than there were slots."""
        self._stopping = asyncio.Event()
        self._grace = 0.0
        self._running = False

    @property
    def alive(self) -> bool:
        """Everything runs and nobody has asked it to stop."""
        timers = self._timers
        return self._running and not self._stopping.is_set() and timers is not None and timers.alive

    async def run(self) -> None:
        """Work until `stop` or a cancellation."""
        self._timers = timers = self._make_timers()
        timers.start()
        self._running = True
        try:
            async with asyncio.TaskGroup() as loops:
                others = [
                    loops.create_task(self.leases.run(), name="worker-leases"),
                    loops.create_task(self.resync.follow_hints(), name="worker-hints"),
                ]
                try:
                    with self._signal.subscribe() as news:
                        await self._claim_until_stopped(news)
                finally:
                    self._running = False
                    await asyncio.gather(timers.stop(self._grace), self._drain(self._grace))
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
        store = ExpiryJobStore(self._expiry, timers.bridge, timers.executor, policy.expiry_lease)
        timers.add_store("expiry", store)
        timers.every(_PARTITIONS_S, self._ensure_partitions)
        timers.every(min(policy.resync_tick, policy.resync_every), self.resync.tick)
        return timers

    async def _ensure_partitions(self) -> None:
        made = await self._service.log.ensure_partitions()
        if made:
            _LOG.info("made %d partitions of the log ahead of time", made)

    async def _claim_until_stopped(self, news: Subscription) -> None:
        stopping = asyncio.create_task(self._stopping.wait())
        stopping.add_done_callback(lambda _: news.wake())
        try:
            while not self._stopping.is_set():
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
        if self.breaker.open:
            await self._recover()
            if self.breaker.open:
                return False
        free = self._policy.concurrency - len(self._runs)
        if free <= 0:
            self._hungry = True
            return False
        claimed_at = asyncio.get_running_loop().time()
        policy = self._policy
        found = await self.queue.claim(
            free, lease=policy.lease, share=policy.tenant_share, background=self._for_background(free)
        )
        for claim in found.claims:
            self._start(claim, claimed_at, news)
        more = found.due > len(found.claims)
        self._hungry = more
        if more and not found.claims:
            # Other workers hold the locks on what is due; by the time we are back they have moved on.
            await asyncio.sleep(random.uniform(0, _CONTENDED_S))  # noqa: S311
        return more and len(self._runs) < policy.concurrency

    async def _recover(self) -> None:
        """Ask the engine, unless a stop comes first: one that hangs takes its time to say nothing."""
        asking = asyncio.create_task(self.breaker.recover())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((asking, stopping), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                asking.result()
        finally:
            asking.cancel()
            stopping.cancel()
            await asyncio.gather(asking, stopping, return_exceptions=True)

    def _for_background(self, free: int) -> int:
        """One slot in eight, counted over rounds; a lane that is empty leaves them to the other."""
        self._background += free
        kept, self._background = divmod(self._background, _BACKGROUND_SHARE)
        return kept

    def _start(self, claim: Claim, claimed_at: float, news: Subscription) -> None:
        held = self.leases.hold(claim, claimed_at)
        run = asyncio.create_task(self.reconciler.run(held), name=f"sandbox-{claim.sandbox_id}")
        held.run = run
        self._runs.add(run)

        def ended(task: asyncio.Task[None]) -> None:
            self._runs.discard(task)
            self.leases.drop(held)
            if self._hungry:
                news.wake()

        run.add_done_callback(ended)

    async def _drain(self, grace: float) -> None:
        """Let runs finish, then cancel them; they hand their claims back, or are left if that takes too long."""
        if self._runs and grace > 0:
            await asyncio.wait(self._runs, timeout=grace)
        if not self._runs:
            return
        for run in self._runs:
            run.cancel()
        _, left = await asyncio.wait(self._runs, timeout=self._policy.uncut)
        if left:
            self.leases.leave()
            _LOG.warning("%d creates that the engine does not answer are left to the end of their leases", len(left))
