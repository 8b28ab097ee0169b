"""The seam between reconcilers and engines.

A driver holds no state about sandboxes. It is given a `Workload`, makes it true and says what it saw as `Observed`.
Verbs name an object by its `Ref`. Every verb may be called again after a crash at any point, from another process, with
the same result:

* the name of every part is derived from the object id, so a repeated create meets the first one and adopts it;
* `remove` of something absent succeeds;
* only objects that bear our installation label are ever touched.

No verb but `fetch`, `install_agent` and `commit` may take long: `ensure` never pulls, and answers what it saw instead
of waiting for it.

Failures: `RuntimeUnavailable` when the engine cannot be reached or is failing (says nothing about the sandbox),
`RuntimeRejected` when its answer is final for this request, `AttemptFailed` when this attempt failed and another may
work, `ImageMissing` when `ensure` needs a `fetch` first, `AgentMissing` when it needs an `install_agent` first,
`NetworkMissing` when it needs a `prepare_network` first.
Anything else that escapes is a bug and is counted.

Cancellation: once `ensure` has begun to create, it finishes create and start before it lets the cancellation through,
so that no caller concludes "absent" while a create is still under way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import datetime
from enum import StrEnum
from typing import Protocol, TypeAlias
from uuid import UUID

from msgspec import Struct

from app.domain.engine.events import Capacity
from app.domain.sandbox.diagnostics import Inspection, Logs
from app.domain.sandbox.observed import Capabilities, Exit, Observed, Part, Pausing, Power, Ref
from app.runtime.workload import Image, Limits, RegistryAuth, Workload

__all__ = [
    "Artifact",
    "Capabilities",
    "Change",
    "CommittedImage",
    "Driver",
    "EngineInfo",
    "Exit",
    "FetchedImage",
    "Hint",
    "Image",
    "Inspection",
    "InstalledAgent",
    "Leftover",
    "Limits",
    "Logs",
    "Misnamed",
    "Observed",
    "OwnNetwork",
    "Part",
    "Pausing",
    "Power",
    "Progress",
    "Ref",
    "RegistryAuth",
    "SnapshotImage",
    "Workload",
]

Progress: TypeAlias = Callable[[str], None]
"""Called with the progress of a fetch as a text for people, e.g. `3 of 7 layers, 41.2 of 120.0 MB`."""


class EngineInfo(Struct, frozen=True):
    """The identity of the engine."""

    kind: str
    """The kind of engine, `docker` or `fake`."""
    version: str
    api: str
    engine_id: str
    address: str
    mark: str | None
    """What `prepare` left there for this installation. None = it is not there."""
    capabilities: Capabilities = Capabilities()
    capacity: Capacity = Capacity()
    live_restore: bool | None = None
    """Whether sandboxes outlive a restart of the engine. None = the engine does not say."""
    name_taken: str | None = None
    """The name of something that is not ours and has the place of the mark, so that none can be made."""


class FetchedImage(Struct, frozen=True):
    """An image on the engine."""

    image_id: str
    """The engine's own id of it."""
    image_digest: str | None = None
    """The digest that its registry knows it by. None: it came from no registry."""
    size_bytes: int | None = None


class Artifact(Struct, frozen=True):
    """What a driver needs to know of a snapshot to name, label and date its images."""

    snapshot_id: UUID
    tenant: str
    position: int
    """Log position that led to it; a label of its images."""
    made_at: datetime
    """The date of the image; part of what its id is computed from."""


class CommittedImage(Struct, frozen=True):
    """An image of an object's files. It also holds what the object was made with, so it must not stay."""

    image_id: str
    layer: str
    """The topmost layer."""


class SnapshotImage(Struct, frozen=True):
    """An image of a snapshot on the engine."""

    snapshot_id: UUID
    image_id: str
    raw: bool
    """It was made by `commit`, and is not for use."""
    size_bytes: int | None = None
    made_at: datetime | None = None
    position: int | None = None


class InstalledAgent(Struct, frozen=True):
    """The files of an agent on the engine, complete."""

    image_id: str
    volume: str
    """What `Workload.agent` names."""
    files: tuple[str, ...]
    size_bytes: int
    helper: str
    """The engine's own id of what copied them. Another copy has another one."""
    made: bool
    """This call had them copied. False = they were there. Two calls at the same time may both say True."""


class OwnNetwork(Struct, frozen=True):
    """Our own network on the engine. A container gets an address of it that was leased before."""

    name: str
    subnet: str
    """In CIDR form; `app.domain.sandbox.address.leasable` says which addresses of it are leased."""
    network_id: str
    """The engine's own id of it. A network that was made again has another one."""


class Leftover(Struct, frozen=True):
    """Something of ours on the engine that is part of no whole object: e.g. an object without its part `main`."""

    role: str
    name: str
    runtime_id: str
    object_id: UUID | None = None
    made_at: datetime | None = None
    position: int | None = None


class Change(StrEnum):
    """What a hint says of a part."""

    PAUSED = "paused"
    RESUMED = "resumed"
    REMOVED = "removed"
    OTHER = "other"


class Hint(Struct, frozen=True):
    """A part of an object changed."""

    object_id: UUID
    runtime_id: str
    """The engine's own id of the part; never used for another one."""
    change: Change = Change.OTHER
    at: datetime | None = None
    """By the engine's clock. None = the engine did not say."""


class Misnamed(Struct, frozen=True):
    """A container with the labels of an object of ours and another name: somebody renamed ours, or made a copy of it.

    Only who knows the engine's ids of our objects can tell the two apart. Its labels are no reason to remove it.
    """

    observed: Observed


class Driver(Protocol):
    """One engine, as the rest of the program knows it. `app.runtime.faults` says what the verbs raise."""

    name: str
    """The engine's name in the log, e.g. `default`."""
    kind: str
    can: Capabilities

    async def ensure(self, workload: Workload) -> Observed:
        """Create or adopt, and start. Never pulls.

        An object that has already exited is returned as it is, never started a second time; one that is paused is
        returned paused. One that is not up yet is returned with power `CREATED` and the reason in `waiting`. `gpus` is
        what the engine gave; of "all" it is the number only if the engine says it.

        Raises:
            ImageMissing: the engine does not have the image.
            AgentMissing: the volume of `Workload.agent` does not hold the agent: `install_agent` makes it again.
            AddressTaken: something else has the address `Workload.ip`.
            NetworkMissing: our own network is gone: `prepare_network` makes it again.
            AttemptFailed: e.g. `PORTS_EXHAUSTED`, there is no free port to publish the agent on.
            RuntimeRejected: final, e.g. `NAME_TAKEN` when a stranger's object has the name.
        """
        ...

    async def observe(self, ref: Ref) -> Observed | None:
        """Inspect one object. None = the engine answered that it has none of ours."""
        ...

    async def set_power(self, ref: Ref, power: Power) -> Observed | None:
        """Make it `PAUSED` or `RUNNING`; already so is success. None when there is no such object.

        An exited object is returned as it is: the caller reads `power`.

        Raises:
            RuntimeRejected: the engine will not do it, now or later.
            AttemptFailed: the engine answered and did not do it.
        """
        ...

    async def remove(self, ref: Ref) -> bool:
        """Kill and remove all parts. True = nothing of it is left; False = asked, and it is not gone yet.

        Absent is True. A stranger's object is left alone.
        """
        ...

    def inventory(self) -> AsyncIterator[Observed | Leftover | Misnamed]:
        """Everything that bears our installation label, by object. Raises rather than ends early."""
        ...

    async def remove_leftover(self, leftover: Leftover) -> None:
        """Take away what `inventory` showed as a leftover. Absent is success."""
        ...

    def hints(self) -> AsyncIterator[Hint | None]:
        """Objects that may have changed, for ever, reconnecting by itself. Lossy by contract: what an object does now
        is only known from `observe`. The hints of one part come in the order of their times, some of them twice.

        None = the stream broke and began again (an engine that restarts loses its events): inspect everything.
        """
        ...

    async def fetch(self, image: Image, progress: Progress) -> FetchedImage:
        """Bring the image to the engine, however long it takes up to the operator's limit. May be cancelled.

        Several calls for one image share one pull.

        Raises:
            RuntimeRejected: final, e.g. `IMAGE_NOT_FOUND`.
            AttemptFailed: it may work later, e.g. `REGISTRY_RATE_LIMITED`.
        """
        ...

    async def image(self, reference: str) -> FetchedImage | None:
        """Inspect an image on the engine. None = it is not there."""
        ...

    async def commit(self, ref: Ref, artifact: Artifact) -> CommittedImage:
        """Make an image of the object's files, without pausing it. May take minutes; a cancellation does not end it.

        The caller sees to it that nothing writes to the files meanwhile.

        Raises:
            AttemptFailed: `COMMIT_FAILED`, e.g. there is no such object.
        """
        ...

    async def clean(self, artifact: Artifact, raw_id: str, source_image: str) -> SnapshotImage:
        """Make the image that sandboxes are made from: the layers of `raw_id` with the configuration of the image that
        the source was made from. It depends on nothing else, so its id is the same however often this is done.

        Raises:
            AttemptFailed: `CLEAN_FAILED`.
            RuntimeRejected: `SNAPSHOT_IMAGE_MISSING`, one of the two images is not there.
        """
        ...

    async def snapshot_images(self, snapshot_id: UUID | None = None) -> list[SnapshotImage]:
        """The images of one snapshot of this installation, or of all, those without a name too."""
        ...

    async def drop_image(self, image_id: str) -> None:
        """Remove an image that `snapshot_images` showed. Absent is success; never by force.

        Raises:
            AttemptFailed: `IMAGE_IN_USE`.
        """
        ...

    async def install_agent(self, image: str) -> InstalledAgent:
        """Copy the agent's files out of an image into a volume, once for each image id; a moved tag is another one.

        Raises:
            ImageMissing: the engine does not have the image. `fetch` brings it, as any other.
            AttemptFailed: `AGENT_IMAGE_INCOMPLETE`, the image lacks a file that is needed; `AGENT_INSTALLING`, another
                process copies at this moment.
            RuntimeRejected: `NAME_TAKEN`, a stranger's volume or container has the name.
        """
        ...

    async def clean_agents(self, keep: str, before: datetime) -> tuple[str, ...]:
        """Remove the files of other agent images than `keep`, an image id, that no sandbox mounts and that were copied
        before that time, by the engine's clock. The names of what this call removed.
        """
        ...

    async def prepare_network(self) -> OwnNetwork | None:
        """Our own network, made unless it is there. None = sandboxes stand on another one, so no address is leased.

        Raises:
            AttemptFailed: `START_FAILED`, e.g. a stranger's network has the name, or no configured subnet is free.
        """
        ...

    async def logs(self, ref: Ref, *, tail: int, most: int, since: datetime | None = None) -> Logs | None:
        """The last lines that the part `main` wrote, to both streams: `tail` of them and `most` bytes at most.

        Never reads a log whole. A line that is longer than `most` has lost its beginning. `tail` may count pieces of
        long lines. None = the engine has no such object of ours, or its log is gone.
        """
        ...

    async def inspect(self, ref: Ref) -> Inspection | None:
        """What the engine says of the part `main`, with the values of its environment in the clear. None = there is no
        such object of ours.
        """
        ...

    async def check(self) -> EngineInfo:
        """Ask the engine who it is. RuntimeUnavailable, with a message that says what to do, when it is not there."""
        ...

    async def prepare(self, mark: str | None = None) -> EngineInfo:
        """First contact: make our mark unless another worker has made it; then `check`.

        `mark` is the word to make it with, for an engine that has lost it; None = a new random one.
        """
        ...

    async def close(self) -> None:
        """Release connections. Running sandboxes are not touched."""
        ...
