"""Exact totals of unfiltered lists without counting their rows.

A base (P, visible, ever) says how many sandboxes the events up to position P left visible, and how many there ever
were. The statement that reads a page also sums what the events after P did, so the total belongs to the very snapshot
of the page: `sandbox.requested` +1, `sandbox.termination_requested` and `sandbox.expired` -1. Each of them is written
in one statement with the row's own `ended_at`, so sum and rows cannot disagree.

Only settled positions may be a base: P comes from `log_horizon()`, asked in a statement of its own before the one that
uses it (the protocol is in `app.store.log.store`); behind any higher P an event could still become visible and would be
lost from every later sum. The first base is derived by counting rows once and taking off what lies after P.

A list reads at most `MOST` events beyond its base. Past `ENOUGH` the base moves on; when even a fresh base leaves too
many (a writer hangs and holds the horizon back), the list counts rows instead. Totals are per process and are thrown
away with it; a base ahead of the horizon (the database went back to a backup) is derived anew.
"""

from __future__ import annotations

import asyncio
from typing import Any

from msgspec import Struct
from sqlalchemy import BigInteger, Integer, Text, bindparam, case, func, or_, select
from sqlalchemy.sql.selectable import Subquery

from app.domain.sandbox import events as ev
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import events, sandboxes

MOST = 2000
ENOUGH = 500
_FAR = 50_000
"""Beyond this many positions counting rows is cheaper than summing events."""

_BEGIN = ev.wire_name(ev.Requested)
_ENDS = (ev.wire_name(ev.TerminationRequested), ev.wire_name(ev.Expired))


class Base(Struct, frozen=True):
    """What the events up to `position` add up to."""

    position: int
    visible: int
    ever: int


def _sums(source: Any) -> tuple[Any, Any]:
    mine = source.c.tenant == bindparam("tenant", type_=Text)
    begun = case((source.c.type == _BEGIN, 1), else_=0)
    ended = case((or_(*[source.c.type == end for end in _ENDS]), 1), else_=0)
    return (
        func.coalesce(func.sum(begun - ended).filter(mine), 0).label("visible"),
        func.coalesce(func.sum(begun).filter(mine), 0).label("ever"),
    )


def delta() -> Subquery:
    """What happened after the base: (visible, ever, scanned). Parameters: tenant, base.

    The limit keeps the planner on the index and the work bounded; `scanned` above `MOST` means that it cut.
    """
    newer = (
        select(events.c.tenant, events.c.type)
        .where(events.c.position > bindparam("base", type_=BigInteger))
        .order_by(events.c.position)
        .limit(bindparam("most", MOST + 1, type_=Integer))
        .subquery("newer")
    )
    return select(*_sums(newer), func.count().label("scanned")).select_from(newer).subquery("delta")


def _count(*conditions: Any) -> Any:
    counted = select(func.count()).select_from(sandboxes)
    return counted.where(sandboxes.c.tenant == bindparam("tenant", type_=Text), *conditions).scalar_subquery()


def _derive() -> Statement:
    newer = select(events.c.tenant, events.c.type).where(events.c.position > bindparam("base", type_=BigInteger))
    sums = select(*_sums(newer.subquery("newer"))).subquery("sums")
    return Statement(
        select(
            (_count(sandboxes.c.ended_at.is_(None)) - sums.c.visible).label("visible"),
            (_count() - sums.c.ever).label("ever"),
        )
    )


def _move() -> Statement:
    settled = select(events.c.tenant, events.c.type).where(
        events.c.position > bindparam("base", type_=BigInteger), events.c.position <= bindparam("to", type_=BigInteger)
    )
    return Statement(select(*_sums(settled.subquery("settled"))))


_HORIZON = Statement(select(func.sandledger.log_horizon().label("horizon")))
_DERIVE = _derive()
_MOVE = _move()


class Totals:
    """The bases of this process, one a tenant."""

    def __init__(self, database: Database) -> None:
        """Knows nothing yet."""
        self._database = database
        self._bases: dict[str, Base] = {}
        self._moving: set[str] = set()
        self._first = asyncio.Lock()

    async def base(self, tenant: str) -> Base:
        """The present base; derived when there is none."""
        base = self._bases.get(tenant)
        if base is None:
            async with self._first:  # many first lists at once count once
                base = self._bases.get(tenant)
                if base is None:
                    base = self._bases[tenant] = await self._derived(tenant, await self._horizon())
        return base

    async def advance(self, tenant: str) -> Base:
        """Move the base up to the horizon. While another list does that already, the present one is good enough."""
        base = await self.base(tenant)
        if tenant in self._moving:
            return base
        self._moving.add(tenant)
        try:
            horizon = await self._horizon()
            if base.position <= horizon <= base.position + _FAR:
                row = await self._database.fetch_one(_MOVE, tenant=tenant, base=base.position, to=horizon)
                assert row is not None, "an aggregate without GROUP BY has one row"
                moved = Base(horizon, base.visible + int(row["visible"]), base.ever + int(row["ever"]))
            else:
                moved = await self._derived(tenant, horizon)
            self._bases[tenant] = moved
            return moved
        finally:
            self._moving.discard(tenant)

    async def _horizon(self) -> int:
        row = await self._database.fetch_one(_HORIZON)
        assert row is not None, "a function call has one row"
        return row["horizon"]

    async def _derived(self, tenant: str, horizon: int) -> Base:
        row = await self._database.fetch_one(_DERIVE, tenant=tenant, base=horizon)
        assert row is not None, "a select without FROM has one row"
        return Base(horizon, int(row["visible"]), int(row["ever"]))
