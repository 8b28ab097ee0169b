"""The state of a sandbox: the fold of its events.

`evolve` is total: it never raises on a known event, whatever the state, because history must always read. What may be
*appended* is a narrower question, answered by `app.domain.sandbox.transitions` before the append.

The phase shown to clients is derived, never stored as a free string. The first rule that fits:

========================================== ===========
closed                                      Terminated
an ending was recorded                      Stopping
a failure was recorded                      Failed
this run has not started, or is not ready   Pending
otherwise by what is observed and desired   Running, Pausing, Paused, Resuming, Terminated, Failed
========================================== ===========

Five different things could be called an end:

========== ====================== ============================= ============================= =======================
what       in the state           recorded by                   what it means                 what clients read
========== ====================== ============================= ============================= =======================
exit, loss `observed` is exited   `runtime_exited`,             it does not run any more      Terminated (exit code 0),
           or lost                `runtime_lost`                                              else Failed
failure    `failure`              `failed`                      it cannot be provided         Failed
removal    `observed` is removed  `runtime_removed`             nothing is left on the engine the same as before
ending     `ending`               `termination_requested`,      somebody, or its time, ended  404; Stopping in history
                                  `expired`                     it
closing    `closed_at`            `terminated`                  the stream has ended          404; Terminated in history
========== ====================== ============================= ============================= =======================

* An exit or loss and a failure exclude each other. Each may be missing, and none of them is an ending: the sandbox
  stays visible until somebody or its time ends it.
* The removal follows an exit, a loss, a failure or an ending. What was never placed is never removed.
* The closing follows the removal and the ending, whichever comes last, in the same append. What was never placed is
  closed in the append of its ending.
* So the phase Terminated means two things: clients read it of a workload that ended with exit code 0, and history shows
  it of every sandbox that is closed.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from app.domain.sandbox import events as ev
from app.domain.sandbox import freeze as freezing
from app.domain.sandbox.freeze import Freeze
from app.domain.sandbox.observed import Address, Part, Waiting
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
    """The power state that the owner asked for."""

    RUNNING = "running"
    PAUSED = "paused"
    TERMINATED = "terminated"


class RuntimeState(StrEnum):
    """What the log knows of the object on the engine."""

    NONE = "none"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"
    LOST = "lost"
    REMOVED = "removed"


PROBE = "probe"
"""The step that asks the agent. A Running sandbox that waits in it has an agent that cannot be reached."""
GONE = (RuntimeState.EXITED, RuntimeState.LOST, RuntimeState.REMOVED)
"""It does not run, and what is left of it is never started again."""


class Runtime(Struct, frozen=True, omit_defaults=True):
    """The engine's object, and the last run of it. Without parts while there is only an image."""

    parts: tuple[Part, ...] = ()
    image_id: str | None = None
    image_digest: str | None = None
    started_at: datetime | None = None
    exit_code: int | None = None
    oom: bool = False
    exit_reason: str | None = None
    exit_message: str = ""
    finished_at: datetime | None = None
    exited: bool = False
    """Whether its end was seen; the engine may keep neither code nor time of it."""

    @property
    def main(self) -> Part | None:
        """The part that runs the workload."""
        return next((part for part in self.parts if part.role == "main"), None)


class Failure(Struct, frozen=True, omit_defaults=True):
    """Why it cannot be provided."""

    step: str
    reason: str
    message: str = ""


class Ending(Struct, frozen=True):
    """When, why and through whom it ended for clients."""

    at: datetime
    cause: str
    """An `EndCause`, or a word of a newer version."""
    by: str


class Sandbox(Struct, frozen=True):
    """One sandbox. Immutable; `evolve` makes the next one."""

    id: UUID
    tenant: str
    version: int
    position: int
    """Position of its last event."""
    schema: int
    """The highest schema number in its stream."""
    spec: SandboxSpec
    fingerprint: str
    metadata: dict[str, str]
    created_at: datetime
    changed_at: datetime
    """When the phase last changed."""
    key_id: str
    """The actor that asked for it."""
    key_name: str
    cpu_nanos: int | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    expires_at: datetime | None = None
    engine: str | None = None
    """None = no engine had room yet."""
    epoch: int = 0
    place: str = ""
    object_id: UUID | None = None
    desired: Desired = Desired.RUNNING
    observed: RuntimeState = RuntimeState.NONE
    generation: int = 0
    """Objects made for it so far."""
    run: int = 0
    """Starts so far, over all generations."""
    begun_at: datetime | None = None
    """When the start of this run was recorded. The deadline `ready` counts from here."""
    ready_at: datetime | None = None
    """Since when this run can be used."""
    runtime: Runtime | None = None
    address: Address | None = None
    waiting: Waiting | None = None
    failure: Failure | None = None
    ending: Ending | None = None
    frozen_by: Freeze | None = None
    freeze_at: datetime | None = None
    """When it was asked to stand still, then since when it does. The deadline `freeze` counts from here."""
    link_number: int = 0
    """Links that carry another number do not hold any more."""
    closed_at: datetime | None = None
    """When nothing of it was left; the stream ends there."""

    @property
    def phase(self) -> Phase:
        """The public state, derived from what is wanted and what was observed."""
        return derive_phase(self)

    @property
    def awaits_agent(self) -> bool:
        """It runs, and its agent has not answered yet."""
        return self.phase is Phase.PENDING and self.observed in (RuntimeState.RUNNING, RuntimeState.PAUSED)

    @property
    def agent_trouble(self) -> Waiting | None:
        """Why its agent cannot be reached, of a sandbox that counts as Running all the same. None = it can."""
        silent = self.phase is Phase.RUNNING and self.waiting is not None and self.waiting.step == PROBE
        return self.waiting if silent else None

    @property
    def holds_still(self) -> bool:
        """A snapshot wants it to stand still, and nothing has asked it to go on."""
        return self.frozen_by is not None and self.frozen_by.thaw is None

    @property
    def may_freeze(self) -> bool:
        """Whether a snapshot may ask it to stand still. A paused one too, since it may be resumed at any time."""
        here = self.observed in (RuntimeState.RUNNING, RuntimeState.PAUSED) and self.ready_at is not None
        return self.may_run and here and self.frozen_by is None

    @property
    def may_run(self) -> bool:
        """Whether it can ever run from here on. When not, its secrets are erased."""
        return self.ending is None and self.failure is None and self.observed not in GONE


def derive_phase(sandbox: Sandbox) -> Phase:
    """The table in the module's docstring."""
    if sandbox.closed_at is not None:
        return Phase.TERMINATED
    if sandbox.ending is not None:
        return Phase.STOPPING
    if sandbox.failure is not None:
        return Phase.FAILED
    match sandbox.observed:
        case RuntimeState.NONE | RuntimeState.CREATED:
            return Phase.PENDING
        case RuntimeState.RUNNING | RuntimeState.PAUSED if sandbox.ready_at is None:
            return Phase.PENDING
        case RuntimeState.RUNNING:
            return Phase.RUNNING if sandbox.desired is Desired.RUNNING else Phase.PAUSING
        case RuntimeState.PAUSED:
            return Phase.PAUSED if sandbox.desired is Desired.PAUSED else Phase.RESUMING
        case RuntimeState.LOST:
            return Phase.FAILED
        case RuntimeState.EXITED | RuntimeState.REMOVED:
            clean = sandbox.runtime is not None and sandbox.runtime.exit_code == 0
            return Phase.TERMINATED if clean else Phase.FAILED


def evolve(sandbox: Sandbox | None, recorded: ev.Recorded) -> Sandbox:
    """The next state. Total on known events; an event before `sandbox.requested` cannot be read at all."""
    if sandbox is None:
        if not isinstance(recorded.event, ev.Requested):
            msg = f"stream {recorded.stream_id} does not begin with sandbox.requested"
            raise TypeError(msg)
        return _begin(recorded, recorded.event)
    after = replace(
        _apply(sandbox, recorded),
        version=recorded.version,
        position=recorded.position,
        schema=max(sandbox.schema, ev.REGISTRY.schema_of(recorded)),
    )
    if after.frozen_by is not None and (after.observed in GONE or (not after.may_run and after.ending is None)):
        after = replace(after, frozen_by=None, freeze_at=None)  # what does not run needs no thaw
    if after.phase is sandbox.phase:
        return after
    silent = after.phase is Phase.RUNNING and isinstance(recorded.event, ev.AgentUnreachable)
    kept = silent or after.phase is Phase.PENDING
    return replace(after, changed_at=recorded.at, waiting=after.waiting if kept else None)


def fold(history: Iterable[ev.Recorded], start: Sandbox | None = None) -> Sandbox | None:
    """The state after a history."""
    sandbox = start
    for recorded in history:
        sandbox = evolve(sandbox, recorded)
    return sandbox


def _begin(recorded: ev.Recorded, event: ev.Requested) -> Sandbox:
    ttl = event.timeout_s
    return Sandbox(
        id=recorded.stream_id,
        tenant=recorded.tenant,
        version=recorded.version,
        position=recorded.position,
        schema=ev.REGISTRY.schema_of(recorded),
        spec=event.spec,
        fingerprint=event.fingerprint,
        metadata=event.metadata,
        created_at=recorded.at,
        changed_at=recorded.at,
        key_id=recorded.meta.actor.id,
        key_name=recorded.meta.actor.name,
        cpu_nanos=event.cpu_nanos,
        memory_bytes=event.memory_bytes,
        gpus=event.gpus,
        expires_at=None if ttl is None else recorded.at + timedelta(seconds=ttl),
    )


def _apply(sandbox: Sandbox, recorded: ev.Recorded) -> Sandbox:
    match recorded.event:
        case ev.Placed() as event:
            return replace(
                sandbox,
                engine=event.engine,
                epoch=event.epoch,
                place=event.place,
                object_id=event.object_id,
                waiting=None,
            )
        case ev.Renewed(expires_at=expires_at):
            return replace(sandbox, expires_at=expires_at)
        case ev.MetadataPatched(set=added, removed=removed):
            kept = {key: value for key, value in sandbox.metadata.items() if key not in removed}
            return replace(sandbox, metadata=kept | added)
        case ev.PauseRequested() | ev.ResumeFailed():
            return replace(sandbox, desired=Desired.PAUSED)
        case ev.ResumeRequested() | ev.PauseFailed():
            return replace(sandbox, desired=Desired.RUNNING)
        case ev.TerminationRequested(end_cause=cause) | ev.Expired(end_cause=cause):
            ending = Ending(recorded.at, cause, str(recorded.meta.actor))
            return replace(sandbox, desired=Desired.TERMINATED, ending=ending)
        case (
            ev.Waited(step=step, reason=reason, message=message)
            | ev.ReconcileFailed(step=step, reason=reason, message=message)
        ):
            pending = sandbox.phase is Phase.PENDING
            return replace(sandbox, waiting=Waiting(step, reason, message)) if pending else sandbox
        case ev.FreezeRequested() | ev.Frozen() | ev.ThawRequested() | ev.Thawed() as event:
            begins = isinstance(event, ev.FreezeRequested | ev.Frozen)
            freeze = freezing.after(sandbox.frozen_by, event)
            since = None if freeze is None else recorded.at if begins else sandbox.freeze_at or recorded.at
            return replace(sandbox, frozen_by=freeze, freeze_at=since)
        case ev.Failed(step=step, reason=reason, message=message):
            return replace(sandbox, failure=Failure(step, reason, message))
        case ev.Terminated():
            return replace(sandbox, closed_at=recorded.at)
        case ev.LinksRevoked(link_number=number):
            return replace(sandbox, link_number=number)
        case ev.Requested() | ev.Overdue() | ev.LinkCreated():
            return sandbox
        case event:
            return _observe(sandbox, event, recorded.at)


def _observe(sandbox: Sandbox, event: ev.Event, at: datetime) -> Sandbox:
    """What the engine last reported."""
    runtime = sandbox.runtime or Runtime()
    match event:
        case ev.Fetched(image_id=image_id, image_digest=digest):
            return replace(sandbox, runtime=replace(runtime, image_id=image_id, image_digest=digest), waiting=None)
        case ev.RuntimeCreated() | ev.RuntimeAdopted() as made:
            fresh = Runtime(made.parts, runtime.image_id, runtime.image_digest)
            return replace(
                sandbox,
                observed=RuntimeState.CREATED,
                generation=made.generation,
                runtime=fresh,
                address=None,  # that of an older object may belong to somebody else by now
                gpus=sandbox.gpus if made.gpus is None else made.gpus,
                ready_at=None,
                waiting=None,
                frozen_by=None,
                freeze_at=None,
            )
        case ev.Started() | ev.Restarted() as begun:
            return replace(
                sandbox,
                observed=RuntimeState.RUNNING,
                run=begun.run,
                runtime=Runtime(runtime.parts, runtime.image_id, runtime.image_digest, begun.occurred_at),
                begun_at=at,
                address=begun.address or sandbox.address,
                ready_at=None,
                waiting=None,
                frozen_by=None,
                freeze_at=None,
            )
        case ev.Ready():
            return replace(sandbox, ready_at=at, waiting=None)
        case ev.AgentUnreachable(reason=reason, message=message):
            return replace(sandbox, ready_at=at, waiting=Waiting(PROBE, reason, message))
        case ev.AddressChanged(address=address):
            return replace(sandbox, address=address)
        case ev.Paused() | ev.Resumed():
            paused = isinstance(event, ev.Paused)
            return replace(sandbox, observed=RuntimeState.PAUSED if paused else RuntimeState.RUNNING)
        case ev.RuntimeExited() as gone:
            ended = replace(
                runtime,
                exit_code=gone.exit_code,
                oom=gone.oom,
                exit_reason=gone.reason,
                exit_message=gone.message,
                finished_at=gone.occurred_at,
                exited=True,
            )
            return replace(sandbox, observed=RuntimeState.EXITED, runtime=ended)
        case ev.RuntimeLost():
            return replace(sandbox, observed=RuntimeState.LOST)
        case ev.RuntimeRemoved():
            return replace(sandbox, observed=RuntimeState.REMOVED)
        case _:
            return sandbox
