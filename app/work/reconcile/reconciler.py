"""One claim, from head to goal: plan -> act through the driver -> record -> plan again.

**Protocol.** A run loads the head, then repeats: ask the core for the one next step, act, record what was seen *at the
version that was loaded*. It ends with `Settled` (the claim is completed) or with a wait (it is deferred). A fresh
sandbox that goes well costs one load, one `ensure`, one append, one delete; the engine is not asked first, since its
create meets an existing object by name.

**Invariants.** What was seen is recorded only if the stream has not moved since the load; else the look is thrown
away and the run starts over (`StaleVersion`), because a look from before a delete says nothing about the time after
it. Every act may be repeated from any point, here or in another process, because drivers promise that. Absence is
believed after two looks, `missing_grace` apart, that the engine answered; silence in between proves nothing.

**Who did it.** Facts that follow from our own act (created, started, paused on request, removed) carry the reconciler
as actor; what a plain look found changed, an exit, and a loss carry the runtime, named after the driver. A container
that had ended by the time `ensure` returned is recorded in two appends, so that each has its own actor.

**How it fails.** See `app.work.reconcile.troubles` for the engine's side. A database that goes away ends the run
without a word, and the lease brings it back. An error of our own outside of any step is counted in the queue and tried
again, later each time, for ever: it says nothing about the sandbox. A graceful stop cancels the run and hands the claim
back; nothing counts. A lost claim ends the run in silence, but whoever may have made an object for a sandbox that has
ended takes it away again: that is always right, and nobody else may look there for a while.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import datetime

import msgspec
from msgspec import Struct

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Look
from app.domain.sandbox.plan import (
    Absence,
    ConfirmMissing,
    Ensure,
    Lose,
    Observe,
    Remove,
    SetPower,
    Settled,
    Step,
    plan,
)
from app.domain.sandbox.state import Desired, RuntimeState, Sandbox
from app.errors import RuntimeFault, RuntimeRejected, RuntimeUnavailable, StoreUnavailable
from app.runtime.driver import Driver, Observed, Power
from app.service.sandboxes import Service, StaleVersion
from app.store.queue.reconcile import Failed, Queue
from app.work.policy import WorkPolicy
from app.work.reconcile.leases import Held, LeaseLost, Superseded
from app.work.reconcile.troubles import (
    EXHAUSTED,
    UNAVAILABLE,
    Breaker,
    Trouble,
    backoff,
    describe,
    is_hopeless,
    is_refusal_told,
    is_told,
)
from app.work.reconcile.workloads import Workloads

_MOST_STEPS = 8
_MOST_STARTS = 5
_CLEANUP_S = 60.0
_LOG = logging.getLogger(__name__)


class Actors(Struct, frozen=True):
    """In whose name facts are recorded."""

    app_version: str
    worker: ev.Actor
    runtime: ev.Actor


class NoProgress(Exception):
    """A run went round without reaching a goal: the engine says one thing and does another."""


class Reconciler:
    """Brings single sandboxes to their goals."""

    def __init__(
        self,
        *,
        service: Service,
        driver: Driver,
        workloads: Workloads,
        queue: Queue,
        breaker: Breaker,
        policy: WorkPolicy,
        actors: Actors,
    ) -> None:
        self._service = service
        self._driver = driver
        self._workloads = workloads
        self._queue = queue
        self._breaker = breaker
        self._policy = policy
        self._actors = actors

    async def run(self, held: Held) -> None:
        """Work on a claim to its end. Raises nothing but a cancellation."""
        try:
            await self._to_goal(held)
        except LeaseLost:
            await self._clean_up(held)
        except asyncio.CancelledError:
            if held.lost:
                await self._clean_up(held)
            elif not held.left:
                await self._hand_back(held)
            raise
        except StoreUnavailable as error:
            _LOG.warning("sandbox %s is left to the end of its lease: %s", held.sandbox_id, error)
        except Exception as error:  # noqa: BLE001 - one sandbox's error must not end the worker
            await self._set_aside(held, error)

    async def _to_goal(self, held: Held) -> None:
        for _ in range(_MOST_STARTS):
            try:
                await self._from_head(held)
            except (StaleVersion, Superseded):
                await self._refresh(held)
            else:
                return
        await self._defer(held, self._policy.backoff_base)

    async def _refresh(self, held: Held) -> None:
        """What is wanted has changed: take the present generation, then load."""
        beat = (await self._queue.probe([held.claim])).get(held.sandbox_id)
        if beat is None:
            raise LeaseLost
        held.renew(beat)

    async def _from_head(self, held: Held) -> None:
        loaded = await self._service.view.load(held.sandbox_id)
        if loaded is None:
            return await self._complete(held)
        box, now = loaded
        look: Look | None = None
        step: Step = Observe()
        for _ in range(_MOST_STEPS):
            step = plan(box, look, Absence(now, held.claim.missing_since, self._policy.grace))
            match step:
                case Settled():
                    return await self._complete(held)
                case ConfirmMissing(until=until):
                    since = held.claim.missing_since or now
                    return await self._defer(held, (until - now).total_seconds(), missing_since=since)
                case _:
                    pass
            try:
                box, look = await self._take(held, box, step)
            except (StaleVersion, Superseded, LeaseLost, StoreUnavailable):
                raise
            except Exception as error:  # noqa: BLE001 - every other failure is judged
                failed = await self._judge(held, box, step, error)
                if failed is None:
                    return None
                box, look = failed, None
        await self._count(held, box, step, describe(step, NoProgress()))
        return None

    async def _take(self, held: Held, box: Sandbox, step: Step) -> tuple[Sandbox, Look | None]:
        """Act, and record."""
        driver = self._driver
        match step:
            case Observe():
                seen = await driver.observe(box.id)
                self._breaker.well(box.id)
                after = await self._saw(held, box, seen, "observe", acted=False)
            case Ensure():
                work = await self._workloads.of(box)
                seen = await held.interruptibly(driver.ensure(work))
                self._breaker.well(box.id)
                after = await self._saw(held, box, seen, "ensure", acted=True)
            case SetPower(power=power):
                seen = await driver.set_power(box.id, power)
                self._breaker.well(box.id)
                after = await self._saw(held, box, seen, "set_power", acted=True)
            case Remove():
                await driver.remove(box.id)
                self._breaker.well(box.id)
                seen, after = None, await self._record(held, box, cmd.RecordRemoved(), self._actors.worker)
            case Lose(missing_since=since):
                seen, after = None, await self._record(held, box, cmd.RecordLost(since), self._actors.runtime)
            case ConfirmMissing() | Settled():  # not acts
                return box, None
        if after.version != box.version:
            held.start_over()
        return after, Look(seen)

    async def _saw(self, held: Held, box: Sandbox, seen: Observed | None, found_by: str, *, acted: bool) -> Sandbox:
        if seen is None:
            return box
        held.missing(None)
        actor = self._actors.worker if acted else self._actors.runtime
        if acted and seen.power is Power.EXITED:
            if box.observed in (RuntimeState.NONE, RuntimeState.CREATED):
                # That it was made and started is our doing; that it ended is not.
                made = msgspec.structs.replace(seen, power=Power.CREATED, exit=None)
                box = await self._record(held, box, cmd.RecordSeen(made, found_by), actor)
            actor = self._actors.runtime
        return await self._record(held, box, cmd.RecordSeen(seen, found_by), actor)

    async def _record(self, held: Held, box: Sandbox, fact: cmd.Fact, actor: ev.Actor) -> Sandbox:
        meta = ev.Meta(actor, self._actors.app_version, cause=held.cause)
        outcome = await self._service.record(box, fact, meta)
        if outcome.position is not None:
            held.cause = outcome.position  # what is done next follows from this
        return outcome.sandbox

    async def _judge(self, held: Held, box: Sandbox, step: Step, error: Exception) -> Sandbox | None:
        """The sandbox to go on with, or None when the claim was deferred."""
        if isinstance(error, RuntimeRejected) and isinstance(step, Ensure):
            self._breaker.well(box.id)
            return await self._fail(held, box, error.reason, error.message)
        if isinstance(error, RuntimeUnavailable):
            return await self._wait_for_engine(held, box, step, error)
        self._breaker.well(box.id)
        return await self._count(held, box, step, describe(step, error))

    async def _wait_for_engine(self, held: Held, box: Sandbox, step: Step, error: RuntimeUnavailable) -> None:
        wait = await self._breaker.suspect(box.id)
        _LOG.info("sandbox %s waits %.1f s for the engine: %s", box.id, wait, error)
        times = self._breaker.refusals(box.id)
        if is_refusal_told(times):
            await self._tell(held, box, Trouble(type(step).__name__.lower(), UNAVAILABLE, str(error)), times)
        # Absence has to be seen anew: an engine that has just come back may not show everything yet.
        reason = f"{UNAVAILABLE}: {error}"
        await self._defer(held, wait, failed=Failed(held.claim.attempts, held.claim.last_code, reason))

    async def _tell(self, held: Held, box: Sandbox, trouble: Trouble, attempt: int) -> None:
        """About our attempt, so true at any version."""
        fact = cmd.RecordRetry(trouble.step, trouble.code, trouble.message, attempt)
        meta = ev.Meta(self._actors.worker, self._actors.app_version, cause=held.cause)
        await self._service.execute(box.id, fact, meta)

    async def _fail(self, held: Held, box: Sandbox, reason: str, message: str) -> Sandbox:
        return await self._record(held, box, cmd.RecordFailure(reason, message), self._actors.worker)

    async def _count(self, held: Held, box: Sandbox, step: Step, trouble: Trouble) -> Sandbox | None:
        claim = held.claim
        attempt = claim.attempts + 1
        last = f"{trouble.code}: {trouble.message}"
        if is_hopeless(step, attempt, claim.failing_for, self._policy):
            spent = f"{attempt} attempts in {claim.failing_for:.0f} s"
            return await self._fail(held, box, EXHAUSTED, f"Given up after {spent}; the last one failed with {last}")
        wait = backoff(step, attempt, self._policy)
        if isinstance(step, Remove):
            _LOG.warning("removal of sandbox %s failed (attempt %d), next in %.1f s: %s", box.id, attempt, wait, last)
        if is_told(trouble, attempt, claim.last_code):
            await self._tell(held, box, trouble, attempt)
        failed = Failed(attempt, trouble.code, trouble.message)
        await self._defer(held, wait, failed=failed, missing_since=claim.missing_since)
        return None

    async def _complete(self, held: Held) -> None:
        held.ending = True
        self._breaker.well(held.sandbox_id)
        await self._queue.complete(held.claim)

    async def _defer(
        self, held: Held, wait: float, *, failed: Failed | None = None, missing_since: datetime | None = None
    ) -> None:
        held.ending = True
        if not await self._queue.defer(held.claim, wait, failed=failed, missing_since=missing_since):
            _LOG.warning("the claim on sandbox %s was lost before it could be given back", held.sandbox_id)

    async def _set_aside(self, held: Held, error: Exception) -> None:
        """No step has failed but the run itself, e.g. on a head row that cannot be read. The queue row says so."""
        trouble = describe(Observe(), error)
        attempt = held.claim.attempts + 1
        wait = backoff(Observe(), attempt, self._policy)
        _LOG.error("the run of sandbox %s broke down (attempt %d), next in %.1f s", held.sandbox_id, attempt, wait)
        with suppress(Exception):  # then its lease brings it back
            await self._defer(held, wait, failed=Failed(attempt, trouble.code, trouble.message))

    async def _hand_back(self, held: Held) -> None:
        held.ending = True
        with suppress(StoreUnavailable):
            await self._queue.release(held.claim)

    async def _clean_up(self, held: Held) -> None:
        """After a lost claim: what we may have made for a sandbox that has ended has to go."""
        with suppress(StoreUnavailable, RuntimeFault, TimeoutError):
            async with asyncio.timeout(_CLEANUP_S):
                loaded = await self._service.view.load(held.sandbox_id)
                if loaded is not None and (loaded[0].desired is Desired.TERMINATED or loaded[0].closed_at is not None):
                    await self._driver.remove(held.sandbox_id)
