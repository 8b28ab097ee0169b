"""The append: one statement that writes the guarded head row, the events, and every effect.

The caller brings a `head` CTE (an insert that does nothing on conflict, or an update guarded by the expected version)
that returns `id` and `tenant`, built with the `clock` given here. Events are inserted *from* `head`, so when the guard
fails nothing is written and no row comes back: no row = conflict, no exception, no half-write. Effects (queue touch,
expiry job, sealed values) select from `head` for the same reason.

All times in one append are one reading of the database's clock, so `recorded_at` equals the head row's times exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import CTE, Integer, SmallInteger, Text, bindparam, cast, column, func, insert, literal_column, select
from sqlalchemy.dialects.postgresql import JSONB

from app.store.database.statement import Statement
from app.store.tables import events

Effect = Callable[[CTE, CTE, CTE], CTE]
"""(clock, head, written) -> a data-modifying CTE. `written` has the positions of the new events."""


def append_statement(make_head: Callable[[CTE], CTE], effects: Sequence[Effect]) -> Statement:
    """Compile. Parameters: `facts` (JSON array of {v, t, s, d}), `meta` (JSON), and those of head and effects.

    Answers one row (position, recorded_at) of the last event; none when the guard failed.
    """
    clock = select(func.clock_timestamp().label("now")).cte("clock")
    head = make_head(clock)
    facts = (
        func.jsonb_to_recordset(cast(bindparam("facts", type_=Text), JSONB))
        .table_valued(column("v", Integer), column("t", Text), column("s", SmallInteger), column("d", JSONB))
        .render_derived(name="fact", with_types=True)
    )
    source: Any = (
        select(
            head.c.id,
            head.c.tenant,
            facts.c.v,
            facts.c.t,
            facts.c.s,
            facts.c.d,
            cast(bindparam("meta", type_=Text), JSONB),
            clock.c.now,
        )
        .select_from(head.join(clock, literal_column("true")).join(facts, literal_column("true")))
        # The order of insertion is the order of positions.
        .order_by(facts.c.v)
    )
    names = ["stream_id", "tenant", "version", "type", "schema", "data", "meta", "recorded_at"]
    written = (
        insert(events).from_select(names, source).returning(events.c.position, events.c.recorded_at).cte("written")
    )
    return Statement(
        select(func.max(written.c.position).label("position"), func.max(written.c.recorded_at).label("recorded_at"))
        .having(func.count() > 0)
        .add_cte(*[effect(clock, head, written) for effect in effects])
    )
