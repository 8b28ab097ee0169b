"""Pulls of images, outside the slots.

**Protocol.** A run that meets a missing image gives its claim back and calls `want`. Sandboxes that want the same image
(reference, platform, credentials) share one *flight*. At most `pulls` flights are under way, at most `tenant_pulls` of
them for one tenant; the next one is that of the tenant with the fewest. Every `progress_every` seconds one statement
moves the due time of all waiting rows on and writes how far their flight is (`app.store.queue.waiting`).

A flight that has landed is recorded for each sandbox (`sandbox.fetched`), and the append touches the queue, so a run
goes on with `ensure`. One that failed for good fails each sandbox that still waits. Any other failure is counted in the
queue row, with a back-off; the run after it plans `ensure` again, and meets the missing image again.

**Who does not wait any more** (deleted, expired, failed, provided by another worker) is forgotten: at once when a run
of this worker sees it, else at the next beat. A flight for which nobody waits is cancelled.

**Invariants.** No claim is held here, so a pull that never ends costs no slot and delays no delete. Nothing depends on
this memory: the log does not say what an engine has cached, and `ensure` asks the engine.

**How it fails.** A worker that dies in a pull stops moving the due times on. Within a lease another worker claims the
rows, meets the missing image, and pulls. Two workers may pull one image at once: engines share the layers. A database
that is away when a flight lands loses the record, not the image: the row falls due, and `ensure` finds the image.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from uuid import UUID

import msgspec
from msgspec import Struct

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.plan import STEP_NAMES, Fetch, InstallAgent
from app.domain.sandbox.state import Phase, RuntimeState, Sandbox
from app.domain.stream import Meta
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeRejected, RuntimeUnavailable, SandledgerError, StoreUnavailable
from app.runtime.driver import FetchedImage, Image
from app.service.sandboxes import Service, StaleVersion
from app.store.log.signal import Signal
from app.store.queue.waiting import WaitingRows
from app.work.policy import WorkPolicy
from app.work.reconcile.actors import Actors
from app.work.reconcile.troubles import (
    UNAVAILABLE,
    Trouble,
    describe,
    is_refusal_reported,
    is_reported,
    longest_backoff,
)
from app.work.station import Station
from app.work.watchdog import Watchdog

LOOP = "fetches"
_STEP = Fetch()
_STEP_NAME = STEP_NAMES[Fetch]
_MAX_TRIES = 5
_LOG = logging.getLogger(__name__)


class Waiter(Struct, frozen=True):
    """A sandbox that waits for an image."""

    stream_id: UUID
    tenant: str
    cause: int | None
    """Position of the event that asked for it."""
    step: Fetch | InstallAgent = Fetch()
    """What the image is for. The agent's is the operator's: nothing of it is recorded for the sandbox, and no answer of
    the registry is final for it."""


class Flight:
    """One pull, under way or about to be."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.waiters: dict[UUID, Waiter] = {}
        self.progress: str | None = None
        self.task: asyncio.Task[None] | None = None
        """None = it waits for its turn."""

    @property
    def tenants(self) -> set[str]:
        """Whose sandboxes wait for it."""
        return {waiter.tenant for waiter in self.waiters.values()}

    def report(self, progress: str) -> None:
        """Keep how far the pull is, in words for people, until the next beat writes it to the rows that wait."""
        self.progress = progress


class Fetches:
    """The pulls of one worker."""

    def __init__(
        self,
        *,
        station: Station,
        service: Service,
        rows: WaitingRows,
        signal: Signal,
        policy: WorkPolicy,
        actors: Actors,
        watchdog: Watchdog,
    ) -> None:
        self._station = station
        self._service = service
        self._rows = rows
        self._signal = signal
        self._policy = policy
        self._actors = actors
        self._watchdog = watchdog
        self._flights: dict[Image, Flight] = {}
        """In the order in which they were asked for."""
        self._settling: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a pull is under way or waits for its turn, or the end of one is being recorded."""
        return bool(self._flights or self._settling)

    def want(
        self,
        sandbox: Sandbox,
        image: Image,
        cause: int | None,
        step: Fetch | InstallAgent = Fetch(),  # noqa: B008
    ) -> None:
        """Have the image pulled. The row of the sandbox waits from before this call."""
        if self._closed:
            return  # its row falls due, and somebody else's run comes to this
        self.forget(sandbox.id, but=image)
        flight = self._flights.setdefault(image, Flight(image))
        flight.waiters[sandbox.id] = Waiter(sandbox.id, sandbox.tenant, cause, step)
        self._start_next()

    def forget(self, stream_id: UUID, *, but: Image | None = None) -> None:
        """It does not wait any more (but for this image)."""
        for image, flight in list(self._flights.items()):
            if image != but and flight.waiters.pop(stream_id, None) and not flight.waiters:
                self._abandon(flight)

    async def run(self) -> None:
        """Keep rows waiting and write progress until cancelled."""
        while True:
            self._watchdog.stamp(LOOP)
            try:
                await self.beat()
            except StoreUnavailable as error:
                _LOG.warning("the progress of pulls cannot be written: %s", error)
            except Exception:  # noqa: BLE001 - the next beat may work
                _LOG.exception("a beat of the pulls failed")
            await asyncio.sleep(self._policy.progress_every)

    async def beat(self) -> None:
        """Once: move the due times on, write progress, forget who does not wait any more."""
        progress = {
            stream_id: _progress(flight, self._under_way())
            for flight in self._flights.values()
            for stream_id in flight.waiters
        }
        if not progress:
            return
        waiting = await self._rows.keep_waiting(progress, self._policy.lease)
        doubtful = progress.keys() - waiting
        if doubtful:
            # Held by a run, or due: it may still want the image. Only who need not be provided any more is forgotten.
            for stream_id in doubtful - await self._rows.pending(doubtful):
                self.forget(stream_id)

    async def close(self) -> None:
        """Cancel all pulls, and let other workers have their sandboxes at once."""
        self._closed = True
        left = [stream_id for flight in self._flights.values() for stream_id in flight.waiters]
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        self._flights.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._settling, return_exceptions=True)
        self._watchdog.forget(LOOP)
        with suppress(StoreUnavailable):
            await self._wake(left)

    def _under_way(self) -> int:
        return sum(flight.task is not None for flight in self._flights.values())

    def _start_next(self) -> None:
        """Start what may be started: fewest pulls of the tenant first, then first come first served."""
        while self._under_way() < self._policy.pulls:
            pulls = Counter(
                tenant for flight in self._flights.values() if flight.task is not None for tenant in flight.tenants
            )
            ready = [
                (min(pulls[tenant] for tenant in flight.tenants), number, flight)
                for number, flight in enumerate(self._flights.values())
                if flight.task is None
            ]
            fewest, _, flight = min(ready, default=(0, 0, None), key=lambda found: found[:2])
            if flight is None or fewest >= self._policy.tenant_pulls:
                return
            flight.task = asyncio.create_task(self._fly(flight), name=f"pull-{flight.image.reference}")

    def _abandon(self, flight: Flight) -> None:
        _LOG.info("the pull of %s is cancelled: nobody waits for it any more", flight.image.reference)
        self._take_down(flight)
        if flight.task is not None:
            flight.task.cancel()

    def _take_down(self, flight: Flight) -> None:
        """From here on a new wish for this image is a new flight."""
        if self._flights.get(flight.image) is flight:
            del self._flights[flight.image]
            if not self._closed:
                self._start_next()

    async def _fly(self, flight: Flight) -> None:
        begun = asyncio.get_running_loop().time()
        outcome: FetchedImage | Exception
        try:
            outcome = await self._station.driver.fetch(flight.image, flight.report)
        except Exception as error:  # noqa: BLE001 - each kind of failure is distinguished below
            outcome = error
        took_ms = round((asyncio.get_running_loop().time() - begun) * 1000)
        self._take_down(flight)
        trouble = None
        if isinstance(outcome, Exception) and not isinstance(outcome, RuntimeRejected | RuntimeUnavailable):
            trouble = describe(_STEP, outcome)  # once, since what we did not raise is written to the process log
        for waiter in list(flight.waiters.values()):
            # A task of its own: the flight's may be cancelled by the first waiter that hears of it.
            task = asyncio.create_task(self._settle(waiter, outcome, trouble, took_ms))
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def _settle(
        self, waiter: Waiter, outcome: FetchedImage | Exception, trouble: Trouble | None, took_ms: int
    ) -> None:
        try:
            match outcome:
                case FetchedImage() if isinstance(waiter.step, InstallAgent):
                    await self._wake([waiter.stream_id])
                case FetchedImage():
                    await self._landed(waiter, outcome, took_ms)
                case RuntimeRejected() if isinstance(waiter.step, InstallAgent):
                    await self._count(waiter, describe(waiter.step, outcome))
                case RuntimeRejected():
                    await self._failed(waiter, outcome)
                case RuntimeUnavailable():
                    await self._unavailable(waiter, outcome)
                case _:
                    assert trouble is not None, "every other failure has been described"
                    await self._count(waiter, msgspec.structs.replace(trouble, step=STEP_NAMES[type(waiter.step)]))
        except SandledgerError as error:
            _LOG.warning("the end of a pull for sandbox %s was not recorded: %s", waiter.stream_id, error)
        except Exception:  # noqa: BLE001 - the row falls due by itself
            _LOG.exception("the end of a pull for sandbox %s was not recorded", waiter.stream_id)

    async def _landed(self, waiter: Waiter, image: FetchedImage, took_ms: int) -> None:
        self._station.succeeded(waiter.stream_id)
        command = cmd.RecordFetched(image.image_id, image.image_digest, image.size_bytes, took_ms)
        outcome = await self._service.execute(waiter.stream_id, ANY_TENANT, command, self._meta(waiter))
        if not outcome.events:
            await self._wake([waiter.stream_id])

    async def _failed(self, waiter: Waiter, error: RuntimeRejected) -> None:
        """Final, unless another worker has provided it meanwhile."""
        failure = cmd.RecordFailure(_STEP_NAME, error.reason, error.message)
        for _ in range(_MAX_TRIES):
            loaded = await self._service.view.load(waiter.stream_id, ANY_TENANT)
            if loaded is None:
                return
            sandbox = loaded[0]
            if sandbox.phase is not Phase.PENDING or sandbox.observed is not RuntimeState.NONE:
                return
            try:
                await self._service.record(sandbox, failure, self._meta(waiter))
            except StaleVersion:
                continue
            break
        await self._wake([waiter.stream_id])

    async def _unavailable(self, waiter: Waiter, error: RuntimeUnavailable) -> None:
        wait = await self._station.suspect(waiter.stream_id, error)
        times = self._station.refusals(waiter.stream_id)
        text = str(error)
        if await self._rows.put_off(waiter.stream_id, UNAVAILABLE, text, wait) and is_refusal_reported(times):
            await self._report(waiter, Trouble(STEP_NAMES[type(waiter.step)], UNAVAILABLE, text), times)

    async def _count(self, waiter: Waiter, trouble: Trouble) -> None:
        self._station.succeeded(waiter.stream_id)
        before = await self._rows.count_failure(
            waiter.stream_id,
            trouble.reason,
            trouble.message,
            base=self._policy.backoff_base,
            longest=longest_backoff(_STEP, self._policy),
        )
        if before is not None and is_reported(trouble.reason, before.attempts + 1, before.last_reason):
            await self._report(waiter, trouble, before.attempts + 1)

    async def _report(self, waiter: Waiter, trouble: Trouble, attempt: int) -> None:
        retry = cmd.RecordRetry(trouble.step, trouble.reason, trouble.message, attempt)
        await self._service.execute(waiter.stream_id, ANY_TENANT, retry, self._meta(waiter))

    async def _wake(self, ids: list[UUID]) -> None:
        for stream_id in await self._rows.wake(ids):
            self._signal.poke(stream_id, work=True)

    def _meta(self, waiter: Waiter) -> Meta:
        return self._actors.meta(self._actors.worker, waiter.cause)


def _progress(flight: Flight, under_way: int) -> str | None:
    if flight.task is None:
        return f"The pull has not begun; it waits for one of the {under_way} that are under way."
    return flight.progress
