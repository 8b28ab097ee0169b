"""Reading the log: the announced horizon.

`nextval` hands out positions in call order, rows become visible in commit order. A reader that remembers "the last
position" steps over a hole that fills later, and never sees that event. The protocol that repairs this:

* Writers announce. A BEFORE INSERT statement trigger on `events` takes a shared, transaction-scoped advisory lock
  whose key is the highest position handed out so far, *before* the insert draws its own. The lock ends with the
  transaction: commit, rollback or killed backend.
* Readers ask `log_horizon()`: first the sequence's last value H, then the smallest announced L; the horizon is
  min(L, H). In a *later statement* they read `after < position <= horizon`.

Why nothing is missed: take a row at p <= horizon that is still invisible. Its writer announced some a < p and holds
that lock until the row is visible. If the lock was held during the scan, horizon <= a < p, a contradiction. If it was
not yet taken, p was drawn after H was read, so p > H. If it was already released, the row is visible by now.

Fine print, each a test: the sequence has CACHE 1; its first value is burnt (a pristine sequence reports 1 as handed
out); horizon and rows never share a snapshot; gaps are normal; primary only. A writer that hangs inside its transaction
delays readers, never writers; the application role's `idle_in_transaction_session_timeout` ends it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct
from sqlalchemy import BigInteger, Integer, Text, Uuid, bindparam, func, select

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import events


class StoredEvent(Struct, frozen=True):
    """A row of the log, undecoded."""

    position: int
    stream_id: UUID
    tenant: str
    version: int
    type: str
    schema: int
    data: dict[str, Any]
    meta: dict[str, Any]
    recorded_at: datetime


_COLUMNS = (
    events.c.position,
    events.c.stream_id,
    events.c.tenant,
    events.c.version,
    events.c.type,
    events.c.schema,
    events.c.data,
    events.c.meta,
    events.c.recorded_at,
)
_HORIZON = Statement(select(func.sandledger.log_horizon().label("horizon")))
TAIL = Statement(
    select(*_COLUMNS)
    .where(
        events.c.position > bindparam("after", type_=BigInteger),
        events.c.position <= bindparam("horizon", type_=BigInteger),
    )
    .order_by(events.c.position)
    .limit(bindparam("limit", type_=Integer))
)
_HISTORY = Statement(
    select(*_COLUMNS)
    .where(
        events.c.stream_id == bindparam("stream_id", type_=Uuid),
        events.c.tenant == bindparam("tenant", type_=Text),
        events.c.version > bindparam("after", type_=Integer),
        # Lets the planner skip partitions that end before the stream began.
        events.c.position > bindparam("since", type_=BigInteger),
    )
    .order_by(events.c.version)
    .limit(bindparam("limit", type_=Integer))
)
_PARTITIONS = Statement(select(func.sandledger.log_ensure_partitions()))


class EventLog:
    """Reads. Appends are built by `app.store.log.append` and run by `app.service.sandboxes`."""

    def __init__(self, database: Database) -> None:
        """On an open database."""
        self._database = database

    async def horizon(self) -> int:
        """The highest position up to which everything that will ever be there is there."""
        row = await self._database.fetch_one(_HORIZON)
        return 0 if row is None else row["horizon"]

    async def read_after(self, position: int, limit: int = 1000) -> tuple[list[StoredEvent], int]:
        """Settled events after `position`, in order, and where to go on from.

        Two statements on purpose: see the module's protocol.
        """
        horizon = await self.horizon()
        if horizon <= position:
            return [], position
        rows = await self._database.fetch(TAIL, after=position, horizon=horizon, limit=limit)
        found = [_stored(row) for row in rows]
        return found, (found[-1].position if len(found) == limit else horizon)

    async def history(
        self, stream_id: UUID, tenant: str, *, after: int = 0, since: int = 0, limit: int = 1000
    ) -> list[StoredEvent]:
        """A page of one stream, by version. `since` is a position below all of it."""
        rows = await self._database.fetch(
            _HISTORY, stream_id=stream_id, tenant=tenant, after=after, since=since, limit=limit
        )
        return [_stored(row) for row in rows]

    async def whole_history(self, stream_id: UUID, tenant: str, *, since: int = 0) -> AsyncIterator[StoredEvent]:
        """Every event of one stream, however long."""
        after = 0
        while page := await self.history(stream_id, tenant, after=after, since=since):
            for event in page:
                yield event
            after = page[-1].version

    async def ensure_partitions(self) -> int:
        """Keep the present partition and two ahead ready. Says how many were made."""
        row = await self._database.fetch_one(_PARTITIONS)
        return 0 if row is None else row[0]


def _stored(row: asyncpg.Record) -> StoredEvent:
    position, stream_id, tenant, version, type_, schema, data, meta, recorded_at = row
    stream_id = UUID(int=stream_id.int)  # asyncpg has a UUID class of its own
    return StoredEvent(
        position,
        stream_id,
        tenant,
        version,
        type_,
        schema,
        msgspec.json.decode(data),
        msgspec.json.decode(meta),
        recorded_at,
    )
