"""Observations: what an engine said, in words that fit any engine. Plain values; the core plans on them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from msgspec import Struct


class Pausing(StrEnum):
    """What an engine can do for a pause."""

    NONE = "none"
    FREEZE = "freeze"
    """Memory and processes stay."""
    STOP = "stop"
    """Only the volumes stay."""


class Capabilities(Struct, frozen=True, omit_defaults=True):
    """What an engine can do; the rest is refused before anything is appended."""

    pause: str = Pausing.FREEZE
    """A `Pausing`, or a word of a newer version: compare with `==`, because what is read from the log is plain text."""
    snapshots: str = "load"
    """How images of snapshots are made: `load`, or `none`."""


class Power(StrEnum):
    """What an object of an engine does at the moment when it is observed."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    EXITED = "exited"


class Exit(Struct, frozen=True):
    """How a workload ended by itself."""

    code: int | None = None
    oom: bool = False
    message: str = ""
    at: datetime | None = None
    reason: str | None = None
    """Why, when it did not end by itself, e.g. `ENGINE_STOPPED`."""


class Ref(Struct, frozen=True):
    """An object of an engine, as verbs name it.

    `object_id` equals the sandbox id for a sandbox that was made for its request. `place` is a namespace, and empty on
    Docker. `runtime_id` is the engine's own id of the part `main`, once the log knows it: it finds an object whose name
    somebody changed.
    """

    object_id: UUID
    place: str = ""
    runtime_id: str | None = None


class Part(Struct, frozen=True, omit_defaults=True):
    """One of the things that make up an object: `main` runs the workload; other roles support it."""

    role: str
    runtime_id: str
    name: str


class Address(Struct, frozen=True, omit_defaults=True):
    """Where it can be reached."""

    network: str
    ip: str = ""
    ports: dict[str, str] = {}
    """Port in the sandbox -> published `host:port`."""


class Waiting(Struct, frozen=True, omit_defaults=True):
    """Why a step is not done yet. Not a failure."""

    step: str
    reason: str
    message: str = ""


class Verdict(Struct, frozen=True):
    """The engine's final word on a workload, when it came after `ensure` had returned."""

    reason: str
    message: str


class Observed(Struct, frozen=True):
    """What the engine said about one object, at one time."""

    object_id: UUID
    parts: tuple[Part, ...]
    power: Power
    """Of the part `main`."""
    generation: int = 1
    position: int | None = None
    """Log position that led to the object, from its label."""
    image_id: str | None = None
    image_digest: str | None = None
    created_at: datetime | None = None
    started_at: datetime | None = None
    exit: Exit | None = None
    adopted: bool = False
    """True when `ensure` met an object that an earlier attempt had created."""
    address: Address | None = None
    node: str | None = None
    waiting: Waiting | None = None
    verdict: Verdict | None = None
    agent: bool = False
    """An agent was put into it, which must answer before the sandbox is ready."""
    power_since: datetime | None = None
    """When the engine said that it was paused or resumed, which led to its present power. None: it did not say."""
    gpus: int | None = None
    """How many GPUs the object has got. None: it has none, or the engine does not say how many."""

    @property
    def main(self) -> Part | None:
        """The part that runs the workload. None: only other parts are left."""
        return next((part for part in self.parts if part.role == "main"), None)


class Answer(Struct, frozen=True):
    """The engine answered. `observed` None = it says that there is no such object of ours."""

    observed: Observed | None
