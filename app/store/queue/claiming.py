"""The statement that claims due rows, fairly among tenants.

**Protocol.** For each lane (whose engine, which priority) the statement steps through the tenants that have rows, one
index probe a tenant (a loose index scan), and takes the earliest due rows of each. So what a round looks at does not
depend on how many rows one tenant has. These rows are then put in an order:

1. Within a tenant, rows count up from what it holds in this worker already. What lies above `tenant_slots` is left.
2. Across tenants, lower counts go first, then the earlier due time. So each tenant has its first row before any has its
   second.
3. Rows of the lane `USER` go before those of `BACKGROUND`, but for `background` rows that go first of all, so that
   sweeps are never starved.

**Invariants.** Only kinds that this version knows are claimed: a newer version may have put rows of its own here. Nor
are streams claimed that a newer version has written to (`left_alone`): its own workers would find them held.
A claim skips locked rows, and compares `due_at` again at the lock, so two claims never take one row.

**How it fails.** Where other claimers hold the locks on all rows that were looked at, the round brings none although
`due` says that there are some. The caller asks again a moment later.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    Double,
    Integer,
    SmallInteger,
    Text,
    Uuid,
    all_,
    any_,
    bindparam,
    case,
    column,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.store.database.statement import Statement
from app.store.database.times import SECOND
from app.store.tables import reconcile_queue

USER, BACKGROUND = 0, 1
SPARE_ROWS = 16
"""Rows that are looked at beyond the free slots, for those that other claimers have locked."""
_TRUE: ColumnElement[bool] = literal_column("true", Boolean)
_Q = reconcile_queue.c


def clock() -> Any:
    """One reading of the database's clock a statement. A subquery can bound an index scan; a bare function cannot."""
    reading = select(func.clock_timestamp().label("now")).cte("clock")
    return select(reading.c.now).scalar_subquery()


def later(now: Any, seconds: str) -> Any:
    """So many seconds after it, as a parameter of that name."""
    return now + bindparam(seconds, type_=Double) * SECOND


def _unnested(array: Any, of: Any) -> Any:
    return func.unnest(array).table_valued(of).render_derived(name=f"each_{of.name}")


def _tenants() -> CTE:
    """(engine, priority, tenant) of all rows, by one index probe each."""
    engines = _unnested(bindparam("engines", type_=ARRAY(Text)), column("engine", Text))
    lanes = _unnested(literal_column(f"ARRAY[{USER}, {BACKGROUND}]::smallint[]"), column("priority", SmallInteger))
    lane = select(engines.c.engine, lanes.c.priority).select_from(engines.join(lanes, _TRUE)).subquery("lane")

    def next_tenant(of: Any, *above: Any) -> Any:
        found = select(_Q.tenant).where(_Q.engine == of.c.engine, _Q.priority == of.c.priority, *above)
        return found.order_by(_Q.tenant).limit(1).lateral("found")

    first = next_tenant(lane)
    walk = (
        select(lane.c.engine, lane.c.priority, first.c.tenant)
        .select_from(lane.join(first, _TRUE))
        .cte("walk", recursive=True)
    )
    following = next_tenant(walk, _Q.tenant > walk.c.tenant)
    step = select(walk.c.engine, walk.c.priority, following.c.tenant).select_from(walk.join(following, _TRUE))
    return walk.union_all(step)


def _due(now: Any, slots: Any) -> CTE:
    """The earliest due rows of each tenant, a lane."""
    walk = _tenants()
    rows = (
        select(_Q.stream_id, _Q.due_at)
        .where(
            _Q.engine == walk.c.engine,
            _Q.priority == walk.c.priority,
            _Q.tenant == walk.c.tenant,
            _Q.due_at <= now,
            _Q.kind == any_(bindparam("kinds", type_=ARRAY(Text))),
            _Q.stream_id != all_(bindparam("left_alone", type_=ARRAY(Uuid))),
        )
        .order_by(_Q.due_at)
        .limit(slots + SPARE_ROWS)
        .lateral("rows")
    )
    return (
        select(walk.c.priority, walk.c.tenant, rows.c.stream_id, rows.c.due_at)
        .select_from(walk.join(rows, _TRUE))
        .cte("due")
    )


def _ordered(due: CTE) -> CTE:
    """Who goes first, as the module's docstring says. `turn` above the tenant's slots is not eligible."""
    background = bindparam("background", type_=Integer)
    lane_turn = func.row_number().over(partition_by=(due.c.priority, due.c.tenant), order_by=due.c.due_at)
    by_lane = select(due, lane_turn.label("lane_turn")).cte("by_lane")
    kept = (by_lane.c.priority == BACKGROUND) & (by_lane.c.lane_turn <= background)
    holds = (
        func.unnest(
            bindparam("held_tenants", type_=ARRAY(Text)),
            bindparam("held_counts", type_=ARRAY(BigInteger)),
        )
        .table_valued(column("tenant", Text), column("count", BigInteger))
        .render_derived(name="holds")
    )
    turn = func.coalesce(holds.c.count, 0) + func.row_number().over(
        partition_by=by_lane.c.tenant, order_by=(case((kept, 0), else_=1), by_lane.c.priority, by_lane.c.due_at)
    )
    by_turn = (
        select(by_lane, turn.label("turn"))
        .select_from(by_lane.outerjoin(holds, holds.c.tenant == by_lane.c.tenant))
        .cte("by_turn")
    )
    place = func.row_number().over(partition_by=by_turn.c.priority, order_by=(by_turn.c.turn, by_turn.c.due_at))
    placed = select(by_turn, place.label("place")).cte("placed")
    first = (placed.c.priority == BACKGROUND) & (placed.c.place <= background)
    order = func.row_number().over(order_by=(case((first, 0), else_=1), placed.c.priority, placed.c.place))
    eligible = placed.c.turn <= bindparam("tenant_slots", type_=Integer)
    return select(placed.c.stream_id, eligible.label("eligible"), order.label("order")).cte("ordered")


def _claim() -> Statement:
    now = clock()
    slots = bindparam("slots", type_=Integer)
    ordered = _ordered(_due(now, slots))
    first = (
        select(ordered.c.stream_id, ordered.c.order)
        .where(ordered.c.eligible)
        .order_by(ordered.c.order)
        .limit(slots + SPARE_ROWS)
        .cte("first")
    )
    picked = (
        select(_Q.stream_id)
        .join(first, first.c.stream_id == _Q.stream_id)
        .where(_Q.due_at <= now)
        .order_by(first.c.order)
        .limit(slots)
        .with_for_update(of=reconcile_queue, skip_locked=True)
        .cte("picked")
    )
    until = later(now, "lease")
    claimed = (
        update(reconcile_queue)
        .where(_Q.stream_id == picked.c.stream_id)
        .values(lease_owner=bindparam("owner", type_=Uuid), lease_until=until, due_at=until, progress=None)
        .returning(
            *(_Q.stream_id, _Q.kind, _Q.tenant, _Q.engine, _Q.revision, _Q.cause, _Q.attempts, _Q.last_reason),
            *(_Q.missing_since, _Q.first_failed_at),
        )
        .cte("claimed")
    )
    totals = select(
        func.count().filter(ordered.c.eligible).label("due"), func.count().filter(~ordered.c.eligible).label("above")
    ).cte("totals")
    return Statement(select(totals, claimed).select_from(totals.outerjoin(claimed, _TRUE)))


CLAIM = _claim()
"""Parameters: engines, kinds, left_alone, slots, tenant_slots, background, held_tenants, held_counts, lease, owner."""
