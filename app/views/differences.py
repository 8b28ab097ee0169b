"""What a sweep asks the database: open sandboxes, and the things that must not be there."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct
from sqlalchemy import (
    Double,
    Integer,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.domain.engine.state import EngineState
from app.domain.sandbox.state import Desired, Phase, Runtime, RuntimeState
from app.domain.snapshot.state import SnapshotState
from app.store.database.statement import Connections, Statement
from app.store.database.times import SECOND
from app.store.tables import deadlines, engines, reconcile_queue, sandboxes, snapshots

_OVERDUE_SECONDS = 120.0
_decode_runtime = msgspec.json.Decoder(Runtime).decode
_MAX_STRANDED_ROWS = 500
_S, _E, _Q, _N = sandboxes.c, engines.c, reconcile_queue.c, snapshots.c
_NOW = select(func.clock_timestamp()).scalar_subquery()
_OBJECT = func.coalesce(_S.object_id, _S.id)
_OF_ENGINE = and_(_S.engine == bindparam("engine", type_=Text), _S.closed_at.is_(None))
_WITH_QUEUE = sandboxes.outerjoin(reconcile_queue, _Q.stream_id == _S.id)


def _ago(seconds: Any) -> Any:
    return _NOW - seconds * SECOND


_OPEN = Statement(
    select(
        *(_S.id, _OBJECT.label("object_id"), _S.desired, _S.observed, _S.runtime.label("runtime")),
        _Q.stream_id.is_not(None).label("queued"),
        _S.frozen_by.is_not(None).label("frozen"),
    )
    .select_from(_WITH_QUEUE)
    .where(_OF_ENGINE, _S.id > bindparam("after", type_=Uuid))
    .order_by(_S.id)
    .limit(bindparam("limit", type_=Integer))
)
_IDS = bindparam("ids", type_=ARRAY(Uuid))
_STILL_OPEN = Statement(
    select(_OBJECT.label("object_id")).where(
        or_(_S.id == any_(_IDS), _S.object_id == any_(_IDS)), _S.closed_at.is_(None)
    )
)
_CLOCK = Statement(select(func.clock_timestamp().label("now")))
_WANTS_WORK = or_(
    *(_S.phase == phase for phase in (Phase.PENDING, Phase.PAUSING, Phase.RESUMING, Phase.STOPPING)),
    # What failed before any engine took it has nothing to be removed.
    and_(_S.failure.is_not(None), _S.observed != RuntimeState.REMOVED, _S.object_id.is_not(None)),
    # It is about to stand still for a snapshot, or to go on.
    and_(
        _S.frozen_by.is_not(None),
        or_(_S.frozen_by["run"].astext.is_(None), _S.frozen_by["thaw"].astext.is_not(None)),
    ),
)
_STRANDED = Statement(
    select(_S.id)
    .select_from(_WITH_QUEUE)
    .where(
        # A sandbox without an engine is everybody's.
        or_(_S.engine == bindparam("engine", type_=Text), _S.engine.is_(None)),
        _S.closed_at.is_(None),
        _WANTS_WORK,
        _Q.stream_id.is_(None),
        _S.changed_at < _ago(bindparam("age", type_=Double)),
    )
    .limit(_MAX_STRANDED_ROWS)
)
_STRANDED_SNAPSHOTS = Statement(
    select(_N.id)
    .select_from(snapshots.outerjoin(reconcile_queue, _Q.stream_id == _N.id))
    .where(
        _N.engine == bindparam("engine", type_=Text),
        _N.removed_at.is_(None),
        or_(*(_N.state == state for state in (SnapshotState.CREATING, SnapshotState.DELETING))),
        _Q.stream_id.is_(None),
        _N.changed_at < _ago(bindparam("age", type_=Double)),
    )
    .limit(_MAX_STRANDED_ROWS)
)
_OVERDUE = Statement(
    select(func.count().label("overdue"))
    .select_from(deadlines)
    .where(deadlines.c.fires_at < _ago(literal(_OVERDUE_SECONDS, Double)))
)
_UNSERVED = Statement(
    select(_S.engine, func.count().label("sandboxes"))
    .select_from(sandboxes.outerjoin(engines, _E.name == _S.engine))
    .where(
        _S.engine != bindparam("engine", type_=Text),
        _S.closed_at.is_(None),
        or_(
            _E.id.is_(None),
            _E.state == EngineState.DARK,
            func.coalesce(_E.last_seen_at, _E.state_since) < _ago(bindparam("age", type_=Double)),
        ),
    )
    .group_by(_S.engine)
)


class Known(Struct, frozen=True):
    """What the log says of an open sandbox, as far as a listing can contradict it."""

    id: UUID
    object_id: UUID
    desired: Desired
    observed: RuntimeState
    runtime_id: str | None
    """Of the part `main`."""
    queued: bool
    frozen: bool = False
    """It stands still for a snapshot, or is about to, or is to go on."""


async def open_sandboxes(connections: Connections, engine: str, page: int = 1000) -> AsyncIterator[Known]:
    """Open sandboxes of an engine by id, read `page` at a time."""
    after = UUID(int=0)
    while found := await _open_page(connections, engine, after, page):
        for sandbox in found:
            yield sandbox
        after = found[-1].id


async def _open_page(connections: Connections, engine: str, after: UUID, limit: int) -> Sequence[Known]:
    rows = await connections.fetch(_OPEN, engine=engine, after=after, limit=limit)
    return [
        Known(
            UUID(int=row["id"].int),
            UUID(int=row["object_id"].int),
            Desired(row["desired"]),
            RuntimeState(row["observed"]),
            _main(row["runtime"]),
            row["queued"],
            row["frozen"],
        )
        for row in rows
    ]


async def still_open(connections: Connections, object_ids: Sequence[UUID]) -> set[UUID]:
    """Those of these objects that belong to an open sandbox at this moment."""
    rows = await connections.fetch(_STILL_OPEN, ids=list(object_ids))
    return {UUID(int=row["object_id"].int) for row in rows}


async def clock(connections: Connections) -> datetime:
    """The time by the database's clock, which is the one that counts."""
    return (await connections.fetch(_CLOCK))[0]["now"]


async def stranded(connections: Connections, engine: str, age_s: float) -> list[UUID]:
    """Open sandboxes that have wanted work for so long and have no queue row."""
    rows = await connections.fetch(_STRANDED, engine=engine, age=age_s)
    return [UUID(int=row["id"].int) for row in rows]


async def stranded_snapshots(connections: Connections, engine: str, age_s: float) -> list[UUID]:
    """Snapshots that have been Creating or Deleting for so long and have no queue row."""
    rows = await connections.fetch(_STRANDED_SNAPSHOTS, engine=engine, age=age_s)
    return [UUID(int=row["id"].int) for row in rows]


async def overdue_deadlines(connections: Connections) -> int:
    """Deadlines that should have fired two minutes ago, of any stream."""
    return (await connections.fetch(_OVERDUE))[0]["overdue"]


async def unserved(connections: Connections, engine: str, age_s: float) -> dict[str, int]:
    """Open sandboxes by engine, for engines other than this one that no worker has reached for so long."""
    rows = await connections.fetch(_UNSERVED, engine=engine, age=age_s)
    return {row["engine"]: row["sandboxes"] for row in rows}


def _main(runtime: str | None) -> str | None:
    part = None if runtime is None else _decode_runtime(runtime).main
    return None if part is None else part.runtime_id
