"""What clients are shown of a state: phase, reason and message, in upstream's words where it has them.

A Pending sandbox says what it waits for. The log knows the step and the reason (`sandbox.waiting`,
`sandbox.reconcile_failed`); the attempt under way and the progress of a pull stand in the queue, are read beside the
head row, and take no part in fold, version, ETag or `asOf`.
"""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct

from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Ending, Phase, Runtime, RuntimeState, Sandbox


class Status(Struct, frozen=True):
    """What clients are shown."""

    state: Phase
    reason: str
    message: str
    last_transition_at: datetime


class Attempt(Struct, frozen=True):
    """How the queue stands about a sandbox at this moment."""

    claimed: bool = False
    waits_for_slot: bool = False
    """Due, and no worker has claimed it."""
    attempts: int = 0
    last_reason: str | None = None
    last_error: str | None = None
    progress: str | None = None


def status_of(sandbox: Sandbox, attempt: Attempt | None = None) -> Status:
    """The public state with its reason."""
    reason, message = _explain(sandbox, attempt or Attempt())
    return Status(sandbox.phase, reason, message, sandbox.changed_at)


def _explain(sandbox: Sandbox, attempt: Attempt) -> tuple[str, str]:
    if sandbox.ending is not None:
        verb = "has ended" if sandbox.closed_at else "is being removed"
        return sandbox.ending.cause.value.upper(), f"Sandbox {verb}: {describe_ending(sandbox.ending)}."
    if sandbox.failure is not None:
        return sandbox.failure.reason, sandbox.failure.message
    match sandbox.phase:
        case Phase.PENDING:
            return _explain_pending(sandbox, attempt)
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
    reason, message = "SANDBOX_PENDING", "Sandbox is accepted; its container is being provisioned."
    if sandbox.waiting is not None:
        reason = sandbox.waiting.reason
        message = sandbox.waiting.message or f"Sandbox waits in step {sandbox.waiting.step}."
    elif sandbox.runtime is not None and sandbox.runtime.parts:
        reason, message = "CONTAINER_STARTING", "Sandbox container is starting."
    elif attempt.waits_for_slot:
        reason, message = "WAITING_FOR_SLOT", "Sandbox is accepted; it waits for a worker that is free."
    if attempt.progress:
        message = f"{message} {attempt.progress}"
    if attempt.attempts and attempt.last_reason:
        times = f"Attempt {attempt.attempts} failed with {attempt.last_reason}"
        if sandbox.waiting is None or attempt.last_error not in (None, sandbox.waiting.message):
            times = f"{times}: {attempt.last_error}" if attempt.last_error else times
        message = f"{message} {times.rstrip('.')}; it will be repeated."
    return reason, message


def _explain_exit(observed: RuntimeState, runtime: Runtime | None) -> tuple[str, str]:
    known = runtime is not None and (runtime.exit_code is not None or runtime.finished_at is not None)
    if runtime is None or observed is RuntimeState.LOST or (observed is RuntimeState.REMOVED and not known):
        return "RUNTIME_LOST", "Sandbox container disappeared from the engine without being asked to."
    code = runtime.exit_code
    if code == 0:
        return "CONTAINER_EXITED", "Sandbox container exited successfully."
    if runtime.oom:
        return "CONTAINER_EXITED_ERROR", f"Sandbox container ran out of memory and was killed (exit code {code})."
    if runtime.exit_reason == "ENGINE_STOPPED":
        return "CONTAINER_EXITED_ERROR", (
            f"Sandbox container ended with exit code {code} while its engine was stopped or restarting; the engine "
            "ends its containers then unless it runs with live-restore."
        )
    detail = f": {runtime.exit_message}" if runtime.exit_message else ""
    how = "with a code that the engine did not keep" if code is None else f"with code {code}"
    return "CONTAINER_EXITED_ERROR", f"Sandbox container exited {how}{detail}."


def describe_ending(ending: Ending) -> str:
    """`deleted by api_key default at 2026-01-02T03:04:05.678901Z`."""
    verb = {
        ev.EndCause.USER_DELETE: "deleted",
        ev.EndCause.EXPIRED: "expired",
        ev.EndCause.EXPIRED_WHILE_PENDING: "expired before it could be provisioned,",
    }[ending.cause]
    return f"{verb} by {ending.by} at {ending.at.isoformat().replace('+00:00', 'Z')}"
