"""Leases of addresses on our own network (table `addresses`).

**Protocol.** A sandbox gets the address that has been free for the longest time, before its container is made. It keeps
it until the append that records the removal (`free`), over crashes, restarts and failed starts: a second `lease` for
the same sandbox answers the same address. For `QUARANTINE_SECONDS` after that nobody gets it, because requests, caches
and containers that are still being removed may know it. Rows are made in blocks, as they are needed.

**Invariants.** An address has one holder: it is taken by an update of its one row, under the row's lock, and rows that
others have locked are passed over. A sandbox has one address: a unique index refuses a second one.

**How it fails.** A worker that dies between the lease and the create leaves a lease, which the next attempt uses. One
whose claim was lost may lease for a sandbox that is closed meanwhile; `reap` frees that. An address that something else
has in spite of all is refused by the engine; `give_up` sends it to the end of the circle.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Any, Final
from uuid import UUID

import asyncpg
from msgspec import Struct
from sqlalchemy import (
    CTE,
    DateTime,
    Double,
    Integer,
    Text,
    Uuid,
    bindparam,
    cast,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INET, insert

from app.store.database.statement import Connections, Statement
from app.store.database.times import SECOND
from app.store.log.append import Parts
from app.store.tables import addresses, sandboxes

QUARANTINE_SECONDS: Final = 600.0
"""How long nobody gets an address after the removal of its sandbox was recorded."""
BLOCK: Final = 256
"""Rows that are made at once."""
_ATTEMPTS: Final = 16
_A = addresses.c
_NOW = func.clock_timestamp()
_NEVER = cast(literal_column("'-infinity'"), DateTime(timezone=True))
_ENGINE = bindparam("engine", type_=Text)
_STREAM = bindparam("stream_id", type_=Uuid)
_FIRST, _LAST = bindparam("first", type_=INET), bindparam("last", type_=INET)
_HERE = (_A.engine == _ENGINE, _A.ip >= _FIRST, _A.ip <= _LAST)
_FREE = (
    select(_A.ip)
    .where(*_HERE, _A.freed_at <= _NOW - bindparam("quarantine", type_=Double) * SECOND)
    .order_by(_A.freed_at, _A.ip)
    .limit(1)
    .with_for_update(skip_locked=True)
)
_TAKE = Statement(
    update(addresses)
    .where(_A.engine == _ENGINE, _A.ip == _FREE.scalar_subquery())
    .values(
        tenant=bindparam("tenant_of_it", type_=Text),
        stream_id=_STREAM,
        object_id=bindparam("object", type_=Uuid),
        generation=bindparam("number", type_=Integer),
        leased_at=_NOW,
        freed_at=None,
    )
    .returning(_A.ip)
)
_HELD = (_A.stream_id == _STREAM, _A.freed_at.is_(None))
_AGAIN = Statement(
    update(addresses).where(*_HELD, *_HERE).values(generation=bindparam("number", type_=Integer)).returning(_A.ip)
)
_ROW = insert(addresses).values(
    engine=_ENGINE,
    ip=bindparam("ip", type_=INET),
    tenant=bindparam("tenant_of_it", type_=Text),
    stream_id=_STREAM,
    object_id=bindparam("object", type_=Uuid),
    generation=bindparam("number", type_=Integer),
    leased_at=_NOW,
)
_HOLD = Statement(
    _ROW.on_conflict_do_update(
        index_elements=[_A.engine, _A.ip],
        set_={
            name: _ROW.excluded[name]
            for name in ("tenant", "stream_id", "object_id", "generation", "leased_at", "freed_at")
        },
        where=_A.freed_at.is_not(None),
    ).returning(_A.ip)
)
_GIVE_UP = Statement(update(addresses).where(*_HELD).values(freed_at=_NOW).returning(_A.ip))
_GIVE_UP_ONE = Statement(
    update(addresses).where(*_HELD, _A.ip == bindparam("ip", type_=INET)).values(freed_at=_NOW).returning(_A.ip)
)
_HIGHEST = Statement(select(func.max(_A.ip).label("ip")).where(*_HERE))
_MAKE = Statement(
    insert(addresses)
    .from_select(
        ["engine", "ip", "freed_at"],
        select(_ENGINE, func.unnest(bindparam("ips", type_=ARRAY(INET))), _NEVER),
    )
    .on_conflict_do_nothing(index_elements=[_A.engine, _A.ip])
)
_REAP = Statement(
    update(addresses)
    .where(_A.engine == _ENGINE, _A.freed_at.is_(None), _A.stream_id == sandboxes.c.id)
    .where(sandboxes.c.closed_at <= _NOW - bindparam("age", type_=Double) * SECOND)
    .values(freed_at=_NOW)
    .returning(_A.ip)
)


class Holder(Struct, frozen=True):
    """Who leases."""

    stream_id: UUID
    tenant: str
    object_id: UUID
    generation: int
    """Of the object that the address is for."""


class Addresses:
    """Leases on the network of one engine."""

    def __init__(self, database: Connections, engine: str, *, quarantine: float = QUARANTINE_SECONDS) -> None:
        self._database = database
        self._engine = engine
        self._quarantine = quarantine

    async def lease(self, holder: Holder, between: tuple[IPv4Address, IPv4Address]) -> str | None:
        """The address of this sandbox, its own or a new one. None = none of these is free."""
        first, last = between
        here = {"engine": self._engine, "first": first, "last": last, **_values(holder)}
        for _ in range(_ATTEMPTS):
            try:
                row = await self._database.fetch_one(_TAKE, **here, quarantine=self._quarantine)
            except asyncpg.UniqueViolationError:
                if (held := await self._database.fetch_one(_AGAIN, **here)) is not None:
                    return _text(held)
                await self.give_up(holder.stream_id)  # of a subnet that the network had before
                continue
            if row is not None:
                return _text(row)
            if not await self._grow(first, last):
                held = await self._database.fetch_one(_AGAIN, **here)
                return None if held is None else _text(held)
        return None

    async def give_up(self, stream_id: UUID, ip: str | None = None) -> None:
        """Free the address of this sandbox, because the engine does not give it to it. Another one is leased then. With
        `ip` only that one: a worker that lost its claim may come late with an address that it had long before.
        """
        if ip is None:
            await self._database.fetch(_GIVE_UP, stream_id=stream_id)
        else:
            await self._database.fetch(_GIVE_UP_ONE, stream_id=stream_id, ip=IPv4Address(ip))

    async def hold(self, holder: Holder, ip: str) -> bool:
        """Lease the address that the sandbox has already, instead of the one that was leased for it: its object was
        there, made when the database was another one. False = somebody else's lease.
        """
        await self.give_up(holder.stream_id)
        row = await self._database.fetch_one(_HOLD, engine=self._engine, ip=IPv4Address(ip), **_values(holder))
        return row is not None

    async def reap(self, age: float = 60.0) -> int:
        """Free what sandboxes still have that were closed `age` seconds ago. How many there were."""
        return len(await self._database.fetch(_REAP, engine=self._engine, age=age))

    async def _grow(self, first: IPv4Address, last: IPv4Address) -> bool:
        """Make rows for more addresses. False = all have theirs."""
        row = await self._database.fetch_one(_HIGHEST, engine=self._engine, first=first, last=last)
        highest = None if row is None or row["ip"] is None else int(row["ip"])
        begin = int(first) if highest is None else highest + 1
        if begin > int(last):
            return False
        ips = [IPv4Address(number) for number in range(begin, min(begin + BLOCK, int(last) + 1))]
        await self._database.fetch(_MAKE, engine=self._engine, ips=ips)
        return True


def free(parts: Parts) -> CTE:
    """An effect of the append that records that nothing of the sandbox is left on its engine."""
    return (
        update(addresses)
        .where(_A.stream_id == select(parts.guard.c.id).scalar_subquery(), _A.freed_at.is_(None))
        .values(freed_at=parts.now)
        .returning(_A.stream_id)
        .cte("freed_address")
    )


def _values(holder: Holder) -> dict[str, Any]:
    return {
        "stream_id": holder.stream_id,
        "tenant_of_it": holder.tenant,
        "object": holder.object_id,
        "number": holder.generation,
    }


def _text(row: Any) -> str:
    return str(row["ip"]).partition("/")[0]
