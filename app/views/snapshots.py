"""The `snapshots` row as head of the stream: reads of one, of many, and of what still uses one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
from msgspec import Struct
from sqlalchemy import (
    BigInteger,
    Boolean,
    Integer,
    Text,
    Uuid,
    any_,
    bindparam,
    case,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.domain.sandbox.state import RuntimeState
from app.domain.snapshot import events as ev
from app.domain.snapshot.state import Snapshot, SnapshotState
from app.domain.tenants import ANY_TENANT, AnyTenant
from app.errors import UnknownEvent
from app.store.database.statement import Connections, Statement
from app.store.log.append import Effect, Parts, head_columns, insert_head, update_head
from app.store.tables import reconcile_queue, sandboxes, snapshots

MAX_COUNTED = 10_000
"""Lists are counted exactly up to here (decision 34)."""
_S = snapshots.c
_ALWAYS = (
    *(_S.version, _S.schema, _S.state, _S.reason, _S.message),
    *(_S.raw_id, _S.image_id, _S.size_bytes, _S.frozen_ms),
)
_ONCE = (_S.sandbox_id, _S.name, _S.engine, _S.generation, _S.run)


def _begin(parts: Parts) -> dict[str, Any]:
    now = parts.clock.c.now
    columns = head_columns([*_ALWAYS, *_ONCE])
    return {**columns, "created_at": now, "changed_at": now, "since_position": parts.first - 1}


def _move(parts: Parts) -> dict[str, Any]:
    moved = case((bindparam("state_moved", type_=Boolean), parts.now), else_=_S.changed_at)
    removed = case((bindparam("removes", type_=Boolean), parts.now), else_=_S.removed_at)
    return {**head_columns(_ALWAYS), "changed_at": moved, "removed_at": removed}


begin: Effect = insert_head(snapshots, _begin)
"""The first head row. Parameters: those of `values`."""
move: Effect = update_head(snapshots, _move)
"""The next head row. Parameters: those of `values`, state_moved, removes, expected."""


def values(snapshot: Snapshot) -> dict[str, Any]:
    """Parameters of a head row."""
    return {
        "tenant": snapshot.tenant,
        "version": snapshot.version,
        "schema": snapshot.schema,
        "state": snapshot.state.value,
        "reason": snapshot.reason,
        "message": snapshot.message,
        "raw_id": snapshot.raw_id,
        "image_id": snapshot.image_id,
        "size_bytes": snapshot.size_bytes,
        "frozen_ms": snapshot.frozen_ms,
        "sandbox_id": snapshot.sandbox_id,
        "name": snapshot.name,
        "engine": snapshot.engine,
        "generation": snapshot.generation,
        "run": snapshot.run,
    }


_COLUMNS = (*snapshots.c,)
_WITH_CLOCK = (*_COLUMNS, func.clock_timestamp().label("now"))
_BY_ID = _S.id == bindparam("id", type_=Uuid)
_LOAD = Statement(select(*_WITH_CLOCK).where(_BY_ID))
_LOCK = Statement(select(*_WITH_CLOCK).where(_BY_ID).with_for_update())
_SHARE = Statement(select(*_WITH_CLOCK).where(_BY_ID).with_for_update(read=True))
_USERS = Statement(
    select(sandboxes.c.id)
    .where(
        sandboxes.c.spec["snapshot_id"].astext == bindparam("snapshot_id", type_=Text),
        sandboxes.c.tenant == bindparam("tenant", type_=Text),
        sandboxes.c.closed_at.is_(None),
        sandboxes.c.observed != RuntimeState.REMOVED,
    )
    .order_by(sandboxes.c.id)
    .limit(literal_column("100", Integer))
)
_OF_ENGINE = Statement(
    select(*_COLUMNS)
    .where(
        _S.engine == bindparam("engine", type_=Text), _S.removed_at.is_(None), _S.id > bindparam("after", type_=Uuid)
    )
    .order_by(_S.id)
    .limit(bindparam("limit", type_=Integer))
)
_TROUBLE = Statement(
    select(reconcile_queue.c.last_error).where(reconcile_queue.c.stream_id == bindparam("id", type_=Uuid))
)
_LOCK_SOURCE = Statement(
    select(sandboxes.c.id).where(sandboxes.c.id == bindparam("id", type_=Uuid)).with_for_update(key_share=True)
)
_CREATING = Statement(
    select(func.count().label("creating"))
    .select_from(snapshots)
    .where(
        _S.sandbox_id == bindparam("sandbox_id", type_=Uuid),
        _S.removed_at.is_(None),
        _S.state == SnapshotState.CREATING,
    )
)
_SOME = Statement(select(*_COLUMNS).where(_S.id == any_(bindparam("ids", type_=ARRAY(Uuid)))))


class Wanted(Struct, frozen=True):
    """Which snapshots a list shows."""

    tenant: str
    sandbox_id: UUID | None = None
    name: str | None = None
    states: tuple[str, ...] | None = None
    """Any of these; None = every one."""


class Page(Struct, frozen=True):
    """Rows in order, and how many there are in all."""

    snapshots: tuple[Snapshot, ...]
    total: int
    is_lower_bound: bool = False


class SnapshotsView:
    """Reads of snapshots."""

    def __init__(self, database: Connections) -> None:
        self._database = database

    async def load(self, snapshot_id: UUID, tenant: str | AnyTenant) -> tuple[Snapshot, datetime] | None:
        """The snapshot, removed ones too, and the database's clock. None when it is absent or another tenant's."""
        return loaded(await self._database.fetch_one(_LOAD, id=snapshot_id), tenant)

    async def trouble(self, snapshot: Snapshot) -> str | None:
        """Why the last attempt to make or to remove it failed. None = none has, or it needs no attempt any more.

        The queue is read by id alone, so this takes a snapshot that the caller has read as one of a tenant.
        """
        if snapshot.state not in (SnapshotState.CREATING, SnapshotState.DELETING):
            return None
        row = await self._database.fetch_one(_TROUBLE, id=snapshot.id)
        return None if row is None else row["last_error"] or None

    async def page(self, wanted: Wanted, *, size: int, offset: int) -> Page:
        """Newest first."""
        rows = await self._database.fetch(
            _page(wanted.sandbox_id is not None, wanted.name is not None, wanted.states is not None),
            tenant=wanted.tenant,
            sandbox_id=wanted.sandbox_id,
            name=wanted.name,
            states=None if wanted.states is None else list(wanted.states),
            size=size,
            offset=offset,
        )
        total = rows[0]["d_total"]
        found = [from_row(row) for row in rows if row["id"] is not None]
        found.sort(key=lambda snapshot: (snapshot.created_at, snapshot.id), reverse=True)
        return Page(tuple(found), min(total, MAX_COUNTED), total > MAX_COUNTED)

    async def of_engine(self, engine: str, after: UUID, limit: int) -> Sequence[Snapshot]:
        """Those of one engine that were not removed, by id."""
        return [
            from_row(row) for row in await self._database.fetch(_OF_ENGINE, engine=engine, after=after, limit=limit)
        ]

    async def some(self, ids: Sequence[UUID]) -> dict[UUID, Snapshot]:
        """Those of these that there ever were, of any tenant."""
        found = [from_row(row) for row in await self._database.fetch(_SOME, ids=list(ids))]
        return {snapshot.id: snapshot for snapshot in found}


def _page(of_sandbox: bool, named: bool, in_states: bool) -> Statement:
    return _PAGES[of_sandbox, named, in_states]


def _page_statement(of_sandbox: bool, named: bool, in_states: bool) -> Statement:
    conditions: list[Any] = [_S.tenant == bindparam("tenant", type_=Text), _S.removed_at.is_(None)]
    if of_sandbox:
        conditions.append(_S.sandbox_id == bindparam("sandbox_id", type_=Uuid))
    if named:
        conditions.append(_S.name == bindparam("name", type_=Text))
    if in_states:
        conditions.append(_S.state == any_(bindparam("states", type_=ARRAY(Text))))
    page = select(*_COLUMNS).where(*conditions).order_by(_S.created_at.desc(), _S.id.desc())
    page = (
        page.limit(bindparam("size", type_=BigInteger)).offset(bindparam("offset", type_=BigInteger)).subquery("page")
    )
    some = select(literal_column("1", Integer)).select_from(snapshots).where(*conditions)
    counted = some.limit(literal_column(str(MAX_COUNTED + 1), BigInteger)).subquery("counted")
    total = select(func.count().label("total")).select_from(counted).subquery("total")
    joined = total.outerjoin(page, literal_column("true"))
    return Statement(select(total.c.total.label("d_total"), *page.c).select_from(joined))


_EITHER = (False, True)
_PAGES = {
    (of_sandbox, named, in_states): _page_statement(of_sandbox, named, in_states)
    for of_sandbox in _EITHER
    for named in _EITHER
    for in_states in _EITHER
}


async def load_locked(on: Any, snapshot_id: UUID, tenant: str | AnyTenant) -> tuple[Snapshot, datetime] | None:
    """As `load`, and hold the row for the rest of the transaction: no sandbox can be made from it meanwhile."""
    return loaded(await on.fetch_one(_LOCK, id=snapshot_id), tenant)


async def load_shared(on: Any, snapshot_id: UUID, tenant: str) -> Snapshot | None:
    """As `load`, and keep others from changing the row for the rest of the transaction."""
    found = loaded(await on.fetch_one(_SHARE, id=snapshot_id), tenant)
    return None if found is None else found[0]


async def users(on: Any, snapshot_id: UUID, tenant: str) -> tuple[UUID, ...]:
    """Sandboxes of this tenant that were made from it and may still have a container; at most a hundred."""
    rows = await on.fetch(_USERS, snapshot_id=str(snapshot_id), tenant=tenant)
    return tuple(UUID(int=row["id"].int) for row in rows)


async def creating_of(on: Any, sandbox_id: UUID) -> int:
    """How many of this sandbox are Creating. Until the end of the transaction no other request counts them."""
    await on.fetch_one(_LOCK_SOURCE, id=sandbox_id)
    row = await on.fetch_one(_CREATING, sandbox_id=sandbox_id)
    return int(row["creating"])


def is_newer(snapshot: Snapshot) -> bool:
    """Whether a newer version appended to it; this one must leave it alone."""
    return snapshot.schema > ev.REGISTRY.revision


def loaded(row: asyncpg.Record | None, tenant: str | AnyTenant) -> tuple[Snapshot, datetime] | None:
    """What a row says to this tenant."""
    if row is None or (tenant is not ANY_TENANT and row["tenant"] != tenant):
        return None
    return from_row(row), row["now"]


def from_row(row: asyncpg.Record) -> Snapshot:
    """The state that the row holds.

    Raises:
        UnknownEvent: a newer version wrote it, in words that this one does not know.
    """
    try:
        state = SnapshotState(row["state"])
    except ValueError as error:
        raise UnknownEvent(f"snapshot {row['id']} was written by a newer version: {error}") from error
    return Snapshot(
        id=UUID(int=row["id"].int),
        tenant=row["tenant"],
        version=row["version"],
        position=row["position"],
        schema=row["schema"],
        sandbox_id=UUID(int=row["sandbox_id"].int),
        engine=row["engine"],
        generation=row["generation"],
        run=row["run"],
        created_at=row["created_at"],
        changed_at=row["changed_at"],
        since_position=row["since_position"],
        name=row["name"],
        state=state,
        reason=row["reason"],
        message=row["message"],
        raw_id=row["raw_id"],
        image_id=row["image_id"],
        size_bytes=row["size_bytes"],
        frozen_ms=row["frozen_ms"],
        removed_at=row["removed_at"],
    )
