"""What a look at the engine adds to the log."""

from __future__ import annotations

from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Exit, Observed, Power
from app.domain.sandbox.state import Phase, Runtime, RuntimeState, Sandbox
from app.domain.stream import storable

Events = tuple[ev.Event, ...]
_GONE = (RuntimeState.EXITED, RuntimeState.LOST, RuntimeState.REMOVED)
_UP = (RuntimeState.RUNNING, RuntimeState.PAUSED)


def seen(sandbox: Sandbox, look: Observed, found_by: str) -> Events:
    """The events between what the log knows and what the engine showed. Nothing new = none."""
    if sandbox.failure is not None or sandbox.observed in _GONE or look.main is None:
        return ()  # final for the log; `plan` removes what is still there
    runtime = sandbox.runtime or Runtime()
    another = runtime.main is None or runtime.main.runtime_id != look.main.runtime_id
    if another and runtime.parts and sandbox.observed in _UP and look.power is Power.CREATED:
        # Names are unique on an engine: what ran is gone, and this never ran. `plan` removes it.
        return (ev.RuntimeLost(),)
    found: list[ev.Event] = []
    if another:
        found += _made(sandbox, look, found_by)
    if look.verdict is not None and sandbox.ending is None:
        return (*found, ev.Failed("ensure", look.verdict.reason, storable(look.verdict.message)))
    known = RuntimeState.CREATED if another else sandbox.observed
    begun = _begun(sandbox, look, known, another=another)
    found += begun
    known = RuntimeState.RUNNING if begun else known
    if look.power is Power.PAUSED and known is RuntimeState.RUNNING:
        found.append(ev.Paused())
    elif look.power is Power.RUNNING and known is RuntimeState.PAUSED:
        found.append(ev.Resumed())
    elif look.power is Power.EXITED:
        found.append(_exited(look.exit or Exit(), sandbox.run + bool(begun)))
    elif known is RuntimeState.CREATED:
        found += _waits(sandbox, look)
    return tuple(found)


def _made(sandbox: Sandbox, look: Observed, found_by: str) -> Events:
    runtime = sandbox.runtime or Runtime()
    image: Events = ()
    if not runtime.parts and runtime.image_id is None and look.image_id is not None:
        image = (ev.Fetched(look.image_id, look.image_digest, cached=True),)
    if look.adopted or runtime.parts or found_by != "ensure":
        how = "create_conflict" if look.adopted else found_by
        return (*image, ev.RuntimeAdopted(look.generation, look.parts, how))
    return (*image, ev.RuntimeCreated(look.generation, look.parts))


def _begun(sandbox: Sandbox, look: Observed, known: RuntimeState, *, another: bool) -> Events:
    """A start that the log does not know yet, ours or somebody else's."""
    before = None if sandbox.runtime is None else sandbox.runtime.started_at
    first = known is RuntimeState.CREATED and (
        look.power in (Power.RUNNING, Power.PAUSED) or look.started_at is not None
    )
    moved = known in _UP and before is not None and look.started_at is not None and look.started_at > before
    if not (first or moved):
        return ()
    run = sandbox.run + 1
    if run == 1:
        return (ev.Started(run, look.started_at, look.address, look.node), ev.Ready())
    kept = "nothing" if another else "filesystem"
    return (
        ev.Restarted(run, look.generation, kept=kept, occurred_at=look.started_at, address=look.address),
        ev.Ready(),
    )


def _waits(sandbox: Sandbox, look: Observed) -> Events:
    wait, known = look.waiting, sandbox.waiting
    if wait is None or sandbox.phase is not Phase.PENDING:
        return ()
    if known is not None and (known.step, known.reason) == (wait.step, wait.reason):
        return ()
    return (ev.Waited(wait.step, wait.reason, storable(wait.message)),)


def _exited(end: Exit, run: int) -> ev.RuntimeExited:
    return ev.RuntimeExited(end.code, end.oom, end.reason, storable(end.message), end.at, max(run, 1))
