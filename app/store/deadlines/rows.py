"""The rows of `deadlines`, as the scheduler takes them.

**Protocol.** A claim takes due rows of the names that this version knows, in one statement, and moves their
`next_run_time` by a lease. Rows of other names belong to workers of a newer version.
What the claimer then appends rewrites or deletes the row in the same statement (`app.store.deadlines.effects`). Every
other write names the end of the claimer's own lease, so a row that was rewritten meanwhile is never touched.

**How it fails.** A claim whose holder dies is due again when its lease ends. The clock is always the database's.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy import (
    DateTime,
    Double,
    Integer,
    Text,
    Uuid,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.domain.sandbox.deadlines import EXPIRY, FREEZE, READY, TRANSITION
from app.domain.snapshot.decide import COMMIT
from app.store.database.statement import Connections, Statement
from app.store.database.times import SECOND
from app.store.tables import deadlines, reconcile_queue

NAMES = (EXPIRY, TRANSITION, READY, FREEZE, COMMIT)
"""The deadlines that this version can fire."""
_D, _Q = deadlines.c, reconcile_queue.c
_NOW = select(func.clock_timestamp()).scalar_subquery()
_PLACE = literal_column("deadlines.ctid", Text)


class Deadline(Struct, frozen=True):
    """A row, claimed or looked up, with what the queue knows of the last attempt."""

    stream_id: UUID
    name: str
    kind: str
    fires_at: datetime
    leased_until: datetime
    attempts: int
    cause: int | None
    last_reason: str | None
    last_error: str | None


def _last(column: Any) -> Any:
    found = select(column).where(_Q.stream_id == _D.stream_id)
    return found.correlate(deadlines).scalar_subquery().label(column.name)


_COLUMNS: tuple[Any, ...] = (
    *(_D.stream_id, _D.name, _D.kind, _D.fires_at, _D.next_run_time, _D.attempts, _D.cause),
    _last(_Q.last_reason),
    _last(_Q.last_error),
)
_KNOWN = _D.name == any_(bindparam("names", type_=ARRAY(Text)))
_KEY = (_D.stream_id == bindparam("stream_id", type_=Uuid), _D.name == bindparam("name", type_=Text))
_MINE = (*_KEY, _D.next_run_time == bindparam("leased_until", type_=DateTime(timezone=True)))


def _claim() -> Statement:
    due = (
        select(_PLACE.label("ctid"))
        .where(_D.next_run_time <= _NOW, _KNOWN)
        .order_by(_D.next_run_time)
        .limit(bindparam("limit", type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    # By the place of the row, as an array: the rows are fetched one by one, however many others there are. The lock
    # keeps a row where it is, so that its place still holds.
    taken: Any = any_(func.array(select(due.c.ctid).scalar_subquery())) == _PLACE
    until = _NOW + bindparam("lease", type_=Double) * SECOND
    claimed: Any = update(deadlines).where(taken).values(next_run_time=until, attempts=_D.attempts + 1)
    return Statement(claimed.returning(*_COLUMNS))


CLAIM = _claim()
EARLIEST = Statement(
    # The wait is taken off the row that an index scan finds first; an aggregate over all rows would read them all.
    select(func.greatest(0.0, func.extract("epoch", _D.next_run_time - _NOW)).cast(Double).label("wait"))
    .where(_KNOWN)
    .order_by(_D.next_run_time)
    .limit(1)
)
_LOOKUP = Statement(select(*_COLUMNS).where(*_KEY))
_ALL = Statement(select(*_COLUMNS).order_by(_D.next_run_time))
_REMOVE = Statement(delete(deadlines).where(*_KEY))
_DROP = Statement(delete(deadlines).where(*_MINE))
_HAND_BACK = Statement(
    update(deadlines).where(*_MINE).values(next_run_time=_NOW + bindparam("wait", type_=Double) * SECOND)
)
_POSTPONE = Statement(
    update(deadlines)
    .where(*_MINE)
    .values(
        fires_at=bindparam("fires_at", type_=DateTime(timezone=True)),
        # Never at once: the code that computed the time and the code that decides may disagree; the row would then
        # be claimed again without pause.
        next_run_time=func.greatest(bindparam("fires_at", type_=DateTime(timezone=True)), _NOW + SECOND),
    )
)


class DeadlineRows:
    """Reads and claims the rows of `deadlines`."""

    def __init__(self, connections: Connections, names: Sequence[str] = NAMES) -> None:
        """Claims deadlines of these names only."""
        self._connections = connections
        self._names = list(names)

    async def claim(self, limit: int, lease: float) -> list[Deadline]:
        """Due rows, earliest first; no other worker gets them before the lease (seconds) ends."""
        rows = await self._connections.fetch(CLAIM, limit=limit, lease=lease, names=self._names)
        return sorted(map(_deadline, rows), key=lambda row: row.fires_at)

    async def earliest(self) -> float | None:
        """Seconds until the earliest row is due."""
        row = await self._connections.fetch_one(EARLIEST, names=self._names)
        return None if row is None else row["wait"]

    async def lookup(self, stream_id: UUID, name: str) -> Deadline | None:
        """Read one row."""
        row = await self._connections.fetch_one(_LOOKUP, stream_id=stream_id, name=name)
        return None if row is None else _deadline(row)

    async def everything(self) -> list[Deadline]:
        """Read all rows, earliest first."""
        return [_deadline(row) for row in await self._connections.fetch(_ALL)]

    async def remove(self, stream_id: UUID, name: str) -> None:
        """Delete whatever it says. Absent is success."""
        await self._connections.fetch(_REMOVE, stream_id=stream_id, name=name)

    async def drop(self, claimed: Deadline) -> None:
        """Delete it, unless it was rewritten since the claim."""
        await self._connections.fetch(_DROP, **_mine(claimed))

    async def hand_back(self, claimed: Deadline, wait: float) -> None:
        """Due again in so many seconds, unless it was rewritten since the claim."""
        await self._connections.fetch(_HAND_BACK, wait=wait, **_mine(claimed))

    async def postpone(self, claimed: Deadline, fires_at: datetime) -> None:
        """It fires later than the row says, unless it was rewritten since the claim."""
        await self._connections.fetch(_POSTPONE, fires_at=fires_at, **_mine(claimed))


def _mine(claimed: Deadline) -> dict[str, Any]:
    return {"stream_id": claimed.stream_id, "name": claimed.name, "leased_until": claimed.leased_until}


def _deadline(row: Any) -> Deadline:
    stream_id, name, kind, fires_at, leased_until, *rest = row
    return Deadline(UUID(int=stream_id.int), name, kind, fires_at, leased_until, *rest)
