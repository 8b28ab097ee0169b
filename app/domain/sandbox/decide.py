"""decide(state, command, now) -> events. Refusals are `Rejected`; nothing new is the empty tuple.

Facts are compared with the state, so recording is idempotent: a second report of the same look appends nothing, which
keeps resync from flooding the log.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Exit, Observed, Power
from app.domain.sandbox.spec import check_metadata
from app.domain.sandbox.state import Phase, RuntimeState, Sandbox, describe_ending
from app.errors import Conflict, Invalid, NotFound

Events = tuple[ev.Event, ...]
LATEST = datetime.fromisoformat("9999-01-01T00:00:00+00:00")
"""No deadline is accepted at or beyond this instant; neither PostgreSQL nor Python is asked to overflow."""


def unknown(sandbox_id: object) -> NotFound:
    """The 404 of an id that this tenant never had."""
    return NotFound("DOCKER::SANDBOX_NOT_FOUND", f"Sandbox {sandbox_id} does not exist.")


def visible(box: Sandbox | None, sandbox_id: object) -> Sandbox:
    """The sandbox, unless it never was or has ended for clients.

    Raises:
        NotFound: the message names when and why it ended.
    """
    if box is None:
        raise unknown(sandbox_id)
    if box.ending is not None:
        raise NotFound(
            "DOCKER::SANDBOX_NOT_FOUND",
            f"Sandbox {box.id} no longer exists: {describe_ending(box.ending)}. Its history is at "
            f"/v1/sandboxes/{box.id}/events.",
        )
    return box


def decide(box: Sandbox, command: cmd.Command, now: datetime) -> Events:
    """The events that the command leads to."""
    match command:
        case cmd.Renew():
            return _renew(box, command, now)
        case cmd.PatchMetadata():
            return _patch_metadata(visible(box, box.id), command)
        case cmd.Pause():
            return _pause(visible(box, box.id))
        case cmd.Resume():
            return _resume(visible(box, box.id))
        case cmd.Terminate(cause=cause):
            return _end(visible(box, box.id), ev.TerminationRequested(cause), cause, now)
        case cmd.Expire():
            return _expire(box, now)
        case cmd.RecordSeen():
            return () if box.closed_at else _seen(box, command.observed, command.found_by)
        case cmd.RecordLost(missing_since=since):
            return _lost(box, since)
        case cmd.RecordRemoved():
            return _removed(box)
        case cmd.RecordFailure(reason=reason, message=message):
            finished = box.ending or box.failure or box.observed in _GONE
            return () if finished else (ev.Failed(reason, _storable(message)),)
        case cmd.RecordRetry():
            event = ev.ReconcileFailed(command.step, command.code, _storable(command.message), command.attempt)
            return () if box.closed_at else (event,)


_GONE = (RuntimeState.EXITED, RuntimeState.LOST, RuntimeState.REMOVED)
_MESSAGE_CHARS = 4096


def _storable(message: str) -> str:
    """What an engine says, as PostgreSQL takes it: no NUL, half a surrogate or book may stop a fact."""
    return message[:_MESSAGE_CHARS].replace("\0", "\ufffd").encode(errors="replace").decode()


def _renew(box: Sandbox, command: cmd.Renew, now: datetime) -> Events:
    lost = box.expires_at is not None and box.expires_at <= now
    if box.ending is not None and box.ending.cause is not ev.EndCause.USER_DELETE and box.closed_at is None:
        raise Conflict(
            "DOCKER::INVALID_EXPIRATION", f"The renewal came too late: the sandbox {describe_ending(box.ending)}."
        )
    visible(box, box.id)
    if command.expires_at <= now:
        raise Invalid("DOCKER::INVALID_EXPIRATION", "expiresAt must lie in the future.")
    if box.expires_at is None:
        raise Conflict("DOCKER::INVALID_EXPIRATION", "The sandbox has no automatic expiry that could be renewed.")
    if lost:
        raise Conflict(
            "DOCKER::INVALID_EXPIRATION",
            f"The renewal came too late: the sandbox's time ended at {box.expires_at.isoformat()}.",
        )
    limit = command.max_timeout_s
    if limit is not None and command.expires_at - now > timedelta(seconds=limit):
        raise Invalid(
            "SANDBOX::INVALID_PARAMETER", f"expiresAt may lie at most {limit} s ahead (max_sandbox_timeout_seconds)."
        )
    if command.expires_at >= LATEST:
        raise Invalid("SANDBOX::INVALID_PARAMETER", "expiresAt must lie before the year 9999.")
    if command.expires_at == box.expires_at:
        return ()
    return (ev.LeaseRenewed(command.expires_at, box.expires_at),)


def _patch_metadata(box: Sandbox, command: cmd.PatchMetadata) -> Events:
    check_metadata(
        dict.fromkeys((k for k in command.patch if k.startswith("opensandbox.io/")), ""), "INVALID_METADATA_LABEL"
    )
    check_metadata({key: value for key, value in command.patch.items() if value is not None})
    added = {k: v for k, v in command.patch.items() if v is not None and box.metadata.get(k) != v}
    removed = tuple(sorted(k for k, v in command.patch.items() if v is None and k in box.metadata))
    if len((box.metadata.keys() - set(removed)) | added.keys()) > command.max_entries:
        raise Invalid("SANDBOX::INVALID_PARAMETER", f"metadata may hold at most {command.max_entries} entries.")
    return (ev.MetadataPatched(added, removed),) if added or removed else ()


def _pause(box: Sandbox) -> Events:
    match box.phase:
        case Phase.RUNNING:
            return (ev.PauseRequested(),)
        case Phase.PAUSING:
            return ()
        case Phase.PAUSED:
            raise Conflict("DOCKER::SANDBOX_NOT_RUNNING", "Sandbox is already paused.")
        case phase:
            raise Conflict("DOCKER::SANDBOX_NOT_RUNNING", f"Sandbox is {phase}; only a Running sandbox can be paused.")


def _resume(box: Sandbox) -> Events:
    match box.phase:
        case Phase.PAUSED:
            return (ev.ResumeRequested(),)
        case Phase.RESUMING:
            return ()
        case phase:
            raise Conflict("DOCKER::SANDBOX_NOT_PAUSED", f"Sandbox is {phase}; only a Paused sandbox can be resumed.")


def _expire(box: Sandbox, now: datetime) -> Events:
    if box.ending is not None or box.expires_at is None or now < box.expires_at:
        return ()
    pending = box.phase is Phase.PENDING
    cause = ev.EndCause.EXPIRED_WHILE_PENDING if pending else ev.EndCause.EXPIRED
    return _end(box, ev.Expired(box.expires_at, cause), cause, now)


def _end(box: Sandbox, event: ev.Event, cause: ev.EndCause, now: datetime) -> Events:
    if box.observed is not RuntimeState.REMOVED:
        return (event,)
    return (event, _terminated(box, cause, now))


def _terminated(box: Sandbox, cause: ev.EndCause, ended_at: datetime) -> ev.Terminated:
    exit_code = None if box.runtime is None else box.runtime.exit_code
    return ev.Terminated(cause, (ended_at - box.created_at).total_seconds(), exit_code)


def _removed(box: Sandbox) -> Events:
    if box.closed_at is not None or (box.ending is None and box.observed is RuntimeState.REMOVED):
        return ()
    removed = ev.RuntimeRemoved(None if box.runtime is None else box.runtime.id)
    if box.ending is None:
        return (removed,) if box.phase in (Phase.FAILED, Phase.TERMINATED) else ()
    return (removed, _terminated(box, box.ending.cause, box.ending.at))


def _lost(box: Sandbox, since: datetime) -> Events:
    if box.closed_at or box.failure or box.runtime is None or box.observed in (RuntimeState.NONE, *_GONE):
        return ()
    return (ev.RuntimeLost(box.runtime.id, since),)


def _exited(end: Exit) -> ev.RuntimeExited:
    return ev.RuntimeExited(end.code, end.oom, _storable(end.message), end.at)


def _seen(box: Sandbox, look: Observed, found_by: str) -> Events:
    if box.failure is not None or box.observed in _GONE:
        return ()  # final for the log; `plan` removes what still stirs
    found: list[ev.Event] = []
    known = box.observed
    if box.runtime is None or box.runtime.id != look.runtime_id:
        if box.runtime is not None and known is not RuntimeState.CREATED and look.power is Power.CREATED:
            # Names are unique on an engine: what ran is gone, and this never ran. `plan` removes it.
            return (ev.RuntimeLost(box.runtime.id),)
        made = (look.runtime_id, look.name)
        adopted = look.adopted or box.runtime is not None or found_by != "ensure"
        found.append(
            ev.RuntimeAdopted(
                *made, "create_conflict" if look.adopted else found_by, look.generation, look.image_digest
            )
            if adopted
            else ev.RuntimeCreated(*made, look.generation, look.image_digest)
        )
        known = RuntimeState.CREATED
    if known is RuntimeState.CREATED and (look.power in (Power.RUNNING, Power.PAUSED) or look.started_at is not None):
        found.append(ev.Started(look.started_at))
        known = RuntimeState.RUNNING
    if look.power is Power.PAUSED and known is RuntimeState.RUNNING:
        found.append(ev.Paused())
    elif look.power is Power.RUNNING and known is RuntimeState.PAUSED:
        found.append(ev.Resumed())
    elif look.power is Power.EXITED:
        found.append(_exited(look.exit or Exit(-1)))
    return tuple(found)
