"""What happened to a snapshot (catalogue, part 4).

Two fields are additions to the catalogue: `frozen_ms` of `committed`, which `ready` repeats, and `run` of `requested`
says which run of the source was meant. Reasons are the contract's lower-case words, and a few of ours in their style.
"""

from __future__ import annotations

from typing import TypeAlias, get_args
from uuid import UUID

from msgspec import Struct

from app.domain import stream


class Requested(Struct, frozen=True, omit_defaults=True):
    """It was accepted. The image will be made on the engine of its source, where it stays."""

    sandbox_id: UUID
    engine: str
    name: str | None = None
    generation: int = 1
    """Which object of the source."""
    run: int = 1
    """Which run of the source."""


class Committed(Struct, frozen=True, omit_defaults=True):
    """The files are in an image, and they were at rest from its beginning to its end.

    `raw_id` is that image. It also holds what the source was made with, its environment among it, and is not used.
    """

    raw_id: str
    layer: str
    """The topmost layer: what the sandbox had written."""
    frozen_ms: int = 0
    """How long the source had been frozen by then. 0 = it did not run any more."""


class Ready(Struct, frozen=True, omit_defaults=True):
    """Sandboxes can be made from it. `image_id` has the same layers and nothing of the source but its files."""

    image_id: str
    size_bytes: int = 0
    frozen_ms: int = 0


class Failed(Struct, frozen=True, omit_defaults=True):
    """It cannot be made. Final; what is left of it on the engine is removed."""

    reason: str
    message: str = ""


class ArtifactMissing(Struct, frozen=True):
    """The engine does not have the image any more."""


class ArtifactFound(Struct, frozen=True):
    """The engine has the image again."""


class DeleteRequested(Struct, frozen=True):
    """An actor asked to delete it. No sandbox can be made from it any more."""


class Removed(Struct, frozen=True):
    """Nothing of it is left on the engine. From here on it has ended for clients."""


Event: TypeAlias = Requested | Committed | Ready | Failed | ArtifactMissing | ArtifactFound | DeleteRequested | Removed
Recorded: TypeAlias = stream.Recorded[Event]

REGISTRY: stream.Registry[Event] = stream.Registry(
    "snapshot",
    {
        "snapshot.requested": Requested,
        "snapshot.committed": Committed,
        "snapshot.ready": Ready,
        "snapshot.failed": Failed,
        "snapshot.artifact_missing": ArtifactMissing,
        "snapshot.artifact_found": ArtifactFound,
        "snapshot.delete_requested": DeleteRequested,
        "snapshot.removed": Removed,
    },
)
EVENT_CLASSES: tuple[type[Event], ...] = get_args(Event)
