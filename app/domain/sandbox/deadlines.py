"""Which deadlines a sandbox has: a function of its state, so that nothing stays in a transitional phase without an end.

=============== ======================================= =========================================================
name            exists while                            when it fires
=============== ======================================= =========================================================
`expiry`        it has an `expires_at` and no ending    `sandbox.expired`
`transition`    Pending                                 `sandbox.failed`, reason `PROVISIONING_TIMEOUT`
`transition`    Pausing, Resuming                       `sandbox.pause_failed`, `sandbox.resume_failed`
`transition`    Stopping, until it is closed            `sandbox.overdue`, then later each time; it is never given up
`ready`         it runs and its agent has not answered  `sandbox.agent_unreachable`; it counts as Running from then on
`freeze`        it stands still for a snapshot          `sandbox.thaw_requested`, after the snapshot has failed
=============== ======================================= =========================================================

`transition` counts from `changed_at`, and a resume while the sandbox stands still for a snapshot from the latest end of
that (`longest`), `ready` from the record of the run's start, `freeze` from `freeze_at`. The append
writes the difference between the deadlines before and after, with its own reading of the clock, so a deadline is as
exact as the event that sets it. Reasons that a deadline gives itself: `PROVISIONING_TIMEOUT`, `PAUSE_TIMEOUT`,
`RESUME_TIMEOUT`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from msgspec import Struct

from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase, Sandbox

EXPIRY = "expiry"
TRANSITION = "transition"
READY = "ready"
FREEZE = "freeze"


class Limits(Struct, frozen=True):
    """How long a transitional phase may last, in seconds."""

    pending_s: float = 900
    pausing_s: float = 60
    resuming_s: float = 60
    stopping_s: float = 60
    """Until the first report; each next one waits twice as long."""
    overdue_max_s: float = 3600
    """Longest time between two reports."""
    ready_s: float = 30
    """How long an agent has to answer after the start of a run."""
    freeze_s: float = 180
    """How long a snapshot may hold a sandbox still; and how long it may take until it stands still."""
    commit_s: float = 600
    """How long a snapshot may be Creating."""

    def of(self, phase: Phase) -> float | None:
        """Seconds, or None for a phase that may last."""
        return {
            Phase.PENDING: self.pending_s,
            Phase.PAUSING: self.pausing_s,
            Phase.RESUMING: self.resuming_s,
            Phase.STOPPING: self.stopping_s,
        }.get(phase)

    def report(self, elapsed_s: float) -> tuple[int, float]:
        """How many reports about a Stopping sandbox are due after so many seconds, and in how many the next one is."""
        times, wait, due = 0, self.stopping_s, self.stopping_s
        while due <= elapsed_s:
            times += 1
            wait = min(2 * wait, self.overdue_max_s)
            due += wait
        return times, due - elapsed_s


def longest(sandbox: Sandbox, limits: Limits) -> float | None:
    """Seconds after `changed_at` in which its transition has to end. None = its phase may last."""
    limit, frozen_at = limits.of(sandbox.phase), sandbox.freeze_at
    if limit is None or sandbox.phase is not Phase.RESUMING or frozen_at is None:
        return limit
    return limit + max(0.0, limits.freeze_s - (sandbox.changed_at - frozen_at).total_seconds())


class Due(Struct, frozen=True):
    """When a deadline fires: at an instant, or so many seconds after the append."""

    at: datetime | None = None
    after_s: float | None = None


def changes(
    before: Sandbox | None, after: Sandbox, events: Sequence[ev.Event], now: datetime, limits: Limits
) -> Mapping[str, Due | None]:
    """What an append does to the deadlines, by name. None = the deadline goes."""
    found: dict[str, Due | None] = {}
    alive = after.ending is None
    if before is None:
        begun = next(event for event in events if isinstance(event, ev.Requested))
        if begun.timeout_s is not None:
            found[EXPIRY] = Due(after_s=begun.timeout_s)
    elif before.ending is None and before.expires_at is not None and not alive:
        found[EXPIRY] = None
    elif alive and after.expires_at is not None and after.expires_at != before.expires_at:
        found[EXPIRY] = Due(at=after.expires_at)
    if before is None or (before.phase, before.changed_at) != (after.phase, after.changed_at):
        # The phase may be the same: a restart from outside while Pausing begins the phase again.
        limit = longest(after, limits)
        if limit is not None:
            found[TRANSITION] = Due(after_s=limit)
        elif before is not None and limits.of(before.phase) is not None:
            found[TRANSITION] = None
    elif (limit := longest(after, limits)) != (was := longest(before, limits)) and limit is not None:
        # It is resumed, and stands still for a snapshot since now, or not any more.
        longer = was is None or limit > was
        end = after.changed_at + timedelta(seconds=limit)
        found[TRANSITION] = Due(at=end) if longer else Due(after_s=limits.resuming_s)
    elif any(isinstance(event, ev.Overdue) for event in events):
        _, wait = limits.report((now - after.changed_at).total_seconds())
        found[TRANSITION] = Due(after_s=wait)
    if after.awaits_agent and (before is None or not before.awaits_agent or before.run != after.run):
        found[READY] = Due(after_s=limits.ready_s)
    elif before is not None and before.awaits_agent and not after.awaits_agent:
        found[READY] = None
    if after.holds_still and (before is None or not before.holds_still or before.freeze_at != after.freeze_at):
        found[FREEZE] = Due(after_s=limits.freeze_s)
    elif before is not None and before.holds_still and not after.holds_still:
        found[FREEZE] = None
    return found
