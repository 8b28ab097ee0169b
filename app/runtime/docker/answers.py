"""The parts of the engine's answers that we read, and what they mean."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import UUID

import msgspec
from msgspec import Struct

from app.runtime.docker.spec import container_name, generation_of, sandbox_of
from app.runtime.driver import Exit, Observed, Power

POWERS = {
    "created": Power.CREATED,
    "running": Power.RUNNING,
    "restarting": Power.RUNNING,
    "paused": Power.PAUSED,
    "exited": Power.EXITED,
    "dead": Power.EXITED,
    "removing": Power.EXITED,  # still there, holding its name, and never to run again
}
REMOVING = "removing"


class Created(Struct, frozen=True, rename="pascal"):
    """Answer of a create call."""

    id: str


class State(Struct, frozen=True, rename="pascal"):
    """What the container does."""

    status: str
    started_at: datetime
    finished_at: datetime
    exit_code: int = 0
    error: str = ""
    oom_killed: bool = msgspec.field(name="OOMKilled", default=False)


class Config(Struct, frozen=True, rename="pascal"):
    """What the container was made with."""

    labels: dict[str, str] | None = None


class Inspected(Struct, frozen=True, rename="pascal"):
    """Answer of an inspect call."""

    id: str
    name: str
    created: datetime
    image: str
    state: State
    config: Config

    @property
    def labels(self) -> dict[str, str]:
        """Never None."""
        return self.config.labels or {}

    def sandbox(self, installation: UUID) -> UUID | None:
        """Which sandbox this is; None = a stranger's."""
        return sandbox_of(self.labels, (self.name,), installation)


class Listed(Struct, frozen=True, rename="pascal"):
    """One row of a listing. It has no exit code and no start time; only an inspect call tells those."""

    id: str
    state: str
    created: int
    image_id: str = msgspec.field(name="ImageID", default="")
    names: list[str] | None = None
    labels: dict[str, str] | None = None


class Actor(Struct, frozen=True, rename="pascal"):
    """Whom an event is about; attributes are labels, name and image together."""

    attributes: dict[str, str] = {}


class Event(Struct, frozen=True):
    """One line of the event stream."""

    actor: Actor = msgspec.field(name="Actor", default=Actor())
    time_nano: int = msgspec.field(name="timeNano", default=0)


class Version(Struct, frozen=True, rename="pascal"):
    """Answer of the version call."""

    version: str
    api_version: str


class Info(Struct, frozen=True):
    """Answer of the info call."""

    id: str = msgspec.field(name="ID", default="")
    live_restore: bool | None = msgspec.field(name="LiveRestoreEnabled", default=None)


class ImageFacts(Struct, frozen=True, rename="pascal"):
    """Answer of an image inspect call."""

    os: str = ""
    architecture: str = ""


class PullError(Struct, frozen=True):
    """The reason inside a failed pull's progress line."""

    message: str = ""


class PullLine(Struct, frozen=True):
    """One line of a pull's progress; a failure arrives as a line of a 200 answer."""

    error: str = ""
    detail: PullError | None = msgspec.field(name="errorDetail", default=None)

    @property
    def failure(self) -> str:
        """Why the pull failed; empty while it does not."""
        return (self.detail.message if self.detail else "") or self.error


def power(status: str) -> Power:
    """What a state's word means. An unknown word is taken as running: it is there and not known to have ended."""
    return POWERS.get(status, Power.RUNNING)


def observed(seen: Inspected, sandbox_id: UUID, *, adopted: bool = False) -> Observed:
    """What one look at one object says."""
    now = power(seen.state.status)
    return Observed(
        sandbox_id=sandbox_id,
        runtime_id=seen.id,
        name=container_name(sandbox_id),
        power=now,
        generation=generation_of(seen.labels),
        image_digest=seen.image or None,
        created_at=_moment(seen.created),
        started_at=_moment(seen.state.started_at),
        exit=_exit(seen.state) if now is Power.EXITED else None,
        adopted=adopted,
    )


def listed(row: Listed, installation: UUID) -> Observed | None:
    """One row of the inventory; None = a stranger's."""
    labels = row.labels or {}
    sandbox_id = sandbox_of(labels, row.names or (), installation)
    if sandbox_id is None:
        return None
    return Observed(
        sandbox_id=sandbox_id,
        runtime_id=row.id,
        name=container_name(sandbox_id),
        power=power(row.state),
        generation=generation_of(labels),
        image_digest=row.image_id or None,
        created_at=datetime.fromtimestamp(row.created, UTC),
    )


def _exit(state: State) -> Exit:
    # The end is noted as it happens, the start only when the engine has heard of it: a short life may seem to end
    # before it began.
    at = max(state.started_at, state.finished_at)
    return Exit(state.exit_code, state.oom_killed, state.error, _moment(at))


def _moment(value: datetime) -> datetime | None:
    """The engine says "never" as the year 1."""
    return value.astimezone(UTC) if value.year > 1 else None
