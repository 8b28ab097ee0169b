"""decide(snapshot, command, now) -> events. Refusals are `Rejected`; nothing new is the empty tuple."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TypeAlias
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox.deadlines import Due, Limits
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.snapshot import events as ev
from app.domain.snapshot.state import Snapshot, SnapshotState
from app.domain.text import storable
from app.errors import Conflict, NotFound

Events: TypeAlias = tuple[ev.Event, ...]
COMMIT = "commit"
"""The deadline of a snapshot: it exists while the snapshot is Creating."""
MAX_CREATING = 8
"""Snapshots of one sandbox that may be Creating at once. They take turns, and it stands still for each of them."""
_SHOWN_USERS = 20


class RecordCommitted(Struct, frozen=True):
    """The files are in an image, and the source was at rest all the time."""

    raw_id: str
    layer: str
    frozen_ms: int = 0


class RecordReady(Struct, frozen=True):
    """The image that sandboxes are made from is there, and nothing else of the snapshot is."""

    image_id: str
    size_bytes: int = 0


class RecordFailed(Struct, frozen=True):
    """Record that it cannot be made. This is final."""

    reason: str
    message: str


class EndCommit(Struct, frozen=True):
    """The deadline `commit` fired; does nothing before its time."""

    limits: Limits = Limits()
    last_reason: str | None = None
    """Why the last attempt failed, as the queue knows it."""
    last_error: str | None = None


class RecordArtifact(Struct, frozen=True):
    """Whether the engine has the image of a Ready snapshot."""

    present: bool


class Delete(Struct, frozen=True):
    """Delete the snapshot. `users`: sandboxes of its tenant that are made from it and have not ended."""

    users: tuple[UUID, ...] = ()


class RecordRemoved(Struct, frozen=True):
    """Nothing of it is left on the engine."""


Command: TypeAlias = RecordCommitted | RecordReady | RecordFailed | EndCommit | RecordArtifact | Delete | RecordRemoved


def unknown(snapshot_id: object) -> NotFound:
    """The refusal of an id that this tenant never had, or has no more."""
    return NotFound("SNAPSHOT::NOT_FOUND", f"Snapshot {snapshot_id} does not exist.")


def visible(snapshot: Snapshot | None, snapshot_id: object) -> Snapshot:
    """The snapshot, unless it never was or was removed.

    Raises:
        NotFound: it is not there.
    """
    if snapshot is None or snapshot.state is SnapshotState.REMOVED:
        raise unknown(snapshot_id)
    return snapshot


def begin(source: Sandbox, name: str | None, creating: int = 0) -> Events:
    """The first event of a snapshot of this sandbox, of which so many are `creating` already.

    Raises:
        Conflict: it is not Running, or there are too many.
    """
    if source.phase is not Phase.RUNNING or source.engine is None:
        raise Conflict(
            "SNAPSHOT::INVALID_SOURCE_STATE",
            f"Sandbox is {source.phase}; a snapshot can be made of a Running sandbox only.",
        )
    if creating >= MAX_CREATING:
        raise Conflict(
            "SNAPSHOT::TOO_MANY",
            f"{creating} snapshots of this sandbox are Creating, and more are not taken meanwhile; try again when one "
            "is Ready.",
        )
    return (ev.Requested(source.id, source.engine, name, source.generation, source.run),)


def restorable(snapshot: Snapshot) -> str:
    """The id of the image that a sandbox is made from.

    Raises:
        Conflict: it is not Ready, or its image is missing.
    """
    if snapshot.state is not SnapshotState.READY:
        raise Conflict(
            "SNAPSHOT::NOT_READY", f"Snapshot {snapshot.id} is {snapshot.state}; sandboxes are made from Ready ones."
        )
    if snapshot.image_id is None or snapshot.is_missing:
        raise Conflict(
            "SNAPSHOT::INVALID_RESTORE_CONFIG",
            f"Snapshot {snapshot.id} cannot be used: engine {snapshot.engine} does not have its image any more.",
        )
    return snapshot.image_id


def decide(snapshot: Snapshot, command: Command, now: datetime) -> Events:
    """The events that the command leads to."""
    creating = snapshot.state is SnapshotState.CREATING
    match command:
        case RecordCommitted(raw_id=raw_id, layer=layer, frozen_ms=frozen_ms):
            new = creating and snapshot.raw_id is None
            return (ev.Committed(raw_id, layer, frozen_ms),) if new else ()
        case RecordReady(image_id=image_id, size_bytes=size_bytes):
            known = creating and snapshot.raw_id is not None
            return (ev.Ready(image_id, size_bytes, snapshot.frozen_ms or 0),) if known else ()
        case RecordFailed(reason=reason, message=message):
            return (ev.Failed(reason, storable(message)),) if creating else ()
        case EndCommit():
            return _end_commit(snapshot, command, now)
        case RecordArtifact(present=present):
            if snapshot.state is not SnapshotState.READY or present is not snapshot.is_missing:
                return ()
            return (ev.ArtifactFound() if present else ev.ArtifactMissing(),)
        case Delete(users=users):
            return _delete(visible(snapshot, snapshot.id), users)
        case RecordRemoved():
            return (ev.Removed(),) if snapshot.state is SnapshotState.DELETING else ()


def _end_commit(snapshot: Snapshot, command: EndCommit, now: datetime) -> Events:
    limit = command.limits.commit_s
    if snapshot.state is not SnapshotState.CREATING or now < snapshot.created_at + timedelta(seconds=limit):
        return ()
    why = command.last_error or command.last_reason
    last = "" if why is None else f" The last attempt failed: {why}"
    return (ev.Failed("snapshot_runtime_timeout", storable(f"The snapshot was not ready within {limit:.0f} s.{last}")),)


def _delete(snapshot: Snapshot, users: Sequence[UUID]) -> Events:
    if snapshot.state is SnapshotState.CREATING:
        raise Conflict("SNAPSHOT::INVALID_STATE", f"Snapshot {snapshot.id} is being created; delete it when it is not.")
    if snapshot.state is SnapshotState.DELETING:
        return ()
    if users:
        shown = ", ".join(map(str, users[:_SHOWN_USERS]))
        more = f" and {len(users) - _SHOWN_USERS} more" if len(users) > _SHOWN_USERS else ""
        raise Conflict(
            "SNAPSHOT::DELETE_CONFLICT", f"Sandboxes that were made from this snapshot still use it: {shown}{more}."
        )
    return (ev.DeleteRequested(),)


def changes(before: Snapshot | None, after: Snapshot, limits: Limits) -> Mapping[str, Due | None]:
    """What an append does to the deadline, as `app.domain.sandbox.deadlines.changes` says it."""
    if before is None:
        return {COMMIT: Due(after_s=limits.commit_s)}
    ended = before.state is SnapshotState.CREATING and after.state is not SnapshotState.CREATING
    return {COMMIT: None} if ended else {}
