"""Claims while they are worked on: kept alive, watched for news, and dropped when they are lost.

**Protocol.** One loop a worker. Every `probe` seconds it asks the queue about all held claims in one statement, and
every third of a lease it extends them in one statement. The answer tells three things:

* the generation rose: somebody wants something. If a long step (`ensure`, which may pull for minutes) is under way and
  the head no longer calls for it, the step is cancelled and its run starts over from the new head (`Superseded`);
* the row is gone or has another owner: the claim was lost, its run is cancelled and records nothing;
* nothing (the database is away): a claim is trusted until its lease would have run out, counted from *before* the
  statement that took or extended it. Then it counts as lost, since somebody else may have it by now.

**How it fails.** A process that was stopped for longer than its lease and wakes up has a moment in which two runs of
one sandbox exist. They cannot harm: facts are appended against the version they were seen at, and names on the engine
are unique.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from app.domain.sandbox.plan import Absence, Ensure, plan
from app.errors import SandledgerError, StoreUnavailable
from app.store.queue.reconcile import Beat, Claim, Queue
from app.views.current import CurrentView
from app.work.policy import WorkPolicy

T = TypeVar("T")
_LOG = logging.getLogger(__name__)


class Superseded(SandledgerError):
    """What the step was for is not wanted any more; start over from the head."""


class LeaseLost(SandledgerError):
    """Somebody else may be at work; say nothing."""


class Held:
    """One claim in the hands of a run."""

    def __init__(self, claim: Claim, trusted_until: float) -> None:
        self.claim = claim
        self.trusted_until = trusted_until
        """By the loop's clock."""
        self.noticed = claim.generation
        """The highest generation that was looked into; the claim's own is what the run has acted on."""
        self.cause = claim.cause
        """Position of the event that the next one follows from: the one that asked, then the last that was recorded."""
        self.lost = False
        self.left = False
        """A stop could not wait for it: the lease runs out by itself, after what is still under way has settled."""
        self.ending = False
        """The row is being given back: its absence is no loss."""
        self.run: asyncio.Task[None] | None = None
        self._step: asyncio.Task[Any] | None = None
        self._superseded = False

    @property
    def sandbox_id(self) -> UUID:
        """Which sandbox."""
        return self.claim.sandbox_id

    def renew(self, beat: Beat) -> None:
        """From here on the run is for this generation; the head has to be read after this."""
        self.claim = msgspec.structs.replace(self.claim, generation=beat.generation, cause=beat.cause)
        self.cause = beat.cause
        self.noticed = beat.generation

    def start_over(self) -> None:
        """Something succeeded: failures before it do not count any more."""
        if self.claim.attempts:
            self.claim = msgspec.structs.replace(
                self.claim, attempts=0, first_failed_at=None, failing_for=0, last_code=None
            )

    def missing(self, since: datetime | None) -> None:
        """Since when the engine says there is none."""
        self.claim = msgspec.structs.replace(self.claim, missing_since=since)

    @property
    def interruptible(self) -> bool:
        """A long step is under way."""
        return self._step is not None

    async def interruptibly(self, step: Coroutine[Any, Any, T]) -> T:
        """Run a long step that news may cancel.

        Raises:
            Superseded: they did.
        """
        self._superseded = False
        self._step = asyncio.create_task(step)
        try:
            return await self._step
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._superseded and not (task and task.cancelling()):
                raise Superseded(f"sandbox {self.sandbox_id}: the step under way is not wanted any more") from None
            raise
        finally:
            self._step = None

    def supersede(self) -> None:
        """Cancel the long step under way."""
        if self._step is not None:
            self._superseded = True
            self._step.cancel()

    def lose(self) -> None:
        """Cancel the run; it records nothing."""
        self.lost = True
        if self.run is not None:
            self.run.cancel()


class Leases:
    """The claims of one worker."""

    def __init__(self, queue: Queue, view: CurrentView, policy: WorkPolicy) -> None:
        self._queue = queue
        self._view = view
        self._policy = policy
        self._held: set[Held] = set()
        self._extend_at = 0.0

    def hold(self, claim: Claim, claimed_at: float) -> Held:
        """Watch it. `claimed_at` is the loop's time from before the claim was asked for."""
        held = Held(claim, claimed_at + self._policy.lease)
        self._held.add(held)
        return held

    def drop(self, held: Held) -> None:
        """It has ended."""
        self._held.discard(held)

    def leave(self) -> None:
        """Let the claims that are still held run out."""
        for held in self._held:
            held.left = True

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await asyncio.sleep(self._policy.probe)
            try:
                # A database that says nothing at all must not keep us from noticing that our leases are over.
                async with asyncio.timeout(self._policy.heartbeat):
                    await self.beat()
            except TimeoutError:
                _LOG.warning("leases cannot be checked: the database does not answer")
            except StoreUnavailable as error:
                _LOG.warning("leases cannot be checked: %s", error)
            except Exception:  # noqa: BLE001 - whatever it is, the next beat may work
                _LOG.exception("a heartbeat failed; leases run out if this goes on")
            self._distrust()

    async def beat(self) -> None:
        """Ask about every held claim."""
        now = asyncio.get_running_loop().time()
        watched = [held for held in self._held if not held.ending]
        if not watched:
            return
        claims = [held.claim for held in watched]
        extending = now >= self._extend_at
        beats = await (self._queue.extend(claims, self._policy.lease) if extending else self._queue.probe(claims))
        if extending:
            self._extend_at = now + self._policy.heartbeat
        for held in watched:
            beat = beats.get(held.sandbox_id)
            if beat is None:
                self._lost(held, "somebody else has it")
                continue
            if extending:
                held.trusted_until = now + self._policy.lease
            if beat.generation > held.noticed:
                await self._look_into(held, beat)

    async def _look_into(self, held: Held, beat: Beat) -> None:
        """A rise may be no more than a hint to look again, which the run's end will lead to by itself."""
        if not held.interruptible:
            return  # a long step may yet begin on the old head: the next beat asks again
        held.noticed = beat.generation
        loaded = await self._view.load(held.sandbox_id)
        if loaded is not None:
            box, now = loaded
            if isinstance(plan(box, None, Absence(now, None, self._policy.grace)), Ensure):
                return
        held.supersede()

    def _distrust(self) -> None:
        now = asyncio.get_running_loop().time()
        for held in [held for held in self._held if held.trusted_until <= now and not held.ending]:
            self._lost(held, "its lease ran out while the database was away")

    def _lost(self, held: Held, why: str) -> None:
        if held.ending or held.lost or held not in self._held:
            return  # it ended while the answer was on its way
        _LOG.warning("lost the claim on sandbox %s: %s", held.sandbox_id, why)
        held.lose()
