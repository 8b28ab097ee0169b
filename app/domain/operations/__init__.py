"""Acts of administrators that have no subject of their own: one stream, whose id is the installation's.

Its state is its place in the log and nothing else.
"""

from __future__ import annotations

from typing import TypeAlias, get_args
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from app.domain import stream


class MasterKeyRotated(Struct, frozen=True):
    """Every data key was wrapped by another master key."""

    old_key_id: str
    new_key_id: str
    rewrapped: int


Event: TypeAlias = MasterKeyRotated
Recorded: TypeAlias = stream.Recorded[Event]
REGISTRY: stream.Registry[Event] = stream.Registry("operations", {"operations.master_key_rotated": MasterKeyRotated})
EVENT_CLASSES: tuple[type[Event], ...] = get_args(Event) or (MasterKeyRotated,)


class Operations(Struct, frozen=True):
    """How far the stream has come."""

    id: UUID
    tenant: str
    version: int
    position: int
    schema: int


def evolve(operations: Operations | None, recorded: Recorded) -> Operations:
    """The stream's place in the log after this event. None = before its first event."""
    schema = REGISTRY.schema_of(recorded)
    if operations is None:
        return Operations(recorded.stream_id, recorded.tenant, recorded.version, recorded.position, schema)
    return replace(
        operations,
        version=recorded.version,
        position=recorded.position,
        schema=max(operations.schema, schema),
    )
