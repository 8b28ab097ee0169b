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
out); horizon and rows never share a snapshot; gaps are normal. A standby refuses to name a horizon. A writer that hangs
inside its transaction delays readers, never writers; the application role's `idle_in_transaction_session_timeout` ends
it. The horizon is not monotonic: a writer may announce a position below the last answer. What was settled once stays
settled, so an older answer is a lower bound of the present one. Therefore a process may remember it for a moment, which
spares the lock table of a busy cluster; and nobody may conclude a restore from a horizon that fell (`identity` tells).
A remembered horizon never says that there is nothing new: an empty page comes from a horizon that was asked for after
the call began, so a reader that a signal woke finds the event that it was woken for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from uuid import UUID

import asyncpg
from msgspec import Struct
from sqlalchemy import BigInteger, Integer, Text, Uuid, bindparam, func, literal_column, select

from app.store.database.statement import Connections, Statement
from app.store.tables import events

HORIZON_SECONDS = 0.02
"""How long a process remembers the horizon."""


class StoredEvent(Struct, frozen=True):
    """A row of the log. `data` and `meta` are JSON as it is stored, not decoded."""

    position: int
    stream_id: UUID
    kind: str
    tenant: str
    version: int
    type: str
    schema: int
    data: str
    meta: str
    recorded_at: datetime


class Witness(Struct, frozen=True):
    """The last event up to a settled position. In one log it stays the same for ever."""

    position: int
    stream_id: UUID
    recorded_at: datetime


class LogIdentity(Struct, frozen=True):
    """Which log this is: the cluster, its timeline, and how far it has come."""

    system: int
    timeline: int
    last_position: int
    """The highest position handed out."""

    def follows(self, earlier: LogIdentity, position: int) -> bool:
        """Whether what was settled at `position` in the earlier log is still settled in this one."""
        same = (self.system, self.timeline) == (earlier.system, earlier.timeline)
        return same and self.last_position >= position


_COLUMNS = (
    events.c.position,
    events.c.stream_id,
    events.c.kind,
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
HISTORY = Statement(
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
_IDENTITY = Statement(
    select(
        literal_column("system_identifier", BigInteger),
        literal_column("timeline_id", Integer),
        literal_column("last_position", BigInteger),
    ).select_from(func.sandledger.log_identity().table_valued("system_identifier", "timeline_id", "last_position"))
)
_WITNESS = Statement(
    select(events.c.position, events.c.stream_id, events.c.recorded_at)
    .where(events.c.position <= bindparam("position", type_=BigInteger))
    .order_by(events.c.position.desc())
    .limit(1)
)
_AHEAD = Statement(select(func.sandledger.log_partitions_ahead()))
_PARTITIONS = Statement(select(func.sandledger.log_ensure_partitions()))


class EventLog:
    """Reads. Appends are built by `app.store.log.append` and run by `app.service.sandboxes`."""

    def __init__(self, database: Connections, *, remember: float = HORIZON_SECONDS) -> None:
        """On an open database. The horizon is remembered for `remember` seconds."""
        self._database = database
        self._remember = remember
        self._horizon = 0
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    async def horizon(self, *, fresh: bool = False) -> int:
        """A position up to which everything that will ever be there is there. One flight, remembered for a moment.

        `fresh`: asked for after this call began.

        Raises:
            StoreUnavailable: the server is a standby, or away.
        """
        clock = asyncio.get_running_loop().time
        oldest = clock() - (0 if fresh else self._remember)
        if self._asked_at > oldest:
            return self._horizon
        async with self._asking:
            # An answer that was asked for after this call began is as good as one of our own.
            if self._asked_at <= oldest:
                asked_at = clock()
                row = await self._database.fetch_one(_HORIZON)
                assert row is not None, "a function call has one row"
                self._horizon, self._asked_at = row["horizon"], asked_at
        return self._horizon

    async def identity(self) -> LogIdentity:
        """Which log this is. A restored or failed-over database has another one."""
        row = await self._database.fetch_one(_IDENTITY)
        assert row is not None, "the function answers one row"
        return LogIdentity(*row)

    async def witness(self, position: int) -> Witness | None:
        """The last event up to a settled position. When it is another one than before, the log was restored."""
        row = await self._database.fetch_one(_WITNESS, position=position)
        return None if row is None else Witness(row[0], UUID(int=row[1].int), row[2])

    async def read_after(self, position: int, limit: int = 1000) -> tuple[list[StoredEvent], int]:
        """Settled events after `position`, in order, and where to go on from.

        Two statements on purpose: see the module's protocol.
        """
        for fresh in (False, True):
            horizon = await self.horizon(fresh=fresh)
            if horizon <= position:
                continue
            rows = await self._database.fetch(TAIL, after=position, horizon=horizon, limit=limit)
            if rows:
                found = _stored(rows)
                return found, (found[-1].position if len(found) == limit else horizon)
            position = horizon
        return [], position

    async def history(
        self, stream_id: UUID, tenant: str, *, after: int = 0, since: int = 0, limit: int = 1000
    ) -> list[StoredEvent]:
        """A page of one stream, by version. `since` is a position below all of it."""
        rows = await self._database.fetch(
            HISTORY, stream_id=stream_id, tenant=tenant, after=after, since=since, limit=limit
        )
        return _stored(rows)

    async def whole_history(self, stream_id: UUID, tenant: str, *, since: int = 0) -> AsyncIterator[StoredEvent]:
        """Every event of one stream, however long."""
        after = 0
        while page := await self.history(stream_id, tenant, after=after, since=since):
            for event in page:
                yield event
            after = page[-1].version

    async def partitions_ahead(self) -> int:
        """How many partitions beyond the present one are ready. Below one, appends will soon have nowhere to go."""
        row = await self._database.fetch_one(_AHEAD)
        return 0 if row is None else row[0]

    async def ensure_partitions(self) -> int:
        """Keep the present partition and two ahead ready. Says how many were made."""
        row = await self._database.fetch_one(_PARTITIONS)
        return 0 if row is None else row[0]


def _stored(rows: Sequence[asyncpg.Record]) -> list[StoredEvent]:
    found: list[StoredEvent] = []
    last = stream_id = None
    for position, raw, *rest in rows:
        # asyncpg has a UUID class of its own. Converting costs a third of a read; neighbours are often of one stream.
        if stream_id is None or raw != last:
            last, stream_id = raw, UUID(int=raw.int)
        found.append(StoredEvent(position, stream_id, *rest))
    return found
