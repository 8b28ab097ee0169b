"""plan(state, look) -> the one next step of the reconciler.

The reconciler repeats: act on the step, record what was seen, plan again, until `Settled` or a wait. A step is safe to
repeat after a crash, because drivers are. `look` None means that nobody has asked the engine in this run yet; a fresh
sandbox is created without asking first, since create meets an existing object by its name anyway.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeAlias

from msgspec import Struct

from app.domain.sandbox.observed import Look, Power
from app.domain.sandbox.state import Desired, RuntimeState, Sandbox


class Observe(Struct, frozen=True):
    """Ask the engine first."""


class Ensure(Struct, frozen=True):
    """Create or adopt, and start."""


class SetPower(Struct, frozen=True):
    """Pause or resume."""

    power: Power


class Remove(Struct, frozen=True):
    """Remove what is there; absent is fine."""


class ConfirmMissing(Struct, frozen=True):
    """The engine says there is none; look again at `until` before believing it."""

    until: datetime


class Lose(Struct, frozen=True):
    """Missing for long enough: record the loss."""

    missing_since: datetime


class Settled(Struct, frozen=True):
    """Nothing to do until something changes."""


Step: TypeAlias = Observe | Ensure | SetPower | Remove | ConfirmMissing | Lose | Settled


class Absence(Struct, frozen=True):
    """Since when the engine has been saying "none", and how long that must last to be believed."""

    now: datetime
    missing_since: datetime | None
    grace: timedelta


def plan(box: Sandbox, look: Look | None, absence: Absence) -> Step:
    """The next step towards what is desired."""
    if box.closed_at is not None:
        return _stay_away(look)
    if box.desired is Desired.TERMINATED or (box.failure is not None and box.observed is not RuntimeState.REMOVED):
        return Remove()
    match box.observed:
        case RuntimeState.NONE | RuntimeState.CREATED:
            return Ensure()
        case RuntimeState.RUNNING | RuntimeState.PAUSED:
            return _keep(box, look, absence)
        case RuntimeState.EXITED:
            # Its own end is final: what runs under its name now was started behind our back.
            if look is None:
                return Observe()
            return Remove() if _stirs(look) else Settled()
        case RuntimeState.LOST | RuntimeState.REMOVED:
            return _stay_away(look)


def _keep(box: Sandbox, look: Look | None, absence: Absence) -> Step:
    if look is None:
        wanted = Power.PAUSED if box.desired is Desired.PAUSED else Power.RUNNING
        differs = box.observed.value != wanted.value
        return SetPower(wanted) if differs else Observe()
    if look.observed is None:
        since = absence.missing_since
        if since is None or absence.now < since + absence.grace:
            return ConfirmMissing((since or absence.now) + absence.grace)
        return Lose(since)
    if look.observed.power is Power.CREATED:
        # It ran, but an engine that lost power before its disk was written remembers only the create.
        return Ensure()
    if box.desired is Desired.PAUSED and box.observed is RuntimeState.RUNNING:
        return SetPower(Power.PAUSED)
    if box.desired is Desired.RUNNING and box.observed is RuntimeState.PAUSED:
        return SetPower(Power.RUNNING)
    return Settled()


def _stay_away(look: Look | None) -> Step:
    """Nothing may be there any more; what is, came from a create that was still under way, or from a stranger."""
    if look is None:
        return Observe()
    return Settled() if look.observed is None else Remove()


def _stirs(look: Look | None) -> bool:
    return look is not None and look.observed is not None and look.observed.power in (Power.RUNNING, Power.PAUSED)
