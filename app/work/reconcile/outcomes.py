"""How a run ends, when it does not reach the goal: judged, counted, given back.

**Protocol.** `judge` looks at what a step raised, as the table in `app.work.reconcile.troubles` says. What is final is
recorded, and the run goes on with the sandbox that follows. Everything else gives the claim back with a time, and with
the reason and the text of the trouble, which the deadline of the phase quotes when it ends the wait.

**Invariants.** Nothing here ends a sandbox for having failed often. A claim that waits for the engine, for an image or
for an object is not counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import NoReturn
from uuid import UUID

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.plan import Ensure, Observe, Remove, SetPower, Step
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.stream import Actor
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeRejected, RuntimeUnavailable, StoreUnavailable
from app.service.sandboxes import Completion, Service
from app.store.log.signal import Signal
from app.store.queue.reconcile import USER, Failed, Queue
from app.store.queue.waiting import WaitingRows
from app.work.policy import WorkPolicy
from app.work.reconcile.actors import Actors
from app.work.reconcile.leases import GivenBack, Held, LeaseLost
from app.work.reconcile.troubles import (
    UNAVAILABLE,
    Trouble,
    backoff,
    describe,
    is_refusal_reported,
    is_reported,
    name_of,
)
from app.work.station import Station

_MAX_NEWER = 10_000
_LOG = logging.getLogger(__name__)


class Outcomes:
    """The ends of the runs of one worker."""

    def __init__(
        self,
        *,
        service: Service,
        station: Station,
        queue: Queue,
        signal: Signal,
        policy: WorkPolicy,
        actors: Actors,
        rows: WaitingRows,
    ) -> None:
        self._rows = rows
        self._service = service
        self._station = station
        self._queue = queue
        self._signal = signal
        self._policy = policy
        self._actors = actors
        self._newer: dict[UUID, float] = {}
        """Streams that a newer version has written to, and the loop's time until which they are not claimed."""

    async def judge(self, held: Held, sandbox: Sandbox, step: Step, error: Exception) -> Sandbox | None:
        """The sandbox to go on with, or None when the claim was given back."""
        if isinstance(error, RuntimeUnavailable):
            return await self._wait_for_engine(held, sandbox, step, error)
        self._station.succeeded(sandbox.id)
        if isinstance(error, RuntimeRejected) and isinstance(step, Ensure):
            failure = cmd.RecordFailure(name_of(step), error.reason, error.message)
            return await self.record(held, sandbox, failure, self._actors.worker)
        if isinstance(error, RuntimeRejected) and isinstance(step, SetPower):
            refused = cmd.RecordPowerRefused(error.reason, error.message, step.power)
            return await self.record(held, sandbox, refused, self._actors.worker)
        return await self.count(held, sandbox, step, error)

    async def count(self, held: Held, sandbox: Sandbox, step: Step, error: Exception) -> None:
        """An attempt failed: back-off, and an event when it says something new."""
        trouble = describe(step, error)
        attempt = held.claim.attempts + 1
        wait = backoff(step, attempt, self._policy)
        if isinstance(step, Remove):
            last = f"{trouble.reason}: {trouble.message}"
            _LOG.warning(
                "removal of sandbox %s failed (attempt %d), next in %.1f s: %s", sandbox.id, attempt, wait, last
            )
        if is_reported(trouble.reason, attempt, held.claim.last_reason):
            await self._report(held, sandbox, trouble, attempt)
        failed = Failed(attempt, trouble.reason, trouble.message)
        await self._defer(held, wait, failed=failed, missing_since=held.claim.missing_since)

    async def _wait_for_engine(self, held: Held, sandbox: Sandbox, step: Step, error: RuntimeUnavailable) -> None:
        wait = await self._station.suspect(sandbox.id, error)
        _LOG.info("sandbox %s waits %.1f s for the engine: %s", sandbox.id, wait, error)
        times = self._station.refusals(sandbox.id)
        if is_refusal_reported(times):
            await self._report(held, sandbox, Trouble(name_of(step), UNAVAILABLE, str(error)), times)
        # Absence has to be seen again: an engine that has just come back may not show everything yet.
        await self._defer(held, wait, failed=Failed(held.claim.attempts, UNAVAILABLE, str(error)))

    async def _report(self, held: Held, sandbox: Sandbox, trouble: Trouble, attempt: int) -> None:
        """About our attempt, so true at any version."""
        retry = cmd.RecordRetry(trouble.step, trouble.reason, trouble.message, attempt)
        await self._service.execute(sandbox.id, ANY_TENANT, retry, self._actors.meta(self._actors.worker, held.cause))

    async def record(
        self,
        held: Held,
        sandbox: Sandbox,
        observation: cmd.Observation,
        actor: Actor,
        is_reached: Callable[[Sandbox], bool] | None = None,
    ) -> Sandbox:
        """Append what was observed. When `is_reached` of the state after it, the claim ends in the same statement.

        Raises:
            GivenBack: the claim has ended.
            LeaseLost: it was lost to another worker meanwhile.
        """
        claim, meta = held.claim, self._actors.meta(actor, held.cause)
        completion = None if is_reached is None else Completion(claim.owner, claim.revision, is_reached)
        held.concluding, held.missed = completion is not None, False
        try:
            outcome = await self._service.record(sandbox, observation, meta, completion)
        finally:
            # The lease was extended meanwhile, as always. Only that the row was gone could not be judged.
            held.concluding = False
        if outcome.position is not None:
            held.cause = outcome.position  # what is done next follows from this
        held.ending = outcome.completed
        freeze = sandbox.frozen_by
        if freeze is not None and outcome.sandbox.frozen_by != freeze:
            await self.wake(freeze.snapshot_id)
        if outcome.completed:
            raise GivenBack
        if held.missed:
            raise LeaseLost
        return outcome.sandbox

    async def await_address(self, held: Held, sandbox: Sandbox, message: str) -> NoReturn:
        """The network is full: say so, and look again later. It is no failed attempt.

        Raises:
            GivenBack: always.
        """
        if sandbox.phase is Phase.PENDING:
            waiting = cmd.RecordWaiting(name_of(Ensure()), "NO_CAPACITY", message)
            await self.record(held, sandbox, waiting, self._actors.worker)
        await self.give_back(held, self._policy.place_again, awaiting=True)
        raise GivenBack

    async def complete(self, held: Held, *, closed: bool = False) -> None:
        """Nothing is left to do."""
        held.ending = True
        self._station.succeeded(held.stream_id)
        if not await self._queue.complete(held.claim, closed=closed):
            self._due(held)

    async def give_back(self, held: Held, wait: float, *, awaiting: bool = False) -> bool:
        """Due later, without a count. False when the claim was lost."""
        return await self._defer(held, wait, awaiting=awaiting)

    async def give_back_missing(self, held: Held, now: datetime, until: datetime) -> None:
        """The engine says that there is none: look again at `until`."""
        since = held.claim.missing_since or now
        await self._defer(held, (until - now).total_seconds(), awaiting=True, missing_since=since)

    async def pass_on(self, held: Held) -> None:
        """Due at once, for the workers of another engine or of ours."""
        held.ending = True
        await self._queue.release(held.claim)
        self._due(held)

    async def _defer(
        self,
        held: Held,
        wait: float,
        *,
        awaiting: bool = False,
        failed: Failed | None = None,
        missing_since: datetime | None = None,
    ) -> bool:
        held.ending = True
        deferred = await self._queue.defer(
            held.claim, wait, awaiting=awaiting, failed=failed, missing_since=missing_since
        )
        if deferred is None:
            _LOG.warning("the claim on sandbox %s was lost before it could be given back", held.stream_id)
            return False
        if deferred.due:
            self._due(held)
        elif wait < self._policy.poll:
            # Sooner than anybody looks without being told.
            asyncio.get_running_loop().call_later(wait, self._due, held)
        return True

    def _due(self, held: Held) -> None:
        """The writer of the news has woken claimers already, and they found the row held."""
        self._signal.poke(held.stream_id, work=True)

    async def wake(self, stream_id: UUID) -> None:
        """What another stream waits for has come."""
        for each in await self._rows.wake([stream_id]):
            self._signal.poke(each, work=True)

    async def suspect_snapshot(self, snapshot_id: UUID) -> None:
        """Its image was not there: have it looked at."""
        if await self._queue.enqueue_snapshots([snapshot_id], USER):
            self._signal.poke(snapshot_id, work=True)

    async def put_off(self, held: Held, wait: float, failed: Failed) -> None:
        """Due later, with a count or a reason."""
        await self._defer(held, wait, awaiting=True, failed=failed)

    async def refresh(self, held: Held) -> None:
        """The stream has moved: take the present revision, then load.

        Raises:
            LeaseLost: the claim is somebody else's.
        """
        beat = (await self._queue.probe([held.claim])).get(held.stream_id)
        if beat is None:
            raise LeaseLost
        held.renew(beat)

    async def hand_back(self, held: Held) -> None:
        """A stop: due at once; the attempt does not count."""
        held.ending = True
        with suppress(StoreUnavailable):
            await self._queue.release(held.claim)
            self._due(held)

    async def leave_alone(self, held: Held, error: Exception) -> None:
        """A newer version has written to the stream, so this one does nothing about it, and says so once.

        The row is due at once, for workers of that version, and not claimed again by this one for a while.
        """
        if held.stream_id not in self._newer:
            if len(self._newer) >= _MAX_NEWER:
                self._newer.clear()
            _LOG.warning("sandbox %s is left to workers of a newer version: %s", held.stream_id, error)
        self._newer[held.stream_id] = asyncio.get_running_loop().time() + self._policy.newer_wait
        await self.hand_back(held)

    def left_alone(self) -> Sequence[UUID]:
        """Streams that are not to be claimed now."""
        now = asyncio.get_running_loop().time()
        return [stream_id for stream_id, until in self._newer.items() if until > now]

    async def set_aside(self, held: Held, error: Exception) -> None:
        """No step has failed but the run itself, e.g. on a head row that cannot be read. The queue row says so."""
        trouble = describe(Observe(), error)
        attempt = held.claim.attempts + 1
        wait = backoff(Observe(), attempt, self._policy)
        _LOG.error("the run of sandbox %s broke down (attempt %d), next in %.1f s", held.stream_id, attempt, wait)
        with suppress(Exception):  # then its lease brings it back
            await self._defer(held, wait, failed=Failed(attempt, trouble.reason, trouble.message))
