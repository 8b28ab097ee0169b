"""What the write path of every aggregate shares: number the events, fold them, append them, settle what the database
decided.

An event gets its position and its final time from the append. Until then it is provisional: position 0, and the time
of the load. What depends on time is computed in the statement from its own clock; the state that is answered is folded
again from the settled events, and equals the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Generic, TypeVar
from uuid import UUID

from msgspec import Struct

from app.domain.stream import Meta, Recorded, Registry, read_meta
from app.errors import SandledgerError, UnknownEvent
from app.store.log.append import Written
from app.store.log.store import StoredEvent

S = TypeVar("S")
E = TypeVar("E")
UNSET = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
"""The time of events that are decided without a load."""


class StaleVersion(SandledgerError):
    """The stream has a newer event. Read it again before you decide."""


class Draft(Struct, Generic[E], frozen=True):
    """Events that are about to be appended."""

    stream_id: UUID
    tenant: str
    after: int
    events: tuple[E, ...]
    meta: Meta
    now: datetime = UNSET

    def recorded(self, written: Written | None = None) -> list[Recorded[E]]:
        """As they will stand, or stand, in the log."""
        position, at = (0, self.now) if written is None else (written.position, written.at)
        return [
            Recorded(position, self.stream_id, self.tenant, version, at, event, self.meta)
            for version, event in enumerate(self.events, self.after + 1)
        ]


def advance(
    evolve: Callable[[S | None, Recorded[E]], S],
    before: S | None,
    recorded: Sequence[Recorded[E]],
    check: Callable[[S, E], None] | None = None,
) -> S:
    """Fold. With `check`, each event is first compared with the state that it meets."""
    state = before
    for one in recorded:
        if check is not None and state is not None:
            check(state, one.event)
        state = evolve(state, one)
    assert state is not None, "an append has at least one event"
    return state


def decoded(registry: Registry[E], stored: StoredEvent) -> Recorded[E]:
    """Decode a row of the log.

    Raises:
        UnknownEvent: a newer version wrote it.
    """
    event = registry.decode(stored.type, stored.schema, stored.data)
    meta = read_meta(stored.meta)
    return Recorded(
        stored.position,
        stored.stream_id,
        stored.tenant,
        stored.version,
        stored.recorded_at,
        event,
        meta,
        stored.schema,
    )


def refuse_newer(kind: str, stream_id: UUID, schema: int, registry: Registry[E]) -> None:
    """This version must not append to a stream that a newer version has written to.

    Raises:
        UnknownEvent: says what to do.
    """
    if schema > registry.revision:
        raise UnknownEvent(
            f"{kind} {stream_id} was written by a newer version (schema {schema}, this server reads up to "
            f"{registry.revision}). Upgrade this server, or call one that runs the newer version."
        )
