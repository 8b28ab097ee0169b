"""What a runtime said at one look, in words that fit any runtime. Plain values; the core plans on them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from msgspec import Struct


class Capabilities(Struct, frozen=True):
    """What a driver can do; the rest is refused before anything is appended."""

    pause: bool = True


class Power(StrEnum):
    """What a runtime object does at the moment of looking."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"


class Exit(Struct, frozen=True):
    """How a workload ended by itself."""

    code: int
    oom: bool = False
    message: str = ""
    at: datetime | None = None


class Observed(Struct, frozen=True):
    """What the engine said about one object, at one look."""

    sandbox_id: UUID
    runtime_id: str
    name: str
    power: Power
    generation: int = 1
    image_digest: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    exit: Exit | None = None
    adopted: bool = False
    """True when `ensure` met an object that an earlier try had created."""


class Look(Struct, frozen=True):
    """The engine answered. `observed` None = it says there is no such object of ours."""

    observed: Observed | None
