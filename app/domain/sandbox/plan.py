"""plan(state, answer) -> the one next step of the reconciler.

The reconciler repeats: act on the step, record what was observed, plan again, until `Settled` or a wait. A step is safe
to repeat after a crash, because drivers are. `answer` None means that the engine was not asked in this run yet; a
fresh sandbox is created without asking first, since create meets an existing object by its name anyway.

`Fetch`, `Probe` and `Wait` give the claim back. What they wait for wakes the stream again, or the time does. A fetch is
planned by the reconciler when `ensure` answers that the image is missing, and `InstallAgent` when it does not know the
agent to be on the engine: the log does not say what an engine has cached.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeAlias

from msgspec import Struct

from app.domain.sandbox.observed import Answer, Power, Waiting
from app.domain.sandbox.state import PROBE, Desired, Phase, RuntimeState, Sandbox

WAIT_INTERVAL = timedelta(seconds=5)
"""How long a waiting stream rests when no hint wakes it."""
COPY_PATIENCE = timedelta(seconds=60)
"""How long the removal of a sandbox leaves a snapshot that is copying its files the time to end that."""


class Place(Struct, frozen=True):
    """Choose an engine for a sandbox that has none."""


class Observe(Struct, frozen=True):
    """Ask the engine what is there, because nothing can be decided without it."""


class Fetch(Struct, frozen=True):
    """Have the image brought to the engine, outside the slots."""


class InstallAgent(Struct, frozen=True):
    """Have the agent's files brought to the engine, which every sandbox there shares."""


class Ensure(Struct, frozen=True):
    """Create or adopt, and start."""


class Probe(Struct, frozen=True):
    """Ask the agent until it answers, outside the slots."""


class SetPower(Struct, frozen=True):
    """Pause or resume the object on its engine."""

    power: Power


class Remove(Struct, frozen=True):
    """Remove every part. It is no error when there is none."""


class ConfirmMissing(Struct, frozen=True):
    """The engine says that there is none; ask again at `until` before believing it."""

    until: datetime


class Lose(Struct, frozen=True):
    """Missing for long enough: record the loss."""

    missing_since: datetime


class Wait(Struct, frozen=True):
    """Nothing to do before a hint, or before `until`."""

    until: datetime
    waiting: Waiting


class Settled(Struct, frozen=True):
    """Nothing to do until something changes."""


Step: TypeAlias = (
    Place | Observe | Fetch | InstallAgent | Ensure | Probe | SetPower | Remove | ConfirmMissing | Lose | Wait | Settled
)

STEP_NAMES: dict[type[Step], str] = {
    Place: "place",
    Observe: "observe",
    Fetch: "fetch",
    InstallAgent: "install_agent",
    Ensure: "ensure",
    Probe: PROBE,
    SetPower: "set_power",
    Remove: "remove",
}
"""The word of a step in events and on the wire."""


class Absence(Struct, frozen=True):
    """Since when the engine has been saying "none", and how long that must last to be believed."""

    now: datetime
    missing_since: datetime | None
    grace: timedelta


def plan(sandbox: Sandbox, answer: Answer | None, absence: Absence) -> Step:
    """The next step towards what is desired."""
    if sandbox.object_id is None:
        return _unplaced(sandbox)
    if sandbox.closed_at is not None:
        return _stay_away(answer)
    failed = sandbox.failure is not None and sandbox.observed is not RuntimeState.REMOVED
    if sandbox.desired is Desired.TERMINATED or failed:
        until = _copied_by(sandbox)
        if until is not None and absence.now < until:
            return Wait(until, Waiting(STEP_NAMES[Remove], "SNAPSHOT_IN_PROGRESS"))
        return Remove()
    match sandbox.observed:
        case RuntimeState.NONE | RuntimeState.CREATED:
            return _provide(answer, absence)
        case RuntimeState.RUNNING | RuntimeState.PAUSED:
            return _keep(sandbox, answer, absence)
        case RuntimeState.EXITED:
            # Its own end is final: what runs under its name now was started behind our back.
            if answer is None:
                return Observe()
            return Remove() if _stirs(answer) else Settled()
        case RuntimeState.LOST | RuntimeState.REMOVED:
            return _stay_away(answer)


def _copied_by(sandbox: Sandbox) -> datetime | None:
    """Until when the removal leaves a snapshot the time to copy the files. None: no snapshot copies them."""
    freeze, ending = sandbox.frozen_by, sandbox.ending
    copying = freeze is not None and freeze.run is not None and freeze.thaw is None
    return ending.at + COPY_PATIENCE if copying and ending is not None else None


def _unplaced(sandbox: Sandbox) -> Step:
    """Never placed, so nothing of it can be on any engine."""
    return Place() if sandbox.may_run else Settled()


def _provide(answer: Answer | None, absence: Absence) -> Step:
    seen = None if answer is None else answer.observed
    if seen is not None and seen.power is Power.CREATED and seen.waiting is not None:
        return Wait(absence.now + WAIT_INTERVAL, seen.waiting)
    return Ensure()


def _keep(sandbox: Sandbox, answer: Answer | None, absence: Absence) -> Step:
    freeze = sandbox.frozen_by
    wanted = Power.PAUSED if sandbox.desired is Desired.PAUSED or sandbox.holds_still else Power.RUNNING
    if answer is None:
        if freeze is not None:
            # One that stands still is looked at first: a pause would hide that it had run meanwhile.
            return SetPower(wanted) if freeze.run is None and freeze.thaw is None else Observe()
        differs = sandbox.observed.value != wanted.value
        return SetPower(wanted) if differs else Observe()
    if answer.observed is None or answer.observed.main is None:
        since = absence.missing_since
        if since is None or absence.now < since + absence.grace:
            return ConfirmMissing((since or absence.now) + absence.grace)
        return Lose(since)
    if answer.observed.power is Power.CREATED:
        # It ran, but an engine that lost power before its disk was written remembers only the create.
        return _provide(answer, absence)
    if freeze is not None:
        if answer.observed.power is not wanted:
            return SetPower(wanted)
        if freeze.thaw is not None:
            return Observe()  # what is wanted changed after the look
        if sandbox.phase is Phase.RESUMING:
            # It is to run as soon as the snapshot lets it. Without a row nobody would know that it wants to.
            return Wait(absence.now + WAIT_INTERVAL, Waiting(STEP_NAMES[SetPower], "SNAPSHOT_IN_PROGRESS"))
        return Settled()
    if sandbox.desired is Desired.PAUSED and sandbox.observed is RuntimeState.RUNNING:
        return SetPower(Power.PAUSED)
    if sandbox.desired is Desired.RUNNING and sandbox.observed is RuntimeState.PAUSED:
        return SetPower(Power.RUNNING)
    # An agent that is to be paused cannot answer.
    asks = sandbox.awaits_agent and sandbox.desired is Desired.RUNNING
    return Probe() if asks else Settled()


def _stay_away(answer: Answer | None) -> Step:
    """Nothing may be there any more; what is, came from a create that was still under way, or from a stranger."""
    if answer is None:
        return Observe()
    return Settled() if answer.observed is None else Remove()


def _stirs(answer: Answer) -> bool:
    return answer.observed is not None and answer.observed.power in (Power.RUNNING, Power.PAUSED)
