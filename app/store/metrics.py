"""Reports of clients about their own calls, counted by day.

**Protocol.** A report is added to what waits, and the first caller writes all that waits in one statement, while
later ones gather for the next. So a report is in the database when its client is answered, and however many come at
once, they use one connection of this process: reports must not take connections from requests that act.

**How it fails.** What could not be written waits for the next report, also of clients that were told so.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import BigInteger, Boolean, Date, Text, bindparam, cast, column, func, select
from sqlalchemy.dialects.postgresql import ARRAY, insert

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import client_metrics

LONGEST_MS: Final = 86_400_000
"""A report counts with one day at most, so that one absurd report does not spoil a sum."""
MAX_SDKS: Final = 200
"""Names of SDKs that one process tells apart. A caller that makes up more of them gets `other`, not more rows."""
OTHER: Final = "other"
_M = client_metrics.c
_TODAY = cast(func.timezone("UTC", func.clock_timestamp()), Date)


def _add() -> Statement:
    given = (
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
    row = given.c
    key = (row.tenant, row.event, row.sdk, row.success)
    rows = insert(client_metrics).from_select(
        ["tenant", "day", "event", "sdk", "success", "count", "duration_ms_sum"],
        # In the order of their keys, as every statement that waits for several rows.
        select(row.tenant, _TODAY, row.event, row.sdk, row.success, row.count, row.duration_ms_sum).order_by(*key),
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


class Report(Struct, frozen=True):
    """What is counted together."""

    tenant: str
    event: str
    sdk: str
    success: bool


class ClientMetrics:
    """The table `client_metrics`. One per process, or reports share no statement."""

    def __init__(self) -> None:
        self._sdks: set[str] = set()
        self._counts: Counter[Report] = Counter()
        self._sums: Counter[Report] = Counter()
        self._writing = asyncio.Lock()
        self._added = 0
        self._written = 0

    async def count(self, database: Database, report: Report, duration_ms: int) -> None:
        """Add one. It is stored when this returns."""
        report = self._bounded(report)
        self._counts[report] += 1
        self._sums[report] += min(duration_ms, LONGEST_MS)
        self._added += 1
        ticket = self._added
        async with self._writing:
            if self._written < ticket:
                await self._write(database)

    def _bounded(self, report: Report) -> Report:
        if len(self._sdks) < MAX_SDKS:
            self._sdks.add(report.sdk)
        return report if report.sdk in self._sdks else replace(report, sdk=OTHER)

    async def _write(self, database: Database) -> None:
        covers = self._added
        counts, self._counts = self._counts, Counter()
        sums, self._sums = self._sums, Counter()
        try:
            await database.fetch(_ADD, **_arrays(counts, sums))
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
