"""What an observation adds to the log: the events between what the log knows and what the engine showed.

An observation is compared with the state, so recording it twice adds nothing. It is ignored when it is about another
object, or when the log has already recorded the end of this run (an exit, a loss, a failure): `plan` then removes
what is still there.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from app.domain.sandbox import events as ev
from app.domain.sandbox.freeze import Freeze
from app.domain.sandbox.observed import Address, Exit, Observed, Power
from app.domain.sandbox.state import GONE, Desired, Phase, Runtime, RuntimeState, Sandbox
from app.domain.text import storable

Events = tuple[ev.Event, ...]
_MS = timedelta(milliseconds=1)
_UP = (RuntimeState.RUNNING, RuntimeState.PAUSED)


def seen(sandbox: Sandbox, shown: Observed, found_by: str, at: datetime | None = None) -> Events:
    """The events that are new. `found_by` is `ensure`, `observe` or `sweep`; `at` as in `RecordSeen`."""
    if sandbox.object_id != shown.object_id or shown.main is None:
        return ()
    if sandbox.failure is not None or sandbox.observed in GONE:
        return ()
    runtime = sandbox.runtime or Runtime()
    another = runtime.main is None or runtime.main.runtime_id != shown.main.runtime_id
    if another and runtime.parts and sandbox.observed in _UP and shown.power is Power.CREATED:
        # Names are unique on an engine: what ran is gone, and this never ran. `plan` removes it.
        return (ev.RuntimeLost(),)
    found: list[ev.Event] = []
    if another:
        found += _made(sandbox, shown, found_by)
    if shown.verdict is not None and sandbox.ending is None and sandbox.ready_at is None:
        return (*found, ev.Failed("ensure", shown.verdict.reason, storable(shown.verdict.message)))
    known = RuntimeState.CREATED if another else sandbox.observed
    begun = _begun(sandbox, shown, known, another=another)
    found += begun
    known = RuntimeState.RUNNING if begun else known
    freeze = None if another or begun else sandbox.frozen_by
    # Paused for a snapshot while its owner wants it to run: that is no pause of its own.
    ours = freeze is not None and sandbox.desired is Desired.RUNNING
    if shown.power is Power.PAUSED and known is RuntimeState.RUNNING and not ours:
        found.append(ev.Paused(_power_since(sandbox, shown)))
    elif shown.power is Power.RUNNING and known is RuntimeState.PAUSED:
        found.append(ev.Resumed(_power_since(sandbox, shown)))
    elif shown.power is Power.EXITED:
        found.append(_exited(shown.exit or Exit(), sandbox.run + bool(begun)))
    elif known is RuntimeState.CREATED:
        found += _waits(sandbox, shown, another=another)
    if not begun and known in _UP:
        found += _moved(sandbox, shown)
    if freeze is not None and sandbox.ending is None:
        found += _froze(sandbox, freeze, shown, at)
    return tuple(found)


def _moved(sandbox: Sandbox, shown: Observed) -> Events:
    """Another address than the log knows. What the engine does not show is no news: it has lost it for a moment, or the
    observation is a listing, which has no addresses.
    """
    now, before = shown.address, sandbox.address or Address("")
    if now is None or sandbox.ending is not None or shown.power not in (Power.RUNNING, Power.PAUSED):
        return ()
    begun = None if sandbox.runtime is None else sandbox.runtime.started_at
    if begun is not None and shown.started_at is not None and shown.started_at < begun:
        return ()  # from before this run
    after = Address(now.network, now.ip or before.ip, now.ports or before.ports)
    return () if after == sandbox.address else (ev.AddressChanged(after),)


def _froze(sandbox: Sandbox, freeze: Freeze, shown: Observed, at: datetime | None) -> Events:
    """What the look says about a freeze: it has begun, it is over, or it was broken from outside.

    A broken one is over at once and not begun again in silence: the copy that is being made is torn.
    """
    if shown.power not in (Power.RUNNING, Power.PAUSED):
        return ()
    since = sandbox.freeze_at
    frozen_ms = 0 if at is None or since is None or freeze.run is None else max(0, (at - since) // _MS)
    thawed = ev.Thawed(freeze.snapshot_id, frozen_ms)
    if freeze.thaw is not None:
        wanted = Power.PAUSED if sandbox.desired is Desired.PAUSED else Power.RUNNING
        return (thawed,) if shown.power is wanted else ()
    if freeze.run is None:
        return (ev.Frozen(freeze.snapshot_id, sandbox.run),) if shown.power is Power.PAUSED else ()
    if shown.power is Power.RUNNING:
        return (ev.ThawRequested(freeze.snapshot_id, "BROKEN"), thawed)
    return ()


def _made(sandbox: Sandbox, shown: Observed, found_by: str) -> Events:
    runtime = sandbox.runtime or Runtime()
    image: Events = ()
    if not runtime.parts and runtime.image_id is None and shown.image_id is not None:
        image = (ev.Fetched(shown.image_id, shown.image_digest, cached=True),)
    if shown.adopted:
        return (*image, ev.RuntimeAdopted(shown.generation, shown.parts, "create_conflict", shown.gpus))
    if found_by != "ensure":
        return (*image, ev.RuntimeAdopted(shown.generation, shown.parts, found_by, shown.gpus))
    return (*image, ev.RuntimeCreated(shown.generation, shown.parts, shown.gpus))


def _begun(sandbox: Sandbox, shown: Observed, known: RuntimeState, *, another: bool) -> Events:
    """A start that the log does not know yet, ours or somebody else's.

    Only a later start counts: an observation may be older than what the log knows, because sweeps and claims overlap.
    """
    before = None if sandbox.runtime is None else sandbox.runtime.started_at
    first = known is RuntimeState.CREATED and (
        shown.power in (Power.RUNNING, Power.PAUSED) or shown.started_at is not None
    )
    moved = known in _UP and before is not None and shown.started_at is not None and shown.started_at > before
    if not (first or moved):
        return ()
    run = sandbox.run + 1
    # With an agent it is ready when the agent answers, which a probe finds out.
    ready: Events = () if shown.agent else (ev.Ready(),)
    if run == 1:
        return (ev.Started(run, shown.started_at, shown.address, shown.node), *ready)
    kept = "nothing" if another else "filesystem"
    again = ev.Restarted(run, shown.generation, kept=kept, occurred_at=shown.started_at, address=shown.address)
    return (again, *ready)


def _power_since(sandbox: Sandbox, shown: Observed) -> datetime | None:
    """When it was paused or resumed, if that is what ended the phase that the log knows.

    A wrong time is worse than none. A pause from before this run, or from before the present phase, is an earlier one:
    its resume is known to the log, and the engine's word about the later pause is still on its way. The phase began by
    the database's clock; where the engine's is behind, a true time may be dropped here.
    """
    at = shown.power_since
    if at is None or at <= sandbox.changed_at or (shown.started_at is not None and at < shown.started_at):
        return None
    return at


def _waits(sandbox: Sandbox, shown: Observed, *, another: bool) -> Events:
    """Why the object is not up yet. The reason of the object before it was cleared."""
    wait, known = shown.waiting, None if another else sandbox.waiting
    if wait is None or sandbox.phase is not Phase.PENDING:
        return ()
    if known is not None and (known.step, known.reason) == (wait.step, wait.reason):
        return ()
    return (ev.Waited(wait.step, wait.reason, storable(wait.message)),)


def _exited(end: Exit, run: int) -> ev.RuntimeExited:
    return ev.RuntimeExited(end.code, end.oom, end.reason, storable(end.message), end.at, run)
