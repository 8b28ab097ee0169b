"""The state of a sandbox: the fold of its events.

`evolve` is total: it never raises on a known event, whatever the state, because history must always read. What may be
*appended* is a narrower question, answered by `app.domain.sandbox.transitions` before the append.

The phase shown to clients is derived from (desired, observed, failure, ending), never stored as a free string.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from app.domain.sandbox import events as ev
from app.domain.sandbox.spec import SandboxSpec


class Phase(StrEnum):
    """The public states of the OpenSandbox contract (section 2.1)."""

    PENDING = "Pending"
    RUNNING = "Running"
    PAUSING = "Pausing"
    PAUSED = "Paused"
    RESUMING = "Resuming"
    STOPPING = "Stopping"
    TERMINATED = "Terminated"
    FAILED = "Failed"


class Desired(StrEnum):
    """What its owner wants."""

    RUNNING = "running"
    PAUSED = "paused"
    TERMINATED = "terminated"


class RuntimeState(StrEnum):
    """What the log knows of the runtime."""

    NONE = "none"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    LOST = "lost"
    REMOVED = "removed"


class Runtime(Struct, frozen=True, omit_defaults=True):
    """The engine's object."""

    id: str
    name: str
    generation: int = 1
    image_digest: str | None = None
    started_at: datetime | None = None
    exit_code: int | None = None
    oom: bool = False
    exit_message: str = ""
    finished_at: datetime | None = None


class Failure(Struct, frozen=True):
    """Why it cannot be provided."""

    reason: str
    message: str


class Ending(Struct, frozen=True):
    """When, why and through whom it ended for clients."""

    at: datetime
    cause: ev.EndCause
    by: str


class Status(Struct, frozen=True):
    """What clients are shown."""

    state: Phase
    reason: str
    message: str
    last_transition_at: datetime


class Sandbox(Struct, frozen=True):
    """One sandbox. Immutable; `evolve` makes the next one."""

    id: UUID
    tenant: str
    version: int
    driver: str
    spec: SandboxSpec
    fingerprint: str
    metadata: dict[str, str]
    created_at: datetime
    changed_at: datetime
    """When the phase last changed."""
    expires_at: datetime | None = None
    desired: Desired = Desired.RUNNING
    observed: RuntimeState = RuntimeState.NONE
    runtime: Runtime | None = None
    failure: Failure | None = None
    ending: Ending | None = None
    closed_at: datetime | None = None
    """When nothing of it was left; the stream ends there."""

    @property
    def phase(self) -> Phase:
        """The public state."""
        return derive_phase(self)

    @property
    def status(self) -> Status:
        """The public state with its reason, in upstream's words where it has them."""
        reason, message = _explain(self)
        return Status(self.phase, reason, message, self.changed_at)


def derive_phase(box: Sandbox) -> Phase:
    """(desired, observed, failure, ending) -> public state."""
    if box.closed_at is not None:
        return Phase.TERMINATED
    if box.ending is not None:
        return Phase.STOPPING
    if box.failure is not None:
        return Phase.FAILED
    match box.observed:
        case RuntimeState.NONE | RuntimeState.CREATED:
            return Phase.PENDING
        case RuntimeState.RUNNING:
            return Phase.RUNNING if box.desired is Desired.RUNNING else Phase.PAUSING
        case RuntimeState.PAUSED:
            return Phase.PAUSED if box.desired is Desired.PAUSED else Phase.RESUMING
        case RuntimeState.LOST:
            return Phase.FAILED
        case RuntimeState.EXITED | RuntimeState.REMOVED:
            clean = box.runtime is not None and box.runtime.exit_code == 0
            return Phase.TERMINATED if clean else Phase.FAILED


def _explain(box: Sandbox) -> tuple[str, str]:
    if box.ending is not None:
        verb = "has ended" if box.closed_at else "is being removed"
        return box.ending.cause.value.upper(), f"Sandbox {verb}: {describe_ending(box.ending)}."
    if box.failure is not None:
        return box.failure.reason, box.failure.message
    runtime = box.runtime
    match box.phase:
        case Phase.PENDING if runtime is None:
            return "SANDBOX_PENDING", "Sandbox is accepted; its container is being provisioned."
        case Phase.PENDING:
            return "CONTAINER_STARTING", "Sandbox container is starting."
        case Phase.RUNNING:
            return "CONTAINER_RUNNING", "Sandbox container is running."
        case Phase.PAUSED:
            return "CONTAINER_PAUSED", "Sandbox container is paused."
        case Phase.PAUSING:
            return "PAUSING", "Sandbox container is being paused."
        case Phase.RESUMING:
            return "RESUMING", "Sandbox container is being resumed."
        case _:
            return _explain_exit(box.observed, runtime)


def _explain_exit(observed: RuntimeState, runtime: Runtime | None) -> tuple[str, str]:
    code = None if runtime is None else runtime.exit_code
    if observed is RuntimeState.LOST or code is None:
        return "RUNTIME_LOST", "Sandbox container disappeared from the engine without being asked to."
    if code == 0:
        return "CONTAINER_EXITED", "Sandbox container exited successfully."
    if runtime is not None and runtime.oom:
        return "CONTAINER_EXITED_ERROR", f"Sandbox container ran out of memory and was killed (exit code {code})."
    detail = f": {runtime.exit_message}" if runtime is not None and runtime.exit_message else ""
    return "CONTAINER_EXITED_ERROR", f"Sandbox container exited with code {code}{detail}."


def describe_ending(ending: Ending) -> str:
    """`deleted by api_key default at 2026-01-02T03:04:05.678901Z`."""
    verb = {
        ev.EndCause.USER_DELETE: "deleted",
        ev.EndCause.EXPIRED: "expired",
        ev.EndCause.EXPIRED_WHILE_PENDING: "expired before it could be provisioned,",
    }[ending.cause]
    return f"{verb} by {ending.by} at {ending.at.isoformat().replace('+00:00', 'Z')}"


def evolve(box: Sandbox | None, fact: ev.Recorded) -> Sandbox:
    """The next state. Total on known events; an event before `sandbox.requested` cannot be read at all."""
    if box is None:
        if not isinstance(fact.event, ev.Requested):
            msg = f"stream {fact.sandbox_id} does not begin with sandbox.requested"
            raise TypeError(msg)
        return _begin(fact, fact.event)
    after = replace(_apply(box, fact), version=fact.version)
    return replace(after, changed_at=fact.at) if after.phase is not box.phase else after


def fold(facts: Iterable[ev.Recorded], start: Sandbox | None = None) -> Sandbox | None:
    """The state after a history."""
    box = start
    for fact in facts:
        box = evolve(box, fact)
    return box


def _begin(fact: ev.Recorded, event: ev.Requested) -> Sandbox:
    ttl = event.spec.timeout_s
    return Sandbox(
        id=fact.sandbox_id,
        tenant=event.tenant,
        version=fact.version,
        driver=event.driver,
        spec=event.spec,
        fingerprint=event.fingerprint,
        metadata=event.metadata,
        created_at=fact.at,
        changed_at=fact.at,
        expires_at=None if ttl is None else fact.at + timedelta(seconds=ttl),
    )


def _apply(box: Sandbox, fact: ev.Recorded) -> Sandbox:
    match fact.event:
        case ev.LeaseRenewed(expires_at=expires_at):
            return replace(box, expires_at=expires_at)
        case ev.MetadataPatched(set=added, removed=removed):
            kept = {key: value for key, value in box.metadata.items() if key not in removed}
            return replace(box, metadata=kept | added)
        case ev.PauseRequested():
            return replace(box, desired=Desired.PAUSED)
        case ev.ResumeRequested():
            return replace(box, desired=Desired.RUNNING)
        case ev.TerminationRequested(cause=cause) | ev.Expired(cause=cause):
            ending = Ending(fact.at, cause, str(fact.meta.actor))
            return replace(box, desired=Desired.TERMINATED, ending=ending)
        case ev.RuntimeCreated() | ev.RuntimeAdopted() as made:
            runtime = Runtime(made.runtime_id, made.name, made.generation, made.image_digest)
            return replace(box, observed=RuntimeState.CREATED, runtime=runtime)
        case ev.Started(occurred_at=at):
            runtime = None if box.runtime is None else replace(box.runtime, started_at=at)
            return replace(box, observed=RuntimeState.RUNNING, runtime=runtime)
        case ev.Paused():
            return replace(box, observed=RuntimeState.PAUSED)
        case ev.Resumed():
            return replace(box, observed=RuntimeState.RUNNING)
        case ev.RuntimeExited() as gone:
            return replace(box, observed=RuntimeState.EXITED, runtime=_exited(box.runtime, gone))
        case ev.RuntimeLost():
            return replace(box, observed=RuntimeState.LOST)
        case ev.Failed(reason=reason, message=message):
            return replace(box, failure=Failure(reason, message))
        case ev.RuntimeRemoved():
            return replace(box, observed=RuntimeState.REMOVED)
        case ev.Terminated():
            return replace(box, closed_at=fact.at)
        case ev.Requested() | ev.ReconcileFailed():
            return box


def _exited(runtime: Runtime | None, gone: ev.RuntimeExited) -> Runtime | None:
    if runtime is None:
        return None
    return replace(
        runtime, exit_code=gone.exit_code, oom=gone.oom, exit_message=gone.message, finished_at=gone.occurred_at
    )
