"""What an append does to the deadlines, in the same statement: no stream with a deadline and without its row can exist.

The append brings the difference between the deadlines before and after (`app.domain.sandbox.deadlines`) as one JSON
array of {n: name, at: instant or null, s: seconds from now or null, gone: bool}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import (
    CTE,
    Boolean,
    DateTime,
    Double,
    Text,
    bindparam,
    cast,
    column,
    delete,
    func,
    literal,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB, insert

from app.domain.sandbox.deadlines import Due
from app.store.database.times import SECOND
from app.store.log.append import Parts
from app.store.tables import deadlines


def parameters(changes: Mapping[str, Due | None]) -> dict[str, Any]:
    """The parameter of `set_deadlines` and `clear_deadlines`."""
    rows = [
        {"n": name, "at": due and due.at, "s": due and due.after_s, "gone": due is None}
        for name, due in changes.items()
    ]
    return {"deadlines": msgspec.json.encode(rows).decode()}


def _changes() -> Any:
    return (
        func.jsonb_to_recordset(cast(bindparam("deadlines", type_=Text), JSONB))
        .table_valued(
            column("n", Text), column("at", DateTime(timezone=True)), column("s", Double), column("gone", Boolean)
        )
        .render_derived(name="change", with_types=True)
    )


def set_deadlines(parts: Parts) -> CTE:
    """Write each deadline that is new or moved."""
    change, guard, clock = _changes(), parts.guard, parts.clock
    fires_at = func.coalesce(change.c.at, clock.c.now + change.c.s * SECOND)
    source: Any = (
        select(
            guard.c.id, change.c.n, literal(parts.kind), guard.c.tenant, fires_at, fires_at, literal(0), parts.position
        )
        .select_from(guard.join(clock, literal_column("true")).join(change, literal_column("true")))
        .where(~change.c.gone)
    )
    names = ["stream_id", "name", "kind", "tenant", "fires_at", "next_run_time", "attempts", "cause"]
    statement = insert(deadlines).from_select(names, source)
    new = statement.excluded
    return (
        statement.on_conflict_do_update(
            index_elements=["stream_id", "name"],
            set_={"fires_at": new.fires_at, "next_run_time": new.next_run_time, "attempts": 0, "cause": new.cause},
        )
        .returning(deadlines.c.stream_id)
        .cte("deadlines_set")
    )


def clear_deadlines(parts: Parts) -> CTE:
    """Delete each deadline that is over."""
    change = _changes()
    return (
        delete(deadlines)
        .where(
            deadlines.c.stream_id == select(parts.guard.c.id).scalar_subquery(),
            deadlines.c.name.in_(select(change.c.n).where(change.c.gone)),
        )
        .returning(deadlines.c.stream_id)
        .cte("deadlines_cleared")
    )
