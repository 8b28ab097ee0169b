"""The append: one statement that guards the stream, writes the events, moves the head row, and does every effect.

**Protocol.** Four parts, each a common table expression, run in this order:

1. `guard` answers the stream's id and tenant, or no row. For a stream that exists it locks the head row and compares
   its version; for a new stream it is the given id, or the insert of an idempotency key that was not there before.
2. `written` inserts the events *from* `guard`. When the guard has no row, nothing is written and no row comes back:
   no row = conflict, no exception, no half-write.
3. `head` writes the head row with the position of the last event. Every other effect (queue row, deadlines, sealed
   values) also selects from `guard`.
4. The statement answers (position, recorded_at) of the last event, and whether the one effect that it reports on
   changed a row. The other effects always do what they are for.

**Invariants.** All times in one append are one reading of the database's clock, so `recorded_at` equals the head row's
times exactly. The answer is selected from `guard` first, so the head row is locked before the insert announces its
position (`app.store.log.store` explains the announcement). In the other order a writer that waits for a locked row
would hold back every reader of the log for as long. The effects come after the announcement: one that waits for the row
of the queue does hold readers back, for as long as a statement on the queue takes.

**How it fails.** Two that begin one stream with the same id meet in the head table's primary key: UniqueViolation. It
happens only where an id is derived, and the service reads it as a conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeAlias
from uuid import UUID

import msgspec
from msgspec import Struct
from sqlalchemy import (
    CTE,
    Column,
    ColumnElement,
    Integer,
    SmallInteger,
    Table,
    Text,
    Uuid,
    bindparam,
    cast,
    column,
    false,
    func,
    insert,
    literal,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql import insert as upsert

from app.domain.stream import Encoded, Meta
from app.store.database.statement import Executor, Statement
from app.store.tables import events, idempotency_keys


class Parts(Struct, frozen=True):
    """What an effect may select from."""

    kind: str
    clock: CTE
    guard: CTE
    last: CTE

    @property
    def now(self) -> ColumnElement[datetime]:
        """The append's one reading of the clock."""
        return select(self.clock.c.now).scalar_subquery()

    @property
    def first(self) -> ColumnElement[int]:
        """Position of the first event. Those of other appends may lie between it and the last."""
        return select(self.last.c.first).scalar_subquery()

    @property
    def position(self) -> ColumnElement[int]:
        """Position of the last event."""
        return select(self.last.c.position).scalar_subquery()


Effect: TypeAlias = Callable[[Parts], CTE]
"""Builds a data-modifying expression that does nothing when the guard has no row."""


class Written(Struct, frozen=True):
    """Where the last event of an append stands."""

    position: int
    at: datetime
    reported: bool = False
    """The effect that the statement reports on changed a row."""


def create_statement(kind: str, head: Effect, effects: Sequence[Effect] = (), *, keyed: bool = False) -> Statement:
    """The append that begins a stream. Parameters: id, tenant, events, meta, those of the effects; keyed: digest,
    fingerprint.
    """
    clock = _clock()
    stream_id, tenant = bindparam("id", type_=Uuid), bindparam("tenant", type_=Text)
    guard = select(stream_id.label("id"), tenant.label("tenant")).cte("guard")
    if keyed:
        row = select(
            tenant,
            bindparam("digest", type_=Text),
            literal(kind),
            stream_id,
            bindparam("fingerprint", type_=Text),
            clock.c.now,
        )
        keys = idempotency_keys.c
        guard = (
            upsert(idempotency_keys)
            .from_select(["tenant", "digest", "kind", "stream_id", "fingerprint", "made_at"], row.select_from(clock))
            .on_conflict_do_nothing(index_elements=[keys.tenant, keys.digest])
            .returning(keys.stream_id.label("id"), keys.tenant)
            .cte("guard")
        )
    return _statement(kind, clock, guard, [head, *effects])


def append_statement(
    kind: str, heads: Table, head: Effect, effects: Sequence[Effect] = (), *, report: Effect | None = None
) -> Statement:
    """The append to a stream that exists. Parameters: id, expected (version), events, meta, those of the effects.

    `report` is one more effect; `Written.reported` says whether it changed a row.
    """
    guard = (
        select(heads.c.id, heads.c.tenant)
        .where(heads.c.id == bindparam("id", type_=Uuid), heads.c.version == bindparam("expected", type_=Integer))
        .with_for_update()
        .cte("guard")
    )
    return _statement(kind, _clock(), guard, [head, *effects], report)


def _clock() -> CTE:
    return select(func.clock_timestamp().label("now")).cte("clock")


def _statement(kind: str, clock: CTE, guard: CTE, effects: Sequence[Effect], report: Effect | None = None) -> Statement:
    given = (
        func.jsonb_to_recordset(cast(bindparam("events", type_=Text), JSONB))
        .table_valued(column("v", Integer), column("t", Text), column("s", SmallInteger), column("d", JSONB))
        .render_derived(name="event", with_types=True)
    )
    rows: Any = (
        select(
            guard.c.id,
            literal(kind),
            guard.c.tenant,
            given.c.v,
            given.c.t,
            given.c.s,
            given.c.d,
            cast(bindparam("meta", type_=Text), JSONB),
            clock.c.now,
        )
        .select_from(guard.join(clock, literal_column("true")).join(given, literal_column("true")))
        # The order of insertion is the order of positions.
        .order_by(given.c.v)
    )
    names = ["stream_id", "kind", "tenant", "version", "type", "schema", "data", "meta", "recorded_at"]
    written = insert(events).from_select(names, rows).returning(events.c.position, events.c.recorded_at).cte("written")
    last = select(func.min(written.c.position).label("first"), func.max(written.c.position).label("position")).cte(
        "last"
    )
    parts = Parts(kind, clock, guard, last)
    reported = false() if report is None else select(report(parts)).exists()
    return Statement(
        select(
            func.max(written.c.position).label("position"),
            func.max(written.c.recorded_at).label("recorded_at"),
            reported.label("reported"),
        )
        .select_from(guard.outerjoin(written, literal_column("true")))
        .having(func.count(written.c.position) > 0)
        .add_cte(*[effect(parts) for effect in effects])
    )


def head_columns(columns: Sequence[Column[Any]]) -> dict[str, Any]:
    """A parameter for each column, under the column's name. JSON passes as text."""
    return {
        found.name: cast(bindparam(found.name, type_=Text), JSONB)
        if isinstance(found.type, JSONB)
        else bindparam(found.name, type_=found.type)
        for found in columns
    }


def insert_head(heads: Table, values: Callable[[Parts], dict[str, Any]]) -> Effect:
    """Version 1 of a head row: id, tenant and position come from the append, the rest from `values`."""

    def effect(parts: Parts) -> CTE:
        row = {
            "id": parts.guard.c.id,
            "tenant": parts.guard.c.tenant,
            "position": parts.position,
            **values(parts),
        }
        source = select(*[value.label(name) for name, value in row.items()]).select_from(
            parts.guard.join(parts.clock, literal_column("true"))
        )
        return insert(heads).from_select(list(row), source).returning(heads.c.id).cte("head")

    return effect


def update_head(heads: Table, values: Callable[[Parts], dict[str, Any]]) -> Effect:
    """The next version of a head row. The guard holds its lock."""

    def effect(parts: Parts) -> CTE:
        return (
            heads.update()
            .where(heads.c.id == select(parts.guard.c.id).scalar_subquery(), parts.position.is_not(None))
            .values(position=parts.position, **values(parts))
            .returning(heads.c.id)
            .cte("head")
        )

    return effect


async def append(
    database: Executor,
    statement: Statement,
    stream_id: UUID,
    encoded: Sequence[Encoded],
    *,
    after: int,
    meta: Meta,
    **values: Any,
) -> Written | None:
    """Run an append: events with the versions that follow `after`. None = the guard had no row."""
    rows = [
        {"v": version, "t": event.type, "s": event.schema, "d": event.data}
        for version, event in enumerate(encoded, after + 1)
    ]
    row = await database.fetch_one(
        statement,
        id=stream_id,
        events=msgspec.json.encode(rows).decode(),
        meta=msgspec.json.encode(meta).decode(),
        **values,
    )
    return None if row is None else Written(row["position"], row["recorded_at"], row["reported"])
