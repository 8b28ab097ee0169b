"""Exact totals of unfiltered lists without counting their rows.

A base (P, and for each tenant: visible, ever) says how many sandboxes the events up to position P left visible, and how
many there ever were. The statement that reads a page also sums what the events after P did, so the total belongs to the
very snapshot of the page: `sandbox.requested` +1, `sandbox.termination_requested` and `sandbox.expired` -1. Each of
them is written in one statement with the row's own `ended_at`, so sum and rows cannot disagree.

Only settled positions may be a base: P comes from `log_horizon()`, asked in a statement of its own before the one that
uses it (the protocol is in `app.store.log.store`); behind any higher P an event could still become visible and would be
lost from every later sum. The first base is derived by counting rows once and taking off what lies after P.

A list reads at most `MAX_EVENTS` events beyond the base. Past `MOVE_AFTER_EVENTS` the base is moved in the background;
when even a fresh base leaves too many (a writer hangs and holds the horizon back), the list counts rows instead. There
is one base a process, for all tenants, and one flight of each statement that makes or moves it: callers that come
meanwhile wait for it.

**How it fails.** A database that went back (a restore, a failover to a standby that was behind) keeps no promise about
positions. Its identity then differs: the cluster's identifier and its timeline, or a log that ends before the base. A
dump that was restored into the same cluster and written to since has the same identity; then the last event up to the
base is another one. Both are compared at most once in `IDENTITY_SECONDS`, and a base of another log is derived again.
The horizon is not compared: it may fall when a writer announces, and a fall must not be read as a restore.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from sqlalchemy import BigInteger, Integer, Text, bindparam, case, func, or_, select
from sqlalchemy.sql.selectable import Subquery

from app.domain.sandbox import events as ev
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.store import EventLog, LogIdentity, Witness
from app.store.tables import events, sandboxes

MAX_EVENTS = 2000
MOVE_AFTER_EVENTS = 500
MAX_MOVE_POSITIONS = 50_000
"""Beyond this many positions counting rows is cheaper than summing events."""
IDENTITY_SECONDS = 1.0

_NAMES = ev.REGISTRY
_BEGIN = _NAMES.name_of(ev.Requested)
_ENDS = (_NAMES.name_of(ev.TerminationRequested), _NAMES.name_of(ev.Expired))


class Count(Struct, frozen=True):
    """How many sandboxes of one tenant its lists show (`visible`), and how many it has had (`ever`)."""

    visible: int = 0
    ever: int = 0


class Base(Struct, frozen=True):
    """What the events up to `position` add up to."""

    position: int
    identity: LogIdentity
    witness: Witness | None
    counts: Mapping[str, Count]

    def of(self, tenant: str) -> Count:
        """A tenant without sandboxes has none."""
        return self.counts.get(tenant, Count())


_begun = case((events.c.type == _BEGIN, 1), else_=0)
_ended = case((or_(*[events.c.type == end for end in _ENDS]), 1), else_=0)


def delta() -> Subquery:
    """What happened to a tenant after the base: (visible, ever, scanned). Parameters: tenant, base.

    The limit keeps the planner on the index and the work bounded; `scanned` above `MAX_EVENTS` means that it cut.
    """
    newer = (
        select(events.c.tenant, _begun.label("begun"), _ended.label("ended"))
        .where(events.c.position > bindparam("base", type_=BigInteger))
        .order_by(events.c.position)
        .limit(bindparam("most", MAX_EVENTS + 1, type_=Integer))
        .subquery("newer")
    )
    mine = newer.c.tenant == bindparam("tenant", type_=Text)
    return (
        select(
            func.coalesce(func.sum(newer.c.begun - newer.c.ended).filter(mine), 0).label("visible"),
            func.coalesce(func.sum(newer.c.begun).filter(mine), 0).label("ever"),
            func.count().label("scanned"),
        )
        .select_from(newer)
        .subquery("delta")
    )


def _summed(*conditions: Any) -> Any:
    return (
        select(events.c.tenant, func.sum(_begun - _ended).label("visible"), func.sum(_begun).label("ever"))
        .where(events.c.position > bindparam("base", type_=BigInteger), *conditions)
        .group_by(events.c.tenant)
    )


def _derive() -> Statement:
    rows = (
        select(
            sandboxes.c.tenant,
            func.count().filter(sandboxes.c.ended_at.is_(None)).label("visible"),
            func.count().label("ever"),
        )
        .group_by(sandboxes.c.tenant)
        .subquery("rows")
    )
    newer = _summed().subquery("newer")
    return Statement(
        select(
            rows.c.tenant,
            (rows.c.visible - func.coalesce(newer.c.visible, 0)).label("visible"),
            (rows.c.ever - func.coalesce(newer.c.ever, 0)).label("ever"),
        ).select_from(rows.outerjoin(newer, newer.c.tenant == rows.c.tenant))
    )


_DERIVE = _derive()
_MOVE = Statement(_summed(events.c.position <= bindparam("to", type_=BigInteger)))


class Totals:
    """The base of this process."""

    def __init__(self, database: Database, log: EventLog) -> None:
        self._database = database
        self._log = log
        self._base: Base | None = None
        self._checked_at = float("-inf")
        self._flight = asyncio.Lock()
        self._moving: asyncio.Task[Base] | None = None
        self.derived = 0
        """How many times rows were counted for a base."""

    async def base(self) -> Base:
        """The present base; derived when there is none, or when the log is another one."""
        base = self._base
        if base is not None and not self._is_check_due():
            return base
        async with self._flight:
            base = self._base
            if base is None:
                return await self._derive_base()
            if self._is_check_due():
                identity = await self._log.identity()
                follows = identity.follows(base.identity, base.position)
                if not follows or await self._log.witness(base.position) != base.witness:
                    return await self._derive_base()
                self._checked_at = asyncio.get_running_loop().time()
            return base

    def _is_check_due(self) -> bool:
        return asyncio.get_running_loop().time() - self._checked_at >= IDENTITY_SECONDS

    async def advance(self) -> Base:
        """Move the base up to the horizon. One flight: callers that come meanwhile wait for it."""
        if self._moving is None or self._moving.done():
            self._moving = asyncio.create_task(self._advance(), name="totals-advance")
        return await asyncio.shield(self._moving)

    def advance_later(self) -> None:
        """As `advance`, off the caller's path. An error shows at the next list that needs the base."""
        if self._moving is None or self._moving.done():
            self._moving = asyncio.create_task(self._advance(), name="totals-advance")
            self._moving.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _advance(self) -> Base:
        await self.base()
        async with self._flight:
            base = self._base
            assert base is not None, "the base exists and is never removed"
            horizon = await self._log.horizon()
            if not base.position <= horizon <= base.position + MAX_MOVE_POSITIONS:
                return base if horizon <= base.position else await self._derive_base()
            counts = dict(base.counts)
            for row in await self._database.fetch(_MOVE, base=base.position, to=horizon):
                known = base.of(row["tenant"])
                counts[row["tenant"]] = Count(known.visible + int(row["visible"]), known.ever + int(row["ever"]))
            self._base = Base(horizon, base.identity, await self._log.witness(horizon), counts)
            return self._base

    async def _derive_base(self) -> Base:
        identity = await self._log.identity()
        horizon = await self._log.horizon()
        rows = await self._database.fetch(_DERIVE, base=horizon)
        counts = {row["tenant"]: Count(int(row["visible"]), int(row["ever"])) for row in rows}
        self._base = Base(horizon, identity, await self._log.witness(horizon), counts)
        self._checked_at = asyncio.get_running_loop().time()
        self.derived += 1
        return self._base
