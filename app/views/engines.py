"""The `engines` row as head of the stream. Placement and status read the few rows at most once a second.

Two columns are not folded from events, because they move all the time: `last_seen_at`, written by every worker that has
reached the engine and found it to be the right one, and `swept_at`, through which one worker at a time takes the sweep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct
from sqlalchemy import (
    Boolean,
    DateTime,
    Double,
    Text,
    Uuid,
    bindparam,
    case,
    func,
    or_,
    select,
    update,
)

from app.domain.engine.events import Capacity, NetworkPrepared
from app.domain.engine.state import Engine, EngineState
from app.domain.sandbox.observed import Capabilities
from app.store.database.statement import Connections, Statement
from app.store.database.times import SECOND
from app.store.log.append import Effect, Parts, head_columns, insert_head, update_head
from app.store.tables import engines

CACHE_SECONDS = 1.0
_E = engines.c
_ALWAYS = (
    _E.version,
    _E.schema,
    _E.engine_id,
    _E.mark,
    _E.epoch,
    _E.state,
    _E.trouble,
    _E.trusted_position,
    _E.labels,
    _E.capabilities,
    _E.capacity,
    _E.agents,
    _E.network,
    _E.server_version,
    _E.api_version,
)
COLUMNS = tuple(column for column in engines.c if column.name not in ("last_seen_at", "swept_at"))
"""The folded columns."""
_ALL = Statement(select(*COLUMNS).order_by(_E.name))
_LOAD = Statement(select(*COLUMNS, func.clock_timestamp().label("now")).where(_E.id == bindparam("id", type_=Uuid)))
_STANDINGS = Statement(
    select(*COLUMNS, _E.last_seen_at, _E.swept_at, func.clock_timestamp().label("now")).order_by(_E.name)
)
_NOW = select(func.clock_timestamp()).scalar_subquery()
_NAMED = _E.name == bindparam("name", type_=Text)


def _older(column: Any, seconds: str) -> Any:
    return or_(column.is_(None), column <= _NOW - bindparam(seconds, type_=Double) * SECOND)


_SEEN = Statement(update(engines).where(_NAMED, _older(_E.last_seen_at, "age")).values(last_seen_at=_NOW))
_CLAIM_SWEEP = Statement(
    update(engines).where(_NAMED, _older(_E.swept_at, "age")).values(swept_at=_NOW).returning(_E.swept_at)
)
_RETURN_SWEEP = Statement(
    update(engines)
    .where(_NAMED, _E.swept_at == bindparam("claimed", type_=DateTime(timezone=True)))
    .values(swept_at=None)
)
_encode = msgspec.json.Encoder().encode
_decode_labels = msgspec.json.Decoder(dict[str, str]).decode
_decode_capabilities = msgspec.json.Decoder(Capabilities).decode
_decode_capacity = msgspec.json.Decoder(Capacity).decode
_decode_network = msgspec.json.Decoder(NetworkPrepared).decode


def _begin(parts: Parts) -> dict[str, Any]:
    return {**head_columns([_E.name, _E.kind, *_ALWAYS]), "state_since": parts.clock.c.now}


def _move(parts: Parts) -> dict[str, Any]:
    since = case((bindparam("state_moved", type_=Boolean), parts.now), else_=_E.state_since)
    return {**head_columns(_ALWAYS), "state_since": since}


begin: Effect = insert_head(engines, _begin)
"""The first head row. Parameters: those of `values`."""
move: Effect = update_head(engines, _move)
"""The next head row. Parameters: those of `values`, state_moved, expected."""


def values(engine: Engine) -> dict[str, Any]:
    """Parameters of a head row."""
    return {
        "tenant": engine.tenant,
        "version": engine.version,
        "schema": engine.schema,
        "name": engine.name,
        "kind": engine.kind,
        "engine_id": engine.engine_id,
        "mark": engine.mark,
        "epoch": engine.epoch,
        "state": engine.state.value,
        "trouble": engine.trouble,
        "trusted_position": engine.trusted_position,
        "labels": _encode(engine.labels).decode(),
        "capabilities": _encode(engine.capabilities).decode(),
        "capacity": _encode(engine.capacity).decode(),
        "agents": _encode(engine.agents).decode(),
        "network": None if engine.network is None else _encode(engine.network).decode(),
        "server_version": engine.server_version,
        "api_version": engine.api_version,
    }


class Standing(Struct, frozen=True):
    """An engine at the moment of reading."""

    engine: Engine
    now: datetime
    last_seen_at: datetime | None
    """When a worker last reached it and found it to be the right one."""
    swept_at: datetime | None
    """When the last sweep began; None = none yet, or it failed."""

    @property
    def silent_s(self) -> float:
        """Seconds since a worker last reached it."""
        since = self.last_seen_at or self.engine.state_since
        return (self.now - since).total_seconds()


class EnginesView:
    """Reads of engines, and the two columns that are not folded."""

    def __init__(self, database: Connections) -> None:
        self._database = database
        self._known: tuple[Engine, ...] = ()
        self._read_at = float("-inf")
        self._changes = 0
        self._reading = asyncio.Lock()

    async def known(self) -> Sequence[Engine]:
        """All engines, at most a second old. One flight: callers that come meanwhile wait for it."""
        clock = asyncio.get_running_loop().time
        if clock() - self._read_at < CACHE_SECONDS:
            return self._known
        async with self._reading:
            while clock() - self._read_at >= CACHE_SECONDS:
                changes = self._changes
                rows = await self._database.fetch(_ALL)
                if changes == self._changes:  # else the rows may be older than the change
                    self._known, self._read_at = tuple(from_row(row) for row in rows), clock()
        return self._known

    def forget(self) -> None:
        """Read again, also what is being read: this process has changed an engine."""
        self._changes += 1
        self._read_at = float("-inf")

    async def load(self, engine_id: UUID) -> tuple[Engine, datetime] | None:
        """One engine as it is now, and the database's clock."""
        row = await self._database.fetch_one(_LOAD, id=engine_id)
        return None if row is None else (from_row(row), row["now"])

    async def standings(self) -> Sequence[Standing]:
        """All engines as they are now, with what is not folded."""
        rows = await self._database.fetch(_STANDINGS)
        return [Standing(from_row(row), row["now"], row["last_seen_at"], row["swept_at"]) for row in rows]

    async def saw(self, name: str, *, throttle: float) -> None:
        """A worker reached the engine just now. Written when the last time is more than `throttle` seconds ago."""
        await self._database.fetch(_SEEN, name=name, age=throttle)

    async def claim_sweep(self, name: str, *, age: float) -> datetime | None:
        """Take the sweep of an engine when the last one began at least `age` seconds ago. None = it is not due."""
        row = await self._database.fetch_one(_CLAIM_SWEEP, name=name, age=age)
        return None if row is None else row["swept_at"]

    async def return_sweep(self, name: str, claimed: datetime) -> None:
        """The sweep failed: it is due again, unless another began since."""
        await self._database.fetch(_RETURN_SWEEP, name=name, claimed=claimed)


def from_row(row: asyncpg.Record) -> Engine:
    """The state that the row is a snapshot of."""
    return Engine(
        id=UUID(int=row["id"].int),
        tenant=row["tenant"],
        version=row["version"],
        position=row["position"],
        schema=row["schema"],
        name=row["name"],
        kind=row["kind"],
        engine_id=row["engine_id"],
        mark=row["mark"],
        epoch=row["epoch"],
        state=_state(row["state"]),
        state_since=row["state_since"],
        labels=_decode_labels(row["labels"]),
        capabilities=_decode_capabilities(row["capabilities"]),
        capacity=_decode_capacity(row["capacity"]),
        agents=_decode_labels(row["agents"]),
        network=None if row["network"] is None else _decode_network(row["network"]),
        server_version=row["server_version"],
        api_version=row["api_version"],
        trouble=row["trouble"],
        trusted_position=row["trusted_position"],
    )


def _state(word: str) -> EngineState:
    """A word of a newer version says nothing that this one could act on: nothing is placed there, nothing concluded."""
    try:
        return EngineState(word)
    except ValueError:
        return EngineState.DARK
