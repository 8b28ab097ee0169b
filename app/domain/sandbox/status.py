"""What clients are shown of a state: phase, reason and message, in upstream's words where it has them.

A Pending sandbox says what it waits for. The log knows the step and the reason (`sandbox.waiting`,
`sandbox.reconcile_failed`); the attempt under way and the progress of a pull stand in the queue, are read beside the
head row, and take no part in fold, version, ETag or `asOf`.
"""

from __future__ import annotations

import signal
from datetime import datetime

from msgspec import Struct

from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Waiting
from app.domain.sandbox.state import Ending, Phase, Runtime, RuntimeState, Sandbox

_UNAVAILABLE = "RUNTIME_UNAVAILABLE"
_SIGNALLED = 128
"""Exit code of a process that a signal ended, without the signal's number."""


class Status(Struct, frozen=True):
    """The state, reason and message that clients see."""

    state: Phase
    reason: str
    message: str
    last_transition_at: datetime


class Attempt(Struct, frozen=True):
    """How the queue stands about a sandbox at this moment."""

    claimed: bool = False
    """A worker holds its claim."""
    waits_for_slot: bool = False
    """Due, and no worker has claimed it."""
    attempts: int = 0
    """Failed attempts that counted; trouble of the engine itself does not count."""
    last_reason: str | None = None
    last_error: str | None = None
    """Why the last attempt failed, counted or not."""
    progress: str | None = None
    """How far a fetch is, in words for people."""
    engine_away: bool = False
    """Its engine does not answer, or is not the one that the log knows."""


def status_of(sandbox: Sandbox, attempt: Attempt | None = None) -> Status:
    """The public state with its reason."""
    reason, message = _explain(sandbox, attempt or Attempt())
    return Status(sandbox.phase, reason, message, sandbox.changed_at)


def _explain(sandbox: Sandbox, attempt: Attempt) -> tuple[str, str]:
    if sandbox.ending is not None:
        verb = "has ended" if sandbox.closed_at else "is being removed"
        return sandbox.ending.cause.upper(), f"Sandbox {verb}: {describe_ending(sandbox.ending)}."
    if sandbox.failure is not None:
        return sandbox.failure.reason, sandbox.failure.message or f"Sandbox failed in step {sandbox.failure.step}."
    match sandbox.phase:
        case Phase.PENDING:
            return _explain_pending(sandbox, attempt)
        case Phase.RUNNING if sandbox.frozen_by is not None:
            return "SNAPSHOT_IN_PROGRESS", "Sandbox container stands still while a snapshot of it is made."
        case Phase.RUNNING if (trouble := sandbox.agent_trouble) is not None:
            return "AGENT_UNREACHABLE", _sentences("Sandbox container is running", trouble.message)
        case Phase.RUNNING:
            return "CONTAINER_RUNNING", "Sandbox container is running."
        case Phase.PAUSED:
            return "CONTAINER_PAUSED", "Sandbox container is paused."
        case Phase.PAUSING:
            return "PAUSING", "Sandbox container is being paused."
        case Phase.RESUMING:
            return "RESUMING", "Sandbox container is being resumed."
        case _:
            return _explain_exit(sandbox.observed, sandbox.runtime)


def _explain_pending(sandbox: Sandbox, attempt: Attempt) -> tuple[str, str]:
    """What it waits for, how far that is, and what went wrong last."""
    reason, message = _waited_for(sandbox, attempt)
    return reason, _sentences(message, attempt.progress or "", _last_attempt(sandbox.waiting, attempt))


def _waited_for(sandbox: Sandbox, attempt: Attempt) -> tuple[str, str]:
    if attempt.engine_away or (attempt.waits_for_slot and attempt.last_reason == _UNAVAILABLE):
        # Its row is due, but no worker claims work for an engine that cannot be used.
        return _UNAVAILABLE, "Sandbox is accepted; it waits for its engine, which cannot be used at the moment."
    if sandbox.waiting is not None:
        message = sandbox.waiting.message or f"Sandbox waits in step {sandbox.waiting.step}."
        return sandbox.waiting.reason, message
    if sandbox.awaits_agent:
        return "AGENT_STARTING", "Sandbox container is running; its agent has not answered yet."
    if sandbox.runtime is not None and sandbox.runtime.parts:
        return "CONTAINER_STARTING", "Sandbox container is starting."
    if attempt.waits_for_slot:
        return "WAITING_FOR_SLOT", "Sandbox is accepted; it waits for a worker that is free."
    if attempt.last_reason:
        return attempt.last_reason, "Sandbox is accepted; it could not be provided yet."
    if attempt.attempts or attempt.last_error:
        return "SANDBOX_PENDING", "Sandbox is accepted; it could not be provided yet."
    return "SANDBOX_PENDING", "Sandbox is accepted; its container is being provisioned."


def _last_attempt(waiting: Waiting | None, attempt: Attempt) -> str:
    """The last failure; its text is left out when the sandbox waits for just that."""
    if not (attempt.attempts or attempt.last_reason or attempt.last_error):
        return ""
    why = f" with {attempt.last_reason}" if attempt.last_reason else ""
    if attempt.last_error and (waiting is None or attempt.last_error != waiting.message):
        why += f": {attempt.last_error.rstrip('.')}"
    # Trouble of the engine is not counted, so it has no number.
    which = f"Attempt {attempt.attempts}" if attempt.attempts else "The last attempt"
    then = "the next one is under way" if attempt.claimed else "it will be repeated"
    return f"{which} failed{why}; {then}."


def _sentences(*parts: str) -> str:
    """The parts that say something, each ended by a full stop."""
    return " ".join(part if part[-1] in ".!?" else f"{part}." for part in map(str.strip, parts) if part)


def _explain_exit(observed: RuntimeState, runtime: Runtime | None) -> tuple[str, str]:
    if runtime is None or observed is RuntimeState.LOST or not runtime.exited:
        return "RUNTIME_LOST", "Sandbox container disappeared from the engine without being asked to."
    code = runtime.exit_code
    how = "with a code that the engine did not keep" if code is None else f"with exit code {code}"
    if runtime.exit_reason == "ENGINE_STOPPED":
        return "CONTAINER_EXITED" if code == 0 else "CONTAINER_EXITED_ERROR", (
            f"Sandbox container ended {how} while its engine was stopped or restarting; the engine ends its "
            "containers then unless it runs with live-restore."
        )
    if code == 0:
        return "CONTAINER_EXITED", "Sandbox container exited successfully."
    if runtime.oom:
        return "CONTAINER_EXITED_ERROR", f"Sandbox container ran out of memory and was killed, {how}."
    how = how.replace("exit code", "code") + _as_after(code)
    why = f" ({runtime.exit_reason})" if runtime.exit_reason else ""
    detail = f": {runtime.exit_message.rstrip('.')}" if runtime.exit_message else ""
    return "CONTAINER_EXITED_ERROR", f"Sandbox container exited {how}{why}{detail}."


def _as_after(code: int | None) -> str:
    """What a shell means by 128 + n. The engine says no more, and a workload may exit with such a code by itself."""
    try:
        return "" if code is None else f", as after {signal.Signals(code - _SIGNALLED).name}"
    except ValueError:
        return ""


_VERBS: dict[str, str] = {
    ev.EndCause.USER_DELETE: "deleted",
    ev.EndCause.EXPIRED: "expired",
    ev.EndCause.EXPIRED_WHILE_PENDING: "expired before it could be provisioned,",
}


def describe_ending(ending: Ending) -> str:
    """`deleted by api_key default at 2026-01-02T03:04:05.678901Z`."""
    verb = _VERBS.get(ending.cause, f"ended ({ending.cause})")
    return f"{verb} by {ending.by} at {ending.at.isoformat().replace('+00:00', 'Z')}"
