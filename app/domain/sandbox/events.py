"""What happened. Tagged structs with stable wire names; one stream per sandbox.

Rules of change (architecture 1.9): a new field with a default needs no new schema number. Anything else bumps
`SCHEMA[type]` and adds one pure function to `UPCASTS[(type, old_schema)]`, chained until current, applied before
msgspec converts. Wire names never change. Golden files in `tests/golden` hold one stored payload per (type, schema).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeAlias, cast, get_args
from uuid import UUID

import msgspec
from msgspec import Struct

from app.domain.sandbox.spec import SandboxSpec
from app.errors import UnknownEvent


class ActorKind(StrEnum):
    """Who can make something happen (decision 9)."""

    API_KEY = "api_key"
    TIMER = "timer"
    RECONCILER = "reconciler"
    RUNTIME = "runtime"
    OPERATOR = "operator"


class Actor(Struct, frozen=True, omit_defaults=True):
    """Who did it. `id` is stable (a key's fingerprint, a worker's id), `name` is for people."""

    kind: ActorKind
    id: str
    name: str

    def __str__(self) -> str:
        """`api_key default`, for messages."""
        return f"{self.kind.value} {self.name}"


class Meta(Struct, frozen=True, omit_defaults=True):
    """Stored beside every event."""

    actor: Actor
    app_version: str
    request_id: str | None = None
    cause: int | None = None
    """Position of the event that led here."""
    client: str | None = None
    """Client address, for API actors."""
    idempotency_key: str | None = None
    """SHA-256 of the key, so that an auditor can match a client's own record."""


class EndCause(StrEnum):
    """Why a sandbox ended."""

    USER_DELETE = "user_delete"
    EXPIRED = "expired"
    EXPIRED_WHILE_PENDING = "expired_while_pending"


class Requested(Struct, frozen=True, tag="sandbox.requested", tag_field="type", omit_defaults=True):
    """Accepted. `createdAt` is this event's `recorded_at`; the deadline is that plus `spec.timeout_s`."""

    tenant: str
    driver: str
    spec: SandboxSpec
    fingerprint: str
    """Keyed digest of the request, to tell a replay from a reused Idempotency-Key."""
    metadata: dict[str, str] = {}


class LeaseRenewed(Struct, frozen=True, tag="sandbox.lease_renewed", tag_field="type", omit_defaults=True):
    """The deadline moved."""

    expires_at: datetime
    previous: datetime
    source: str = "api"


class MetadataPatched(Struct, frozen=True, tag="sandbox.metadata_patched", tag_field="type", omit_defaults=True):
    """Merge patch of depth one (RFC 7396), as its effect."""

    set: dict[str, str] = {}
    removed: tuple[str, ...] = ()


class PauseRequested(Struct, frozen=True, tag="sandbox.pause_requested", tag_field="type"):
    """Somebody wants it paused."""


class ResumeRequested(Struct, frozen=True, tag="sandbox.resume_requested", tag_field="type"):
    """Somebody wants it running again."""


class TerminationRequested(Struct, frozen=True, tag="sandbox.termination_requested", tag_field="type"):
    """Somebody wants it gone. From here on it has ended for clients."""

    cause: EndCause = EndCause.USER_DELETE


class Expired(Struct, frozen=True, tag="sandbox.expired", tag_field="type"):
    """The deadline passed. From here on it has ended for clients."""

    deadline: datetime
    cause: EndCause = EndCause.EXPIRED


class RuntimeCreated(Struct, frozen=True, tag="sandbox.runtime_created", tag_field="type", omit_defaults=True):
    """The engine made an object for it."""

    runtime_id: str
    name: str
    generation: int = 1
    image_digest: str | None = None


class RuntimeAdopted(Struct, frozen=True, tag="sandbox.runtime_adopted", tag_field="type", omit_defaults=True):
    """An object that an earlier, unreported try had made was taken over."""

    runtime_id: str
    name: str
    found_by: str
    generation: int = 1
    image_digest: str | None = None


class Started(Struct, frozen=True, tag="sandbox.started", tag_field="type", omit_defaults=True):
    """It runs. `occurred_at` is the engine's time."""

    occurred_at: datetime | None = None


class Paused(Struct, frozen=True, tag="sandbox.paused", tag_field="type"):
    """It is paused."""


class Resumed(Struct, frozen=True, tag="sandbox.resumed", tag_field="type"):
    """It runs again."""


class RuntimeExited(Struct, frozen=True, tag="sandbox.runtime_exited", tag_field="type", omit_defaults=True):
    """The entrypoint ended by itself. `occurred_at` is the engine's time."""

    exit_code: int
    oom: bool = False
    message: str = ""
    occurred_at: datetime | None = None


class RuntimeLost(Struct, frozen=True, tag="sandbox.runtime_lost", tag_field="type", omit_defaults=True):
    """The engine answered twice, apart in time, that there is no such object any more."""

    runtime_id: str
    missing_since: datetime | None = None


class ReconcileFailed(Struct, frozen=True, tag="sandbox.reconcile_failed", tag_field="type", omit_defaults=True):
    """A try failed and will be repeated. Thinned: when the code changes and at attempts 1, 3, 10."""

    step: str
    code: str
    message: str
    attempt: int


class Failed(Struct, frozen=True, tag="sandbox.failed", tag_field="type"):
    """It cannot be provided. Final; the runtime's leftovers are removed."""

    reason: str
    message: str


class RuntimeRemoved(Struct, frozen=True, tag="sandbox.runtime_removed", tag_field="type", omit_defaults=True):
    """Nothing of it is left on the engine."""

    runtime_id: str | None = None


class Terminated(Struct, frozen=True, tag="sandbox.terminated", tag_field="type", omit_defaults=True):
    """The end of the stream."""

    cause: EndCause
    lived_s: float
    exit_code: int | None = None


Event: TypeAlias = (
    Requested
    | LeaseRenewed
    | MetadataPatched
    | PauseRequested
    | ResumeRequested
    | TerminationRequested
    | Expired
    | RuntimeCreated
    | RuntimeAdopted
    | Started
    | Paused
    | Resumed
    | RuntimeExited
    | RuntimeLost
    | ReconcileFailed
    | Failed
    | RuntimeRemoved
    | Terminated
)


class Recorded(Struct, frozen=True):
    """An event as it stands in the log."""

    position: int
    sandbox_id: UUID
    version: int
    at: datetime
    """`recorded_at`, the database's clock."""
    event: Event
    meta: Meta


EVENT_CLASSES: tuple[type[Event], ...] = get_args(Event)
SCHEMA: Mapping[str, int] = {cls.__struct_config__.tag: 1 for cls in EVENT_CLASSES}  # pyright: ignore[reportAssignmentType]
Upcast: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]
UPCASTS: Mapping[tuple[str, int], Upcast] = {}
"""(type, schema) -> payload of the next schema number."""


def wire_name(event: Event | type[Event]) -> str:
    """The stable type name, e.g. `sandbox.requested`."""
    return cast("str", event.__struct_config__.tag)


def to_payload(event: Event) -> dict[str, Any]:
    """The `data` column: JSON-ready, without the type."""
    payload = msgspec.to_builtins(event)
    del payload["type"]
    return payload


def from_payload(
    type_: str,
    schema: int,
    payload: Mapping[str, Any],
    *,
    current: Mapping[str, int] = SCHEMA,
    upcasts: Mapping[tuple[str, int], Upcast] = UPCASTS,
) -> Event:
    """Read a stored event of any schema number up to the current one.

    Raises:
        UnknownEvent: the type or schema was written by a newer version, or the payload does not read. Never skipped.
    """
    newest = current.get(type_, 0)
    if not 0 < schema <= newest:
        raise UnknownEvent(f"event {type_} schema {schema} was written by a newer version; upgrade this server first")
    data = dict(payload)
    for number in range(schema, newest):
        data = upcasts[type_, number](data)
    try:
        return msgspec.convert({**data, "type": type_}, Event)
    except msgspec.ValidationError as error:
        raise UnknownEvent(f"event {type_} schema {schema} does not read: {error}") from error


def read_meta(stored: Mapping[str, Any]) -> Meta:
    """The `meta` column.

    Raises:
        UnknownEvent: written by a newer version, e.g. with a kind of actor not known here.
    """
    try:
        return msgspec.convert(stored, Meta)
    except msgspec.ValidationError as error:
        raise UnknownEvent(f"meta of an event does not read: {error}; upgrade this server first") from error
