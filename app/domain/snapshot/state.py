"""The state of a snapshot: the fold of its events.

========== ====================================== ==============================
state      means                                  what clients read
========== ====================================== ==============================
`Creating` its image is being made                Creating; cannot be deleted
`Ready`    sandboxes can be made from it          Ready
`Failed`   it could not be made                   Failed, with the reason
`Deleting` its image is being removed             Deleting
`Removed`  nothing of it is left on the engine    404
========== ====================================== ==============================

A Ready snapshot whose image was removed behind our back stays Ready, with the reason `snapshot_runtime_missing_image`,
because the image may be put back. No sandbox can be made from it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from app.domain.snapshot import events as ev


class SnapshotState(StrEnum):
    """The public states of the contract (2.6), and the end."""

    CREATING = "Creating"
    READY = "Ready"
    FAILED = "Failed"
    DELETING = "Deleting"
    REMOVED = "Removed"


ACCEPTED, READY, MISSING = "snapshot_accepted", "snapshot_runtime_ready", "snapshot_runtime_missing_image"
DELETE_REQUESTED, REMOVED = "snapshot_delete_requested", "snapshot_removed"


class Snapshot(Struct, frozen=True):
    """One snapshot. Immutable; `evolve` makes the next one."""

    id: UUID
    tenant: str
    version: int
    position: int
    """Position of its last event."""
    schema: int
    sandbox_id: UUID
    engine: str
    generation: int
    """Of the source, when it was asked for."""
    run: int
    created_at: datetime
    changed_at: datetime
    """When the state last changed."""
    since_position: int = 0
    """A position below all of its events. It says which part of the log led to its image."""
    name: str | None = None
    state: SnapshotState = SnapshotState.CREATING
    reason: str = ACCEPTED
    message: str = "Snapshot creation accepted."
    raw_id: str | None = None
    """The image of the commit. None = there is no whole one yet."""
    image_id: str | None = None
    size_bytes: int | None = None
    frozen_ms: int | None = None
    removed_at: datetime | None = None

    @property
    def is_missing(self) -> bool:
        """The image was there, and the engine does not have it any more."""
        return self.state is SnapshotState.READY and self.reason == MISSING


def evolve(snapshot: Snapshot | None, recorded: ev.Recorded) -> Snapshot:
    """The next state. Total on known events."""
    if snapshot is None:
        if not isinstance(recorded.event, ev.Requested):
            msg = f"stream {recorded.stream_id} does not begin with snapshot.requested"
            raise TypeError(msg)
        return _begin(recorded, recorded.event)
    after = replace(
        _apply(snapshot, recorded),
        version=recorded.version,
        position=recorded.position,
        schema=max(snapshot.schema, ev.REGISTRY.schema_of(recorded)),
    )
    return after if after.state is snapshot.state else replace(after, changed_at=recorded.at)


def fold(history: Iterable[ev.Recorded], start: Snapshot | None = None) -> Snapshot | None:
    """The state after a history."""
    snapshot = start
    for recorded in history:
        snapshot = evolve(snapshot, recorded)
    return snapshot


def _begin(recorded: ev.Recorded, event: ev.Requested) -> Snapshot:
    return Snapshot(
        id=recorded.stream_id,
        tenant=recorded.tenant,
        version=recorded.version,
        position=recorded.position,
        schema=ev.REGISTRY.schema_of(recorded),
        sandbox_id=event.sandbox_id,
        engine=event.engine,
        generation=event.generation,
        run=event.run,
        created_at=recorded.at,
        changed_at=recorded.at,
        since_position=recorded.position - 1,
        name=event.name,
    )


def _apply(snapshot: Snapshot, recorded: ev.Recorded) -> Snapshot:
    match recorded.event:
        case ev.Committed(raw_id=raw_id, frozen_ms=frozen_ms):
            return replace(snapshot, raw_id=raw_id, frozen_ms=frozen_ms)
        case ev.Ready(image_id=image_id, size_bytes=size_bytes):
            return replace(
                snapshot,
                state=SnapshotState.READY,
                reason=READY,
                message="Snapshot is ready.",
                image_id=image_id,
                size_bytes=size_bytes,
            )
        case ev.Failed(reason=reason, message=message):
            return replace(snapshot, state=SnapshotState.FAILED, reason=reason, message=message)
        case ev.ArtifactMissing():
            message = "The engine does not have the image of this snapshot any more."
            return replace(snapshot, reason=MISSING, message=message)
        case ev.ArtifactFound():
            return replace(snapshot, reason=READY, message="Snapshot is ready.")
        case ev.DeleteRequested():
            message = "The image of this snapshot is being removed."
            return replace(snapshot, state=SnapshotState.DELETING, reason=DELETE_REQUESTED, message=message)
        case ev.Removed():
            message = "Snapshot was deleted."
            return replace(
                snapshot, state=SnapshotState.REMOVED, reason=REMOVED, message=message, removed_at=recorded.at
            )
        case ev.Requested():
            return snapshot
