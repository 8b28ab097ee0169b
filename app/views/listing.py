"""Lists of sandboxes: one indexed statement a page, newest first.

Order is (created_at, id) descending, which the indexes have (visible, all, by phase), so a page is an index scan that
stops after `size` rows, whatever the table's size; the metadata filter uses the GIN index. `offset` pages as the public
API does, up to `MAX_OFFSET`; `after` is a keyset, for which rows that come and go between pages shift nothing. A cursor
carries the epoch of the log (`app.store.log.epoch`), which the statement reads beside the page.

The total comes with the page, from the same snapshot: for unfiltered lists by `app.views.totals`, else by counting the
matching rows up to `MAX_COUNTED`; beyond that it is a lower bound. Rows are ordered again here, few as they are,
because the join that puts the total beside them promises no order.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct
from sqlalchemy import BigInteger, DateTime, Integer, Text, Uuid, bindparam, cast, func, literal_column, select, tuple_
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.domain.sandbox.state import Sandbox
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.epoch import EPOCH, check_epoch
from app.store.log.store import EventLog
from app.store.tables import sandboxes
from app.views.current import COLUMNS, from_row
from app.views.totals import MAX_EVENTS, MOVE_AFTER_EVENTS, Totals, delta

MAX_ROWS = 201
"""The longest page, and one row more that shows whether there is another page."""
MAX_COUNTED = 10_000
"""Filtered lists are counted exactly up to here (decision 34)."""
MAX_OFFSET = 100_000
"""Page numbers reach this many rows; a cursor has no such bound."""
_YEAR_1970 = datetime(1970, 1, 1, tzinfo=UTC)
_CURSOR = struct.Struct(">qII16s")
_MAX_PAGES = 2**32 - 1


class Cursor(Struct, frozen=True):
    """The last row of a page, the log's epoch, and how many pages lie before the next."""

    created_at: datetime
    id: UUID
    epoch: int
    page: int = 1

    def __str__(self) -> str:
        """Opaque to clients."""
        micros = (self.created_at - _YEAR_1970) // timedelta(microseconds=1)
        packed = _CURSOR.pack(micros, self.epoch, min(self.page, _MAX_PAGES), self.id.bytes)
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """ValueError when it is none of ours."""
        try:
            packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            micros, epoch, page, raw = _CURSOR.unpack(packed)
            return cls(_YEAR_1970 + timedelta(microseconds=micros), UUID(bytes=raw), epoch, page)
        except (binascii.Error, struct.error, OverflowError, ValueError):
            raise ValueError("is not a cursor that this server gave out") from None


class Wanted(Struct, frozen=True):
    """Which sandboxes a list shows: tenant, filters, and whether ended ones count."""

    tenant: str
    phases: tuple[str, ...] | None = None
    """Any of these; None = every one. An empty tuple matches nothing."""
    metadata: dict[str, str] = {}
    """All of these."""
    include_terminal: bool = False
    """Also those that have ended."""

    @property
    def unfiltered(self) -> bool:
        """Whether the total is known without looking at rows."""
        return self.phases is None and not self.metadata


class Page(Struct, frozen=True):
    """Rows in order, and how many there are in all."""

    sandboxes: tuple[Sandbox, ...]
    total: int
    next: Cursor | None = None
    """Where to go on; None on the last page."""
    is_lower_bound: bool = False
    """There are more than `total`; they were not counted."""


class TooFar(ValueError):
    """A page number that lies too far from the first page."""


class Shape(Struct, frozen=True):
    """What decides the text of a statement."""

    phases: str
    """`any`, `one` or `some`."""
    metadata: bool
    include_terminal: bool
    keyset: bool
    summed: bool
    """Total from the log rather than by counting."""
    offset: bool = False


def _conditions(shape: Shape) -> list[Any]:
    rows = sandboxes.c
    found: list[Any] = [rows.tenant == bindparam("tenant", type_=Text)]
    if not shape.include_terminal:
        found.append(rows.ended_at.is_(None))
    if shape.phases == "one":  # equality keeps the order of the index by phase
        found.append(rows.phase == bindparam("phase", type_=Text))
    elif shape.phases == "some":
        found.append(rows.phase == func.any(bindparam("phases", type_=ARRAY(Text))))
    if shape.metadata:
        found.append(rows.metadata.contains(cast(bindparam("metadata", type_=Text), JSONB)))
    return found


@lru_cache
def page_statement(shape: Shape) -> Statement:
    """Epoch, total and rows. Parameters: tenant, size, offset, and those of the shape."""
    conditions = _conditions(shape)
    page = select(*COLUMNS).where(*conditions)
    if shape.keyset:
        last = tuple_(bindparam("created_at", type_=DateTime(timezone=True)), bindparam("id", type_=Uuid))
        page = page.where(tuple_(sandboxes.c.created_at, sandboxes.c.id) < last)
    page = page.order_by(sandboxes.c.created_at.desc(), sandboxes.c.id.desc())
    size = bindparam("size", type_=BigInteger)
    if shape.offset or not shape.summed:
        # Planned for each call, so that the planner sees the filter's values: a rare phase is found by its index.
        page = page.limit(size).offset(bindparam("offset", type_=BigInteger)).subquery("page")
    else:
        # For a limit it does not know, the planner of a reusable plan reckons with a tenth of the table, finds that
        # too expensive and plans for each call, which costs more than such a page. The inner limit shows the planner
        # that it is small.
        page = select(page.limit(literal_column(str(MAX_ROWS), BigInteger)).subquery("most")).limit(size)
        page = page.subquery("page")
    if shape.summed:
        total = delta()
        numbers = [total.c.visible.label("d_visible"), total.c.ever.label("d_ever"), total.c.scanned.label("d_scanned")]
    else:
        some = select(literal_column("1", Integer)).select_from(sandboxes).where(*conditions)
        counted = some.limit(literal_column(str(MAX_COUNTED + 1), BigInteger)).subquery("counted")
        total = select(func.count().label("total")).select_from(counted).subquery("total")
        numbers = [total.c.total.label("d_total")]
    return Statement(
        select(EPOCH.label("d_epoch"), *numbers, *page.c).select_from(total.outerjoin(page, literal_column("true")))
    )


_Found: TypeAlias = tuple[Sequence[asyncpg.Record], int, bool]
"""Rows, total, and whether the total was counted up to the bound."""


class Listing:
    """Reads of many; `app.views.current` reads one."""

    def __init__(self, database: Database, log: EventLog | None = None) -> None:
        """On an open database; `log` is the process's own reader."""
        self._database = database
        self.totals = Totals(database, log or EventLog(database))

    async def page(self, wanted: Wanted, *, size: int, offset: int = 0, after: Cursor | None = None) -> Page:
        """`size` rows (at most 200) from `offset`, or those that follow the cursor.

        Raises:
            TooFar: `offset` is above `MAX_OFFSET`, and there are rows there.
            CursorExpired: the cursor is of another epoch of the log.
        """
        if wanted.phases == () and after is None:
            return Page((), 0)
        offset = 0 if after is not None else offset
        near = min(offset, MAX_OFFSET)
        shape, values = shape_of(wanted, near, after), _values(wanted, size, near, after)
        rows, total, is_counted = await (self._summed(shape, values) if shape.summed else self._counted(shape, values))
        epoch = rows[0]["d_epoch"]
        if after is not None:
            check_epoch(after.epoch, epoch)
        is_lower_bound = is_counted and total > MAX_COUNTED
        if offset > MAX_OFFSET:
            if is_lower_bound or total > offset:
                raise TooFar(f"reaches at most {MAX_OFFSET} rows; go on with nextCursor")
            return Page((), total)
        found = sorted(
            (from_row(row) for row in rows if row["id"] is not None),
            key=lambda sandbox: (sandbox.created_at, sandbox.id),
            reverse=True,
        )
        shown = tuple(found[:size])
        last = shown[-1] if len(found) > size else None
        page = 1 + (after.page if after is not None else offset // size)
        cursor = None if last is None else Cursor(last.created_at, last.id, epoch, page)
        return Page(shown, min(total, MAX_COUNTED) if is_lower_bound else total, cursor, is_lower_bound)

    async def _summed(self, shape: Shape, values: dict[str, Any]) -> _Found:
        for read_base in (self.totals.base, self.totals.advance):
            base = await read_base()
            rows = await self._database.fetch(page_statement(shape), base=base.position, **values)
            first = rows[0]
            if first["d_scanned"] <= MAX_EVENTS:
                if first["d_scanned"] > MOVE_AFTER_EVENTS:
                    self.totals.advance_later()
                known = base.of(values["tenant"])
                if shape.include_terminal:
                    return rows, known.ever + int(first["d_ever"]), False
                return rows, known.visible + int(first["d_visible"]), False
        # No base is near enough: count up to the bound, as filtered lists do.
        return await self._counted(msgspec.structs.replace(shape, summed=False), values)

    async def _counted(self, shape: Shape, values: dict[str, Any]) -> _Found:
        rows = await self._database.fetch(page_statement(shape), **values)
        return rows, rows[0]["d_total"], True


def shape_of(wanted: Wanted, offset: int, after: Cursor | None) -> Shape:
    """Which statement reads such a page."""
    count = None if wanted.phases is None else len(wanted.phases)
    return Shape(
        "any" if count is None else "one" if count == 1 else "some",
        metadata=bool(wanted.metadata),
        include_terminal=wanted.include_terminal,
        keyset=after is not None,
        summed=wanted.unfiltered,
        offset=offset > 0,
    )


def _values(wanted: Wanted, size: int, offset: int, after: Cursor | None) -> dict[str, Any]:
    values: dict[str, Any] = {"tenant": wanted.tenant, "size": size + 1, "offset": offset}
    if wanted.phases is not None:
        values["phases"] = list(wanted.phases)
    if wanted.phases:
        values["phase"] = wanted.phases[0]
    if wanted.metadata:
        values["metadata"] = msgspec.json.encode(wanted.metadata).decode()
    if after is not None:
        values |= {"created_at": after.created_at, "id": after.id}
    return values
