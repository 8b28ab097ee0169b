"""decide(state, command, now) -> events. Refusals are `Rejected`; nothing new is the empty tuple.

Observations are compared with the state, so recording is idempotent: a second report of the same observation appends
nothing, which keeps sweeps from flooding the log. `RecordRetry` is the exception: each failed attempt is new, and
the reporter decides which attempts become an event.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import longest
from app.domain.sandbox.links import check_port, milliseconds, present
from app.domain.sandbox.observe import seen
from app.domain.sandbox.observed import Power, Waiting
from app.domain.sandbox.spec import check_metadata
from app.domain.sandbox.state import GONE, PROBE, Desired, Phase, RuntimeState, Sandbox
from app.domain.sandbox.status import describe_ending, status_of
from app.domain.text import storable
from app.errors import Conflict, Invalid, NotFound

Events = tuple[ev.Event, ...]
LATEST = datetime.fromisoformat("9999-01-01T00:00:00+00:00")
"""No expiry is accepted at or beyond this instant; neither PostgreSQL nor Python is asked to overflow."""
_TOO_LATE = (ev.EndCause.EXPIRED, ev.EndCause.EXPIRED_WHILE_PENDING)
"""Ends that a renewal could have prevented."""


def unknown(sandbox_id: object) -> NotFound:
    """The refusal of an id that this tenant never had."""
    return NotFound("DOCKER::SANDBOX_NOT_FOUND", f"Sandbox {sandbox_id} does not exist.")


def visible(sandbox: Sandbox | None, sandbox_id: object) -> Sandbox:
    """The sandbox, unless it never was or has ended for clients.

    Raises:
        NotFound: the message names when and why it ended.
    """
    if sandbox is None:
        raise unknown(sandbox_id)
    if sandbox.ending is not None:
        raise NotFound(
            "DOCKER::SANDBOX_NOT_FOUND",
            f"Sandbox {sandbox.id} no longer exists: {describe_ending(sandbox.ending)}. Its events can still be read.",
        )
    return sandbox


def decide(sandbox: Sandbox, command: cmd.Command, now: datetime) -> Events:
    """The events that the command leads to."""
    match command:
        case cmd.Renew():
            return _renew(sandbox, command, now)
        case cmd.PatchMetadata():
            return _patch_metadata(visible(sandbox, sandbox.id), command)
        case cmd.Pause():
            return _pause(visible(sandbox, sandbox.id))
        case cmd.Resume():
            return _resume(visible(sandbox, sandbox.id))
        case cmd.Terminate(cause=cause):
            return _end(visible(sandbox, sandbox.id), ev.TerminationRequested(cause), cause, now)
        case cmd.Expire():
            return _expire(sandbox, now)
        case cmd.EndTransition():
            return _end_transition(sandbox, command, now)
        case cmd.EndProbe(limits=limits):
            return _end_probe(sandbox, limits, now)
        case cmd.RecordReady(run=run):
            return _ready(sandbox, run, now)
        case cmd.Freeze(snapshot_id=snapshot_id):
            return (ev.FreezeRequested(snapshot_id),) if sandbox.may_freeze else ()
        case cmd.Thaw(snapshot_id=snapshot_id, reason=reason):
            return _thaw(sandbox, snapshot_id, reason)
        case cmd.CreateLink():
            return _create_link(visible(sandbox, sandbox.id), command, now)
        case cmd.RevokeLinks():
            return (ev.LinksRevoked(visible(sandbox, sandbox.id).link_number + 1),)
        case cmd.EndFreeze(limits=limits):
            return _end_freeze(sandbox, limits, now)
        case _:
            return () if sandbox.closed_at is not None else _record(sandbox, command)


def _record(sandbox: Sandbox, observation: cmd.Observation) -> Events:
    match observation:
        case cmd.RecordPlaced():
            return _placed(sandbox, observation)
        case cmd.RecordWaiting(step=step, reason=reason, message=message):
            return _waiting(sandbox, step, reason, message)
        case cmd.RecordFetched():
            return _fetched(sandbox, observation)
        case cmd.RecordSeen():
            return seen(sandbox, observation.observed, observation.found_by, observation.at)
        case cmd.RecordLost():
            return _lost(sandbox, observation)
        case cmd.RecordRemoved():
            return _removed(sandbox)
        case cmd.RecordFailure(step="set_power", reason=reason, message=message):
            return _power_refused(
                sandbox, reason, storable(message)
            )  # never ends the sandbox, whichever worker reports it
        case cmd.RecordFailure(step=step, reason=reason, message=message):
            return (ev.Failed(step, reason, storable(message)),) if sandbox.may_run else ()
        case cmd.RecordPowerRefused(reason=reason, message=message, power=power):
            return _power_refused(sandbox, reason, storable(message), power)
        case cmd.RecordRetry(step=step, reason=reason, message=message, attempt=attempt):
            return (ev.ReconcileFailed(step, reason, storable(message), attempt),)


def _renew(sandbox: Sandbox, command: cmd.Renew, now: datetime) -> Events:
    lost = sandbox.expires_at is not None and sandbox.expires_at <= now
    if sandbox.ending is not None and sandbox.ending.cause in _TOO_LATE and sandbox.closed_at is None:
        raise Conflict(
            "DOCKER::INVALID_EXPIRATION",
            f"The renewal came too late: the sandbox {describe_ending(sandbox.ending)}.",
        )
    visible(sandbox, sandbox.id)
    if command.expires_at <= now:
        raise Invalid("DOCKER::INVALID_EXPIRATION", "expiresAt must lie in the future.")
    if sandbox.expires_at is None:
        raise Conflict("DOCKER::INVALID_EXPIRATION", "The sandbox has no automatic expiry that could be renewed.")
    if lost:
        raise Conflict(
            "DOCKER::INVALID_EXPIRATION",
            f"The renewal came too late: the sandbox's time ended at {sandbox.expires_at.isoformat()}.",
        )
    limit = command.max_timeout_s
    if limit is not None and command.expires_at - now > timedelta(seconds=limit):
        raise Invalid(
            "SANDBOX::INVALID_PARAMETER",
            f"expiresAt may lie at most {limit} s ahead (max_sandbox_timeout_seconds).",
        )
    if command.expires_at >= LATEST:
        raise Invalid("SANDBOX::INVALID_PARAMETER", "expiresAt must lie before the year 9999.")
    if command.expires_at == sandbox.expires_at:
        return ()
    return (ev.Renewed(command.expires_at, sandbox.expires_at),)


def _patch_metadata(sandbox: Sandbox, command: cmd.PatchMetadata) -> Events:
    check_metadata(
        dict.fromkeys((k for k in command.patch if k.startswith("opensandbox.io/")), ""), "INVALID_METADATA_LABEL"
    )
    check_metadata({key: value for key, value in command.patch.items() if value is not None})
    added = {k: v for k, v in command.patch.items() if v is not None and sandbox.metadata.get(k) != v}
    removed = tuple(sorted(k for k, v in command.patch.items() if v is None and k in sandbox.metadata))
    if len((sandbox.metadata.keys() - set(removed)) | added.keys()) > command.max_entries:
        raise Invalid("SANDBOX::INVALID_PARAMETER", f"metadata may hold at most {command.max_entries} entries.")
    return (ev.MetadataPatched(added, removed),) if added or removed else ()


def _pause(sandbox: Sandbox) -> Events:
    match sandbox.phase:
        case Phase.RUNNING:
            return (ev.PauseRequested(),)
        case Phase.PAUSING:
            return ()
        case Phase.PAUSED:
            raise Conflict("DOCKER::SANDBOX_NOT_RUNNING", "Sandbox is already paused.")
        case phase:
            raise Conflict("DOCKER::SANDBOX_NOT_RUNNING", f"Sandbox is {phase}; only a Running sandbox can be paused.")


def _resume(sandbox: Sandbox) -> Events:
    match sandbox.phase:
        case Phase.PAUSED:
            return (ev.ResumeRequested(),)
        case Phase.RESUMING:
            return ()
        case phase:
            raise Conflict("DOCKER::SANDBOX_NOT_PAUSED", f"Sandbox is {phase}; only a Paused sandbox can be resumed.")


def _create_link(sandbox: Sandbox, command: cmd.CreateLink, now: datetime) -> Events:
    """A link carries the generation, so it waits for the object."""
    check_port(command.port)
    status = status_of(sandbox)
    if sandbox.phase is Phase.PENDING:
        raise NotFound("KUBERNETES::POD_IP_NOT_AVAILABLE", f"The sandbox is still Pending: {status.message}")
    if sandbox.phase in (Phase.FAILED, Phase.TERMINATED):
        raise Conflict("DOCKER::SANDBOX_NOT_RUNNING", f"The sandbox is {status.state}: {status.message}")
    expiry_ms = milliseconds(now) + command.seconds * 1000
    link = present(sandbox, command.port, expiry_ms)
    return (ev.LinkCreated(link.id, link.port, link.expires_at),)


def _expire(sandbox: Sandbox, now: datetime) -> Events:
    if sandbox.ending is not None or sandbox.expires_at is None or now < sandbox.expires_at:
        return ()
    pending = sandbox.phase is Phase.PENDING
    cause = ev.EndCause.EXPIRED_WHILE_PENDING if pending else ev.EndCause.EXPIRED
    return _end(sandbox, ev.Expired(sandbox.expires_at, cause), cause, now)


def _end(sandbox: Sandbox, event: ev.Event, cause: str, now: datetime) -> Events:
    """It ends for clients. When nothing of it can be on any engine, it is closed in the same append."""
    if sandbox.object_id is not None and sandbox.observed is not RuntimeState.REMOVED:
        return (event,)
    return (event, _terminated(sandbox, cause, now))


def _terminated(sandbox: Sandbox, cause: str, ended_at: datetime) -> ev.Terminated:
    exit_code = None if sandbox.runtime is None else sandbox.runtime.exit_code
    lived = max(ended_at - sandbox.created_at, timedelta())  # a clock that was set back
    return ev.Terminated(cause, lived // timedelta(milliseconds=1), exit_code)


def _removed(sandbox: Sandbox) -> Events:
    if sandbox.object_id is None or (sandbox.ending is None and sandbox.observed is RuntimeState.REMOVED):
        return ()
    removed = ev.RuntimeRemoved(() if sandbox.runtime is None else sandbox.runtime.parts)
    if sandbox.ending is None:
        return (removed,) if sandbox.phase in (Phase.FAILED, Phase.TERMINATED) else ()
    return (removed, _terminated(sandbox, sandbox.ending.cause, sandbox.ending.at))


def _lost(sandbox: Sandbox, observation: cmd.RecordLost) -> Events:
    if sandbox.failure is not None or sandbox.observed in (RuntimeState.NONE, *GONE):
        return ()
    return (ev.RuntimeLost(observation.reason, observation.missing_since, observation.occurred_at),)


def _placed(sandbox: Sandbox, placed: cmd.RecordPlaced) -> Events:
    if sandbox.engine is not None or sandbox.phase is not Phase.PENDING:
        return ()
    return (ev.Placed(placed.engine, placed.epoch, placed.object_id, placed.place, placed.reason, placed.candidates),)


def _waiting(sandbox: Sandbox, step: str, reason: str, message: str) -> Events:
    known = sandbox.waiting
    if sandbox.phase is not Phase.PENDING or (known is not None and (known.step, known.reason) == (step, reason)):
        return ()
    if step == "place" and sandbox.object_id is not None:
        return ()  # reported late: another worker has placed it meanwhile
    return (ev.Waited(step, reason, storable(message)),)


def _fetched(sandbox: Sandbox, fetched: cmd.RecordFetched) -> Events:
    known = sandbox.runtime
    same = known is not None and known.image_id == fetched.image_id
    if sandbox.phase is not Phase.PENDING or sandbox.observed is not RuntimeState.NONE or same:
        return ()
    return (ev.Fetched(fetched.image_id, fetched.image_digest, fetched.size_bytes, fetched.took_ms, fetched.cached),)


def _thaw(sandbox: Sandbox, snapshot_id: UUID, reason: str) -> Events:
    freeze = sandbox.frozen_by
    if freeze is None or freeze.snapshot_id != snapshot_id or freeze.thaw is not None:
        return ()
    return (ev.ThawRequested(snapshot_id, reason),)


def _end_freeze(sandbox: Sandbox, limits: cmd.Limits, now: datetime) -> Events:
    freeze, since = sandbox.frozen_by, sandbox.freeze_at
    if freeze is None or since is None or now < since + timedelta(seconds=limits.freeze_s):
        return ()
    return _thaw(sandbox, freeze.snapshot_id, "DEADLINE")


def _power_refused(sandbox: Sandbox, reason: str, message: str, power: Power | None = None) -> Events:
    freeze = sandbox.frozen_by
    found = _transition_refused(sandbox, reason, message, power)
    if freeze is None or sandbox.ending is not None:
        return found
    if power is Power.PAUSED and freeze.thaw is None and freeze.run is None:
        return (ev.ThawRequested(freeze.snapshot_id, "REFUSED"), *found)
    if power is Power.RUNNING and freeze.thaw is not None and sandbox.phase is Phase.RUNNING:
        # It cannot go on. It is paused then, as its owner will see, who may try to resume it.
        return (ev.Paused(), ev.ResumeFailed(reason, message), ev.Thawed(freeze.snapshot_id))
    return found


def _transition_refused(sandbox: Sandbox, reason: str, message: str, power: Power | None) -> Events:
    match sandbox.phase:
        case Phase.PAUSING if power is not Power.RUNNING:
            return (ev.PauseFailed(reason, message),)
        case Phase.RESUMING if power is not Power.PAUSED:
            return (ev.ResumeFailed(reason, message),)
        case Phase.PENDING if sandbox.observed is RuntimeState.RUNNING and sandbox.desired is Desired.PAUSED:
            # Started again from outside while it was to be paused: it goes on, and its agent is waited for.
            return (ev.PauseFailed(reason, message),)
        case Phase.PENDING if sandbox.observed is RuntimeState.PAUSED:
            # Paused from outside before its agent answered: it waits for nothing any more, and stays paused.
            silent = ev.AgentUnreachable("AGENT_SILENT", "The sandbox is paused.")
            return (silent, ev.ResumeFailed(reason, message)) if sandbox.desired is Desired.RUNNING else (silent,)
        case _:
            return ()


def _ready(sandbox: Sandbox, run: int, now: datetime) -> Events:
    """Of this run only: an answer of an earlier one says nothing about it."""
    if sandbox.run != run or not (sandbox.awaits_agent or sandbox.agent_trouble is not None):
        return ()
    return (ev.Ready(_run_ms(sandbox, now), "agent"),)


def _end_probe(sandbox: Sandbox, limits: cmd.Limits, now: datetime) -> Events:
    if not sandbox.awaits_agent or _run_ms(sandbox, now) < limits.ready_s * 1000:
        return ()
    return (_unreachable(sandbox, now),)


def _unreachable(sandbox: Sandbox, now: datetime) -> ev.AgentUnreachable:
    """Its container runs, so it is no failure that its agent does not answer."""
    after_ms, known = _run_ms(sandbox, now), sandbox.waiting
    if known is not None and known.step == PROBE:
        return ev.AgentUnreachable(known.reason, known.message, after_ms)
    message = f"The agent did not answer within {after_ms // 1000} s, and no worker has said why."
    return ev.AgentUnreachable("AGENT_SILENT", message, after_ms)


def _run_ms(sandbox: Sandbox, now: datetime) -> int:
    """Milliseconds since the start of the run was recorded. Both times are the database's; its clock may step back."""
    since = sandbox.begun_at or now
    return max(0, (now - since) // timedelta(milliseconds=1))


def _end_transition(sandbox: Sandbox, command: cmd.EndTransition, now: datetime) -> Events:
    limit = longest(sandbox, command.limits)
    elapsed = (now - sandbox.changed_at).total_seconds()
    if limit is None or elapsed < limit:
        return ()
    last = _last(sandbox, command)
    match sandbox.phase:
        case Phase.PENDING if sandbox.awaits_agent:
            return (_unreachable(sandbox, now),)
        case Phase.PENDING:
            message = f"The sandbox was not running within {limit:.0f} s{last}"
            return (ev.Failed(_pending_step(sandbox), "PROVISIONING_TIMEOUT", storable(message)),)
        case Phase.PAUSING:
            return (ev.PauseFailed("PAUSE_TIMEOUT", storable(f"The pause took longer than {limit:.0f} s{last}")),)
        case Phase.RESUMING:
            return (ev.ResumeFailed("RESUME_TIMEOUT", storable(f"The resume took longer than {limit:.0f} s{last}")),)
        case _:
            # The state does not count reports, so the deadline that fires twice is reported twice; that loses nothing.
            times, _ = command.limits.report(elapsed)
            return (ev.Overdue(sandbox.phase.value, sandbox.changed_at, times),)


def _pending_step(sandbox: Sandbox) -> str:
    """How far the sandbox came before it ended."""
    if sandbox.waiting is not None:
        return sandbox.waiting.step
    if sandbox.object_id is None:
        return "place"
    return "ensure" if sandbox.observed in (RuntimeState.NONE, RuntimeState.CREATED) else "probe"


def _last(sandbox: Sandbox, command: cmd.EndTransition) -> str:
    """What it waited for, and why the last attempt failed, as the end of a sentence."""
    found: list[str] = []
    known: Waiting | None = sandbox.waiting
    if known is not None:
        found.append(f"it waited in step {known.step} for {_explained(known.reason, known.message)}")
    reason, error = command.last_reason, command.last_error
    if (reason or error) and (known is None or reason != known.reason):
        found.append(f"the last attempt failed with {_explained(reason or 'an error', error)}")
    return "".join(f"; {one}" for one in found) + "."


def _explained(reason: str, message: str | None) -> str:
    return f"{reason} ({message.rstrip('.')})" if message else reason
