"""What may be asked of a sandbox: by clients, by the expiry job, and by reconcilers reporting facts."""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias

from msgspec import Struct

from app.domain.sandbox.events import EndCause
from app.domain.sandbox.observed import Observed


class Renew(Struct, frozen=True):
    """Move the deadline. `max_timeout_s` bounds it, counted from now."""

    expires_at: datetime
    max_timeout_s: int | None = None


class PatchMetadata(Struct, frozen=True):
    """Merge patch of depth one; None removes."""

    patch: dict[str, str | None]
    max_entries: int = 256


class Pause(Struct, frozen=True):
    """Freeze it."""


class Resume(Struct, frozen=True):
    """Let it run again."""


class Terminate(Struct, frozen=True):
    """Delete it."""

    cause: EndCause = EndCause.USER_DELETE


class Expire(Struct, frozen=True):
    """The expiry job looked; does nothing before the deadline."""


class RecordSeen(Struct, frozen=True):
    """The engine showed it. Nothing new = no event."""

    observed: Observed
    found_by: str = "ensure"


class RecordLost(Struct, frozen=True):
    """The engine said twice, apart in time, that it is not there."""

    missing_since: datetime


class RecordRemoved(Struct, frozen=True):
    """Nothing of it is left on the engine."""


class RecordFailure(Struct, frozen=True):
    """It cannot be provided; final."""

    reason: str
    message: str


class RecordRetry(Struct, frozen=True):
    """A try failed and will be repeated."""

    step: str
    code: str
    message: str
    attempt: int


Fact: TypeAlias = RecordSeen | RecordLost | RecordRemoved | RecordFailure | RecordRetry
"""What a reconciler reports. Decided on the state alone, whatever the time."""

Command: TypeAlias = Renew | PatchMetadata | Pause | Resume | Terminate | Expire | Fact
