"""What may be asked of a sandbox: by clients, by deadlines, and by reconcilers that report observations."""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.events import EndCause
from app.domain.sandbox.observed import Observed, Power


class Renew(Struct, frozen=True):
    """Move the expiry. `max_timeout_s` bounds it, counted from now."""

    expires_at: datetime
    max_timeout_s: int | None = None


class PatchMetadata(Struct, frozen=True):
    """Merge patch of depth one; None removes."""

    patch: dict[str, str | None]
    max_entries: int = 256


class Pause(Struct, frozen=True):
    """Pause the sandbox."""


class Resume(Struct, frozen=True):
    """Resume the sandbox."""


class Terminate(Struct, frozen=True):
    """End the sandbox."""

    cause: EndCause = EndCause.USER_DELETE


class Expire(Struct, frozen=True):
    """The deadline `expiry` fired; does nothing before `expires_at`."""


class EndTransition(Struct, frozen=True):
    """The deadline `transition` fired; does nothing while the phase is young enough."""

    limits: Limits = Limits()
    last_reason: str | None = None
    """Why the last attempt failed, as the queue knows it."""
    last_error: str | None = None


class EndProbe(Struct, frozen=True):
    """The deadline `ready` fired; does nothing while the run is young enough."""

    limits: Limits = Limits()


class Freeze(Struct, frozen=True):
    """Let it stand still for a snapshot. Nothing when it cannot now; the snapshot looks again."""

    snapshot_id: UUID


class Thaw(Struct, frozen=True):
    """Let it go on, if it stands still for this snapshot."""

    snapshot_id: UUID
    reason: str


class EndFreeze(Struct, frozen=True):
    """The deadline `freeze` fired; does nothing while the freeze is young enough."""

    limits: Limits = Limits()


class CreateLink(Struct, frozen=True):
    """Let whoever has the link reach a port for so many seconds."""

    port: int
    seconds: int


class RevokeLinks(Struct, frozen=True):
    """End all links that there are."""


class RecordPlaced(Struct, frozen=True):
    """Place the sandbox on an engine."""

    engine: str
    epoch: int
    object_id: UUID
    place: str = ""
    reason: str = "ONLY_ENGINE"
    candidates: int = 1


class RecordWaiting(Struct, frozen=True):
    """A step waits. The same step and reason again = no event."""

    step: str
    reason: str
    message: str = ""


class RecordFetched(Struct, frozen=True):
    """Record that the image is on the engine."""

    image_id: str
    image_digest: str | None = None
    size_bytes: int | None = None
    took_ms: int = 0
    cached: bool = False


class RecordSeen(Struct, frozen=True):
    """The engine showed it. Nothing new = no event."""

    observed: Observed
    found_by: str = "ensure"
    at: datetime | None = None
    """When, by the database's clock, as nearly as the reporter knows. It only measures how long a freeze lasted."""


class RecordReady(Struct, frozen=True):
    """The agent of this run answered with its token."""

    run: int


class RecordLost(Struct, frozen=True):
    """The engine said twice, apart in time, that it is not there."""

    missing_since: datetime
    reason: str = "MISSING"
    occurred_at: datetime | None = None
    """When the engine said that it was removed."""


class RecordRemoved(Struct, frozen=True):
    """Nothing of it is left on the engine."""


class RecordFailure(Struct, frozen=True):
    """Record that the sandbox cannot be provided. This is final."""

    step: str
    reason: str
    message: str


class RecordPowerRefused(Struct, frozen=True):
    """The engine will not pause or resume it; final for this request, and no reason to end the sandbox."""

    reason: str
    message: str
    power: Power | None = None
    """What it was to be. None = not told."""


class RecordRetry(Struct, frozen=True):
    """An attempt failed and will be repeated."""

    step: str
    reason: str
    message: str
    attempt: int


Observation: TypeAlias = (
    RecordPlaced
    | RecordWaiting
    | RecordFetched
    | RecordSeen
    | RecordLost
    | RecordRemoved
    | RecordFailure
    | RecordPowerRefused
    | RecordRetry
)
"""What a reconciler reports. Decided on the state alone, whatever the time."""

Command: TypeAlias = (
    Renew
    | PatchMetadata
    | Pause
    | Resume
    | Terminate
    | Expire
    | EndTransition
    | EndProbe
    | Freeze
    | Thaw
    | EndFreeze
    | CreateLink
    | RevokeLinks
    | RecordReady
    | Observation
)
