"""What happened to a sandbox. The names and payloads are those of the catalogue (part 3) and are kept for ever.

`app.domain.stream` says how a type may change. Types that later parts of the catalogue add come with the revision of
the registry that adds them.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TypeAlias, get_args
from uuid import UUID

from msgspec import Struct

from app.domain import stream
from app.domain.sandbox.observed import Address, Part
from app.domain.sandbox.spec import SandboxSpec


class EndCause(StrEnum):
    """Why a sandbox ended, in the words that this version writes. In an event the field is text: the list is open."""

    USER_DELETE = "user_delete"
    EXPIRED = "expired"
    EXPIRED_WHILE_PENDING = "expired_while_pending"


class Requested(Struct, frozen=True, omit_defaults=True):
    """It was accepted. `createdAt` is this event's `recorded_at`; it expires `timeout_s` seconds later."""

    spec: SandboxSpec
    fingerprint: str
    """Keyed digest of the request, to distinguish a repeated request from a reused Idempotency-Key."""
    metadata: dict[str, str] = {}
    timeout_s: int | None = None
    """None = it never expires by itself."""
    timeout_from: str = "request"
    """`request`. The word `cap` is kept for an end that the operator's maximum gives. This version never writes it:
    `max_sandbox_timeout_seconds` refuses a longer timeout, and a sandbox that was asked for without one never expires,
    as on the public server."""
    cpu_nanos: int | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    gpus_all: bool = False


class Placed(Struct, frozen=True, omit_defaults=True):
    """The sandbox was placed on an engine."""

    engine: str
    epoch: int
    object_id: UUID
    place: str = ""
    reason: str = "ONLY_ENGINE"
    candidates: int = 1
    """How many engines could have taken it."""


class Renewed(Struct, frozen=True, omit_defaults=True):
    """The sandbox expires at another time than before."""

    expires_at: datetime
    previous: datetime | None = None
    source: str = "api"


class MetadataPatched(Struct, frozen=True, omit_defaults=True):
    """A merge patch of depth one (RFC 7396), as its effect."""

    set: dict[str, str] = {}
    removed: tuple[str, ...] = ()


class PauseRequested(Struct, frozen=True):
    """An actor asked to pause the sandbox."""


class ResumeRequested(Struct, frozen=True):
    """An actor asked to resume the sandbox."""


class Waited(Struct, frozen=True, omit_defaults=True):
    """A step waits for something. Recorded only when step or reason changes."""

    step: str
    reason: str
    message: str = ""


class Fetched(Struct, frozen=True, omit_defaults=True):
    """Its image is on the engine."""

    image_id: str
    image_digest: str | None = None
    size_bytes: int | None = None
    took_ms: int = 0
    cached: bool = False


class RuntimeCreated(Struct, frozen=True, omit_defaults=True):
    """The engine made an object for it."""

    generation: int
    parts: tuple[Part, ...]
    gpus: int | None = None
    """How many GPUs it has got. Absent: it has none; or "all" were asked for, and the engine does not say how many
    that was, as Docker does not."""


class RuntimeAdopted(Struct, frozen=True, omit_defaults=True):
    """An object that an earlier, unreported attempt had made was taken over."""

    generation: int
    parts: tuple[Part, ...]
    found_by: str
    """`create_conflict`, `observe` or `sweep`."""
    gpus: int | None = None
    """As in `RuntimeCreated`."""


class Started(Struct, frozen=True, omit_defaults=True):
    """It runs for the first time. `occurred_at` is the engine's time."""

    run: int = 1
    occurred_at: datetime | None = None
    address: Address | None = None
    node: str | None = None


class Restarted(Struct, frozen=True, omit_defaults=True):
    """It began to run again. Stands instead of `Started` for every run after the first."""

    run: int
    generation: int = 1
    by: str = "outside"
    """`outside`: no event asked for it, e.g. a person at the engine, or the engine after a power loss."""
    kept: str = "filesystem"
    """`filesystem` or `nothing`."""
    attempt: int | None = None
    occurred_at: datetime | None = None
    address: Address | None = None


class Ready(Struct, frozen=True, omit_defaults=True):
    """The sandbox is ready for use."""

    after_ms: int = 0
    """Milliseconds from the start of this run until it answered. Always 0 when `via` is `runtime`: nothing is asked
    then, so the sandbox is ready as soon as it runs. The time between `occurred_at` of the start and `recorded_at` does
    not count: it is the delay until we noticed, and the two times come from two clocks."""
    via: str = "runtime"
    """`runtime`: the container runs and nothing else is waited for. `agent`: the agent answered with its token."""


class AgentUnreachable(Struct, frozen=True, omit_defaults=True):
    """The container runs and its agent did not answer in time. The sandbox counts as Running, because the user's
    program may be well. A later `ready` ends this.
    """

    reason: str
    message: str = ""
    after_ms: int = 0
    """Milliseconds from the start of this run."""


class AddressChanged(Struct, frozen=True, omit_defaults=True):
    """The engine shows another address of the same run, or other ports: somebody connected it anew."""

    address: Address


class Paused(Struct, frozen=True, omit_defaults=True):
    """The sandbox is paused. `occurred_at` is the engine's time of a pause from outside, if the engine told it. Of one
    that we asked for there is none: its record follows at once.
    """

    occurred_at: datetime | None = None
    kept: str = "memory"


class Resumed(Struct, frozen=True, omit_defaults=True):
    """The sandbox runs again after a pause. `occurred_at` is as in `Paused`."""

    occurred_at: datetime | None = None


class PauseFailed(Struct, frozen=True, omit_defaults=True):
    """It could not be paused and goes on running."""

    reason: str
    message: str = ""


class ResumeFailed(Struct, frozen=True, omit_defaults=True):
    """It could not be resumed and stays paused."""

    reason: str
    message: str = ""


class FreezeRequested(Struct, frozen=True):
    """A snapshot asks it to stand still. It stays Running for clients."""

    snapshot_id: UUID


class Frozen(Struct, frozen=True, omit_defaults=True):
    """It stands still for the snapshot. `run` is the run that does."""

    snapshot_id: UUID
    run: int = 1


class ThawRequested(Struct, frozen=True):
    """It is to go on. `reason`: `DONE`, `FAILED`, `DEADLINE`, `REFUSED` (the engine does not pause it) or `BROKEN` (it
    ran although nothing had asked for it).
    """

    snapshot_id: UUID
    reason: str


class Thawed(Struct, frozen=True, omit_defaults=True):
    """The snapshot holds it no more: it runs, or is paused because its owner wants that."""

    snapshot_id: UUID
    frozen_ms: int = 0


class LinkCreated(Struct, frozen=True):
    """Somebody may reach a port of it by a signed link. The log never has the link's value."""

    link_id: UUID
    port: int
    expires_at: datetime


class LinksRevoked(Struct, frozen=True):
    """No link that was made before holds any more. `link_number` is the one that later links carry."""

    link_number: int


class ReconcileFailed(Struct, frozen=True, omit_defaults=True):
    """An attempt failed and will be repeated. Recorded when the reason changes and at attempts 1, 3 and 10."""

    step: str
    reason: str
    message: str = ""
    attempt: int = 1


class Overdue(Struct, frozen=True, omit_defaults=True):
    """It has been in a transitional phase for longer than expected. Reported again and again."""

    phase: str
    since: datetime
    times: int = 1


class RuntimeExited(Struct, frozen=True, omit_defaults=True):
    """The entrypoint ended. `occurred_at` is the engine's time."""

    exit_code: int | None = None
    oom: bool = False
    reason: str | None = None
    message: str = ""
    occurred_at: datetime | None = None
    run: int = 1
    """Which start it ended; 0 when the engine says that it never started."""


class RuntimeLost(Struct, frozen=True, omit_defaults=True):
    """Its object is gone: the engine said so twice, apart in time, or showed another object that never ran instead."""

    reason: str = "MISSING"
    missing_since: datetime | None = None
    """When the engine first said that there is none, by the database's clock."""
    occurred_at: datetime | None = None
    """When the object was removed, by the engine's clock. Absent: the engine did not tell it to this worker."""


class Failed(Struct, frozen=True, omit_defaults=True):
    """It cannot be provided. Final; what is left of it on the engine is removed."""

    step: str
    reason: str
    message: str = ""


class TerminationRequested(Struct, frozen=True, omit_defaults=True):
    """Somebody wants it gone. From here on it has ended for clients."""

    end_cause: str


class Expired(Struct, frozen=True, omit_defaults=True):
    """Its time passed. From here on it has ended for clients."""

    expires_at: datetime
    end_cause: str


class RuntimeRemoved(Struct, frozen=True, omit_defaults=True):
    """Nothing of it is left on the engine. `parts` are those that the log knew."""

    parts: tuple[Part, ...] = ()


class Terminated(Struct, frozen=True, omit_defaults=True):
    """The end of the stream."""

    end_cause: str
    lived_ms: int
    exit_code: int | None = None


Event: TypeAlias = (
    Requested
    | Placed
    | Renewed
    | MetadataPatched
    | PauseRequested
    | ResumeRequested
    | Waited
    | Fetched
    | RuntimeCreated
    | RuntimeAdopted
    | Started
    | Restarted
    | Ready
    | AgentUnreachable
    | AddressChanged
    | Paused
    | Resumed
    | PauseFailed
    | ResumeFailed
    | FreezeRequested
    | Frozen
    | ThawRequested
    | Thawed
    | LinkCreated
    | LinksRevoked
    | ReconcileFailed
    | Overdue
    | RuntimeExited
    | RuntimeLost
    | Failed
    | TerminationRequested
    | Expired
    | RuntimeRemoved
    | Terminated
)
Recorded: TypeAlias = stream.Recorded[Event]

REGISTRY: stream.Registry[Event] = stream.Registry(
    "sandbox",
    {
        "sandbox.requested": Requested,
        "sandbox.placed": Placed,
        "sandbox.renewed": Renewed,
        "sandbox.metadata_patched": MetadataPatched,
        "sandbox.pause_requested": PauseRequested,
        "sandbox.resume_requested": ResumeRequested,
        "sandbox.waiting": Waited,
        "sandbox.fetched": Fetched,
        "sandbox.runtime_created": RuntimeCreated,
        "sandbox.runtime_adopted": RuntimeAdopted,
        "sandbox.started": Started,
        "sandbox.restarted": Restarted,
        "sandbox.ready": Ready,
        "sandbox.agent_unreachable": AgentUnreachable,
        "sandbox.address_changed": AddressChanged,
        "sandbox.paused": Paused,
        "sandbox.resumed": Resumed,
        "sandbox.pause_failed": PauseFailed,
        "sandbox.resume_failed": ResumeFailed,
        "sandbox.freeze_requested": FreezeRequested,
        "sandbox.frozen": Frozen,
        "sandbox.thaw_requested": ThawRequested,
        "sandbox.thawed": Thawed,
        "sandbox.link_created": LinkCreated,
        "sandbox.links_revoked": LinksRevoked,
        "sandbox.reconcile_failed": ReconcileFailed,
        "sandbox.overdue": Overdue,
        "sandbox.runtime_exited": RuntimeExited,
        "sandbox.runtime_lost": RuntimeLost,
        "sandbox.failed": Failed,
        "sandbox.termination_requested": TerminationRequested,
        "sandbox.expired": Expired,
        "sandbox.runtime_removed": RuntimeRemoved,
        "sandbox.terminated": Terminated,
    },
)

EVENT_CLASSES: tuple[type[Event], ...] = get_args(Event)
