"""Claims while they are worked on: kept alive, and dropped when they are lost.

**Protocol.** One loop a worker. Every third of a lease it extends all held claims in one statement. The answer tells:

* the row is gone or has another owner: the claim was lost, its run is cancelled and records nothing;
* nothing (the database is away): a claim is trusted until its lease would have run out, counted from *before* the
  statement that took or extended it. Then it counts as lost, since somebody else may have it by now. A second loop
  watches this, because the first may be waiting for a database that says nothing.

News about a claimed stream do not interrupt its run: no step takes long, and what it observed is recorded only if the
stream has not moved.

**How it fails.** A process that was stopped for longer than its lease and wakes up has a moment in which two runs of
one sandbox exist. They cannot harm: observations are appended against the version they were made at, and names on the
engine are unique.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta
from uuid import UUID

import msgspec

from app.errors import SandledgerError, StoreUnavailable
from app.store.queue.reconcile import Beat, Claim, Queue
from app.work.policy import WorkPolicy
from app.work.watchdog import Watchdog

LOOP = "leases"
_TRUST_CHECKS = 20
"""How often a lease's end is looked at while one lease lasts."""
_LOG = logging.getLogger(__name__)


class LeaseLost(SandledgerError):
    """Somebody else may be at work; say nothing."""


class GivenBack(SandledgerError):
    """The claim has ended; the run has nothing more to do."""


class Held:
    """One claim in the hands of a run."""

    def __init__(self, claim: Claim, trusted_until: float) -> None:
        self.claim = claim
        self.trusted_until = trusted_until
        """By the loop's clock."""
        self.cause = claim.cause
        """Position of the event that the next one follows from: the one that asked, then the last that was recorded."""
        self.lost = False
        self.left = False
        """A stop could not wait for it: the lease runs out by itself, after what is still under way has settled."""
        self.concluding = False
        """An append is under way that may end the claim: that the row is gone may be our own doing."""
        self.missed = False
        """The row was gone meanwhile."""
        self.ending = False
        """The row is being given back: its absence is no loss."""
        self.run: asyncio.Task[None] | None = None
        self._read: tuple[datetime, float] | None = None

    def read_at(self, now: datetime) -> None:
        """The database's clock, as the head was read with it."""
        self._read = now, asyncio.get_running_loop().time()

    @property
    def now(self) -> datetime | None:
        """The database's clock by now, as nearly as this process can tell."""
        if self._read is None:
            return None
        return self._read[0] + timedelta(seconds=asyncio.get_running_loop().time() - self._read[1])

    @property
    def stream_id(self) -> UUID:
        """Whose claim it is."""
        return self.claim.stream_id

    def renew(self, beat: Beat) -> None:
        """From here on the run is for this revision; the head has to be read after this."""
        self.claim = msgspec.structs.replace(self.claim, revision=beat.revision, cause=beat.cause)
        self.cause = beat.cause

    def start_over(self) -> None:
        """Something succeeded: failures before it do not count any more."""
        if self.claim.attempts or self.claim.last_reason:
            self.claim = msgspec.structs.replace(self.claim, attempts=0, first_failed_at=None, last_reason=None)

    def missing(self, since: datetime | None) -> None:
        """Since when the engine says there is none."""
        self.claim = msgspec.structs.replace(self.claim, missing_since=since)

    def lose(self) -> None:
        """Cancel the run; it records nothing."""
        self.lost = True
        if self.run is not None:
            self.run.cancel()


class Leases:
    """The claims of one worker."""

    def __init__(self, queue: Queue, policy: WorkPolicy, watchdog: Watchdog) -> None:
        self._queue = queue
        self._policy = policy
        self._watchdog = watchdog
        self._held: set[Held] = set()
        self._holding = asyncio.Event()

    def hold(self, claim: Claim, claimed_at: float) -> Held:
        """Watch it. `claimed_at` is the loop's time from before the claim was asked for."""
        held = Held(claim, claimed_at + self._policy.lease)
        self._held.add(held)
        self._holding.set()
        return held

    def drop(self, held: Held) -> None:
        """The run of this claim has ended, so the lease is extended no more."""
        self._held.discard(held)
        if not self._held:
            self._holding.clear()

    def leave(self) -> None:
        """Let the claims that are still held run out."""
        for held in self._held:
            held.left = True

    async def run(self) -> None:
        """Extend the leases of all held claims, and give up those that may have run out, until cancelled."""
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self._beat_forever(), name="leases-beat")
            loops.create_task(self._watch_trust(), name="leases-trust")

    async def _beat_forever(self) -> None:
        while True:
            self._watchdog.stamp(LOOP)
            await asyncio.sleep(self._policy.heartbeat)
            try:
                async with asyncio.timeout(self._policy.lease):
                    await self.beat()
            except TimeoutError:
                _LOG.warning("leases cannot be extended: the database does not answer")
            except StoreUnavailable as error:
                _LOG.warning("leases cannot be extended: %s", error)
            except Exception:  # noqa: BLE001 - whatever it is, the next beat may work
                _LOG.exception("a heartbeat failed; leases run out if this goes on")

    async def _watch_trust(self) -> None:
        while True:
            await self._holding.wait()
            await asyncio.sleep(self._policy.lease / _TRUST_CHECKS)
            self.distrust()

    async def beat(self) -> None:
        """Extend the lease of every held claim in one statement; a claim that is not ours any more is lost."""
        now = asyncio.get_running_loop().time()
        watched = [held for held in self._held if not held.ending]
        if not watched:
            return
        beats = await self._queue.extend([held.claim for held in watched], self._policy.lease)
        # Nothing is awaited from here on: an extension that the database made is an extension that we know of.
        for held in watched:
            if held.stream_id in beats:
                held.trusted_until = now + self._policy.lease
            elif held.concluding:
                held.missed = True
            else:
                self._lost(held, "somebody else has it")

    def distrust(self) -> None:
        """Give up the claims whose leases may have run out."""
        now = asyncio.get_running_loop().time()
        for held in [held for held in self._held if held.trusted_until <= now and not held.ending]:
            self._lost(held, "its lease ran out while the database was away")

    def _lost(self, held: Held, why: str) -> None:
        if held.ending or held.lost or held not in self._held:
            return  # it ended while the answer was on its way
        _LOG.warning("lost the claim on %s %s: %s", held.claim.kind, held.stream_id, why)
        held.lose()
