"""plan(snapshot, source, found) -> the one next step of the snapshot's reconciler.

The source has a stream and a reconciler of its own, which alone pauses and resumes its container. So this plan asks the
source to freeze and to thaw, and waits for what the source's stream says. While the source is frozen, every commit has
the same content, so a commit may be repeated after any crash. The commit itself, and the look at the source after it,
are one step: an image whose making was not watched to its end is made again.

**The source is thawed whatever happens.** As long as the source says that this snapshot froze it, the first step after
the commit, after a failure and after a delete is `Thaw`. A snapshot whose row was lost cannot do that; the deadline
`freeze` of the source can.
"""

from __future__ import annotations

from typing import TypeAlias
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox.state import RuntimeState, Sandbox
from app.domain.snapshot.state import Snapshot, SnapshotState

MAX_ATTEMPTS = 3
"""How often a source is asked to freeze. Failures of a commit count like such a question."""
SOURCE_FREEZING = "SOURCE_FREEZING"
"""The reason in the queue of a snapshot that has asked its source to freeze. It is no failure."""
DONE, FAILED = "DONE", "FAILED"
"""Why a source may go on."""


class Found(Struct, frozen=True):
    """What the engine has of one snapshot."""

    image_id: str | None = None
    """The image that sandboxes are made from."""
    raw: tuple[str, ...] = ()
    """Images of commits, which hold the source's environment. None may stay."""


class Freeze(Struct, frozen=True):
    """Ask the source to stand still."""


class Commit(Struct, frozen=True):
    """Make an image of the source's files, and see that the source was at rest all the time."""


class Thaw(Struct, frozen=True):
    """Let the source go on."""

    reason: str


class Clean(Struct, frozen=True):
    """Make the image that sandboxes are made from: the same layers, and nothing of the source but its files."""


class Look(Struct, frozen=True):
    """Ask the engine what it has of the snapshot."""


class DropImages(Struct, frozen=True):
    """Remove images of the snapshot. It is no error when there is none."""

    raw_only: bool = False


class Fail(Struct, frozen=True):
    """It cannot be made."""

    reason: str
    message: str


class AwaitSource(Struct, frozen=True):
    """The source is about to change; it wakes this stream, or a few seconds do."""


class Settled(Struct, frozen=True):
    """Nothing to do until something changes."""


Step: TypeAlias = Freeze | Commit | Thaw | Clean | Look | DropImages | Fail | AwaitSource | Settled

STEP_NAMES: dict[type[Step], str] = {
    Freeze: "check_source",
    Commit: "commit",
    Thaw: "check_source",
    Clean: "clean",
    Look: "drop_image",
    DropImages: "drop_image",
}
"""The word of a step on the wire."""


def plan(snapshot: Snapshot, source: Sandbox | None, found: Found | None, attempts: int = 0) -> Step:
    """The next step towards what is desired. `attempts`: freezes asked for, and failures of commits."""
    held = _held(snapshot.id, source)
    match snapshot.state:
        case SnapshotState.CREATING if snapshot.raw_id is not None:
            return Thaw(DONE) if held else Clean()
        case SnapshotState.CREATING:
            return _commit(snapshot, source, attempts)
        case SnapshotState.READY:
            if held:
                return Thaw(DONE)
            if found is None:
                return Look()
            return DropImages(raw_only=True) if found.raw else Settled()
        case SnapshotState.FAILED | SnapshotState.DELETING | SnapshotState.REMOVED:
            if held:
                return Thaw(FAILED)
            if snapshot.state is SnapshotState.DELETING:
                return DropImages()
            if found is None:
                return Look()
            return DropImages() if found.raw or found.image_id is not None else Settled()


def _held(snapshot_id: UUID, source: Sandbox | None) -> bool:
    """The source is frozen for this snapshot, or about to be, and nothing has asked it to go on."""
    freeze = None if source is None else source.frozen_by
    return freeze is not None and freeze.snapshot_id == snapshot_id and freeze.thaw is None


def _commit(snapshot: Snapshot, source: Sandbox | None, attempts: int) -> Step:
    if source is None or source.observed in (RuntimeState.LOST, RuntimeState.REMOVED) or source.closed_at is not None:
        return Fail("snapshot_source_removed", "The source sandbox was removed before its files were copied.")
    if source.failure is not None or source.generation != snapshot.generation:
        return Fail("snapshot_source_ended", "The source sandbox ended before its files were copied.")
    if attempts > MAX_ATTEMPTS or (attempts == MAX_ATTEMPTS and source.may_freeze):
        return Fail("snapshot_runtime_failed", f"The files could not be copied in {MAX_ATTEMPTS} attempts.")
    if source.observed is RuntimeState.EXITED and source.ending is None:
        return Commit()  # nothing writes to its files any more
    freeze = source.frozen_by
    if freeze is None:
        if source.ending is not None:
            return Fail("snapshot_source_removed", "The source sandbox was deleted before its files were copied.")
        return Freeze() if source.may_freeze else AwaitSource()
    if freeze.snapshot_id != snapshot.id or freeze.thaw is not None or freeze.run is None:
        return AwaitSource()  # another snapshot has its turn; or this one's begins, or ends too soon
    return Commit()
