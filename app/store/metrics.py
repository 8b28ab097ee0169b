"""Reports of clients about their own calls, counted by day.

**Protocol.** A report is added to what waits, and the first caller writes all that waits in one statement, while
later ones gather for the next. So a report is in the database when its client is answered, and however many come at
once, they use one connection of this process: reports must not take connections from requests that act.

**Bounds.** Of one tenant and day, `MAX_SDKS` names of SDKs are told apart, over all processes; the rest is counted as
`other`, so that a caller who makes names up makes no more rows, and takes none from other tenants. Processes that meet
new names at the same instant may exceed it by those. Days are kept for as long as the operator says.

**How it fails.** What could not be written waits for the next report, also of clients that were told so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Final

from msgspec import Struct
from sqlalchemy import (
    BigInteger,
    Boolean,
    Date,
    Integer,
    Text,
    any_,
    bindparam,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from app.store.database.pool import Database
from app.store.database.statement import Connections, Statement
from app.store.tables import client_metrics

LONGEST_MS: Final = 86_400_000
"""A report counts with one day at most, so that one absurd report does not spoil a sum."""
MAX_SDKS: Final = 50
OTHER: Final = "other"
_M = client_metrics.c
_TODAY = cast(func.timezone("UTC", func.clock_timestamp()), Date)


def _given() -> Any:
    return (
        func.unnest(
            bindparam("tenants", type_=ARRAY(Text)),
            bindparam("events", type_=ARRAY(Text)),
            bindparam("sdks", type_=ARRAY(Text)),
            bindparam("successes", type_=ARRAY(Boolean)),
            bindparam("counts", type_=ARRAY(BigInteger)),
            bindparam("sums", type_=ARRAY(BigInteger)),
        )
        .table_valued(
            column("tenant", Text),
            column("event", Text),
            column("sdk", Text),
            column("success", Boolean),
            column("count", BigInteger),
            column("duration_ms_sum", BigInteger),
        )
        .render_derived(name="given")
    )


def _add() -> Statement:
    row = _given().c
    given = select(row.tenant, row.event, row.sdk, row.success, row.count, row.duration_ms_sum).cte("reports")
    names = select(given.c.tenant, given.c.sdk).distinct().cte("names")
    known = (
        select(_M.tenant, _M.sdk)
        .where(_M.day == _TODAY, _M.tenant == any_(bindparam("tenants", type_=ARRAY(Text))), _M.sdk != OTHER)
        .distinct()
        .cte("known")
    )
    so_many = select(func.count()).where(known.c.tenant == names.c.tenant).correlate(names).scalar_subquery()
    is_known = exists().where(known.c.tenant == names.c.tenant, known.c.sdk == names.c.sdk).correlate(names)
    number = func.row_number().over(partition_by=names.c.tenant, order_by=names.c.sdk)
    new = select(names.c.tenant, names.c.sdk, (so_many + number).label("number")).where(~is_known).cte("new")
    sdk = case((new.c.number > bindparam("most", type_=Integer), OTHER), else_=given.c.sdk)
    key = (given.c.tenant, given.c.event, sdk, given.c.success)
    sums = (func.sum(given.c.count).cast(BigInteger), func.sum(given.c.duration_ms_sum).cast(BigInteger))
    rows = insert(client_metrics).from_select(
        ["tenant", "day", "event", "sdk", "success", "count", "duration_ms_sum"],
        # In the order of their keys, as every statement that waits for several rows.
        select(given.c.tenant, _TODAY, given.c.event, sdk, given.c.success, *sums)
        .select_from(given.outerjoin(new, (new.c.tenant == given.c.tenant) & (new.c.sdk == given.c.sdk)))
        .group_by(*key)
        .order_by(*key),
    )
    return Statement(
        rows.on_conflict_do_update(
            index_elements=[_M.tenant, _M.day, _M.event, _M.sdk, _M.success],
            set_={
                "count": _M.count + rows.excluded.count,
                "duration_ms_sum": _M.duration_ms_sum + rows.excluded.duration_ms_sum,
            },
        )
    )


_ADD = _add()
_PURGED_AT_ONCE: Final = 1000
_OLD = (
    select(*client_metrics.primary_key.columns)
    .where(_M.day < _TODAY - bindparam("days", type_=Integer))
    .limit(_PURGED_AT_ONCE)
    .with_for_update(skip_locked=True)
    .cte("old")
)
_PURGE = Statement(
    delete(client_metrics)
    .where(*(each == _OLD.c[each.name] for each in client_metrics.primary_key.columns))
    .returning(_M.day)
)


class Report(Struct, frozen=True):
    """What is counted together."""

    tenant: str
    event: str
    sdk: str
    success: bool


class ClientMetrics:
    """The table `client_metrics`. One per process, or reports share no statement."""

    def __init__(self) -> None:
        self._counts: Counter[Report] = Counter()
        self._sums: Counter[Report] = Counter()
        self._writing = asyncio.Lock()
        self._added = 0
        self._written = 0

    async def count(self, database: Database, report: Report, duration_ms: int) -> None:
        """Add one. It is stored when this returns."""
        self._counts[report] += 1
        self._sums[report] += min(duration_ms, LONGEST_MS)
        self._added += 1
        ticket = self._added
        async with self._writing:
            if self._written < ticket:
                await self._write(database)

    async def _write(self, database: Database) -> None:
        covers = self._added
        counts, self._counts = self._counts, Counter()
        sums, self._sums = self._sums, Counter()
        try:
            await database.fetch(_ADD, **_arrays(counts, sums), most=MAX_SDKS)
        except BaseException:
            # Also a cancellation: it may have been written or not, and a report too many is better than one too few.
            self._counts += counts
            self._sums += sums
            raise
        self._written = covers


def _arrays(counts: Counter[Report], sums: Counter[Report]) -> dict[str, list[Any]]:
    reports = list(counts)
    return {
        "tenants": [each.tenant for each in reports],
        "events": [each.event for each in reports],
        "sdks": [each.sdk for each in reports],
        "successes": [each.success for each in reports],
        "counts": [counts[each] for each in reports],
        "sums": [sums[each] for each in reports],
    }


async def purge(database: Connections, days: int) -> int:
    """Delete what is older than so many days. Says how many rows that were."""
    purged = 0
    while found := len(await database.fetch(_PURGE, days=days)):
        purged += found
    return purged
