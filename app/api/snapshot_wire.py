"""Snapshots on the wire (contract 1.19). `snapshot_body` is the only place where a state becomes a body."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from app.api.sandbox_wire import Instant, Pagination
from app.domain.snapshot.state import Snapshot
from app.domain.text import printable

_CREATED = datetime(2026, 1, 31, 12, tzinfo=UTC)


class CreateSnapshot(Struct, frozen=True, rename="camel", omit_defaults=True):
    """What to call it."""

    name: Annotated[str, Meta(min_length=1, max_length=1024, description="For people; need not be unique.")] | None = (
        None
    )

    @classmethod
    def example(cls) -> CreateSnapshot:
        """For the document."""
        return cls("after the install")


class SnapshotStatusBody(Struct, frozen=True, rename="camel"):
    """One of Creating, Ready, Failed, Deleting; and why."""

    state: str
    reason: str
    message: str
    last_transition_at: Instant

    @classmethod
    def example(cls) -> SnapshotStatusBody:
        """For the document."""
        return cls("Ready", "snapshot_runtime_ready", "Snapshot is ready.", _CREATED)


class SnapshotBody(Struct, frozen=True, rename="camel"):
    """A snapshot."""

    id: str
    sandbox_id: str
    status: SnapshotStatusBody
    created_at: Instant
    name: str | UnsetType = UNSET

    @classmethod
    def example(cls) -> SnapshotBody:
        """For the document."""
        return cls(
            "0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5c",
            "0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b",
            SnapshotStatusBody.example(),
            _CREATED,
            "after the install",
        )


class SnapshotList(Struct, frozen=True, rename="camel"):
    """A page, newest first."""

    items: tuple[SnapshotBody, ...]
    pagination: Pagination


def snapshot_body(snapshot: Snapshot, trouble: str | None = None) -> SnapshotBody:
    """As clients see it. The message may repeat what an engine said. `trouble`: why the last attempt failed."""
    message = snapshot.message if trouble is None else f"{snapshot.message} The last attempt failed: {trouble}"
    status = SnapshotStatusBody(snapshot.state.value, snapshot.reason, printable(message), snapshot.changed_at)
    name = UNSET if snapshot.name is None else snapshot.name
    return SnapshotBody(str(snapshot.id), str(snapshot.sandbox_id), status, snapshot.created_at, name)
