"""Objects on the engine that bear a position beyond the end of the log.

Every object is labelled with the position of the event that led to it. An object whose sandbox the log does not know,
and whose position the log has not reached, was made under a log that went on from here: this database is an older copy
of it, restored or cloned. Then nothing may be concluded about any object.

The order matters. The objects are read first, the end of the log afterwards, so that an object that is made meanwhile
never seems to lie beyond.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias
from uuid import UUID

from msgspec import Struct
from sqlalchemy import Uuid, and_, any_, bindparam, func, or_, select
from sqlalchemy.dialects.postgresql import ARRAY

from app.runtime.driver import Leftover, Observed
from app.store.database.statement import Connections, Statement
from app.store.log.store import EventLog
from app.store.tables import sandboxes

Found: TypeAlias = Observed | Leftover
_SANDBOXES = sandboxes.c
_IDS = bindparam("ids", type_=ARRAY(Uuid))
_KNOWN = Statement(
    select(func.coalesce(_SANDBOXES.object_id, _SANDBOXES.id).label("object_id")).where(
        # The index on object ids holds open sandboxes only. A closed one was made for its request: both ids are equal.
        or_(_SANDBOXES.id == any_(_IDS), and_(_SANDBOXES.object_id == any_(_IDS), _SANDBOXES.closed_at.is_(None)))
    )
)


class Beyond(Struct, frozen=True):
    """An object on the engine was made for a later position than the log has: the log went back."""

    last_position: int
    """The end of the log."""
    found_position: int
    """The highest position that an unknown object bears."""


async def beyond(connections: Connections, found: Iterable[Found]) -> Beyond | None:
    """Compare the positions of objects with the end of the log. None = they fit."""
    positions = [(one.position, one.object_id) for one in found if one.position is not None]
    last = (await EventLog(connections).identity()).last_position
    ahead = [(position, object_id) for position, object_id in positions if position > last]
    if not ahead:
        return None
    known = await known_objects(connections, [object_id for _, object_id in ahead if object_id is not None])
    unknown = [position for position, object_id in ahead if object_id not in known]
    return Beyond(last, max(unknown)) if unknown else None


async def known_objects(connections: Connections, ids: list[UUID]) -> set[UUID]:
    """Those of these objects that belong to a sandbox in the log, whether it is open or closed."""
    rows = await connections.fetch(_KNOWN, ids=ids)
    return {UUID(int=row["object_id"].int) for row in rows}
