"""What an append does to the queue, in the same statement: no stream with work and without a queue row can exist."""

from __future__ import annotations

from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    Text,
    Uuid,
    bindparam,
    case,
    delete,
    func,
    literal,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import insert

from app.store.log.append import Parts
from app.store.tables import reconcile_queue


def touch(parts: Parts) -> CTE:
    """Ask for attention: one row a stream, its revision rises; a running claim keeps its lease and sees the rise.

    Back-off is forgotten, since what is wanted has changed. Parameter: engine (empty = not placed).
    """
    queue = reconcile_queue.c
    guard, clock = parts.guard, parts.clock
    source = select(
        guard.c.id,
        literal(parts.kind),
        guard.c.tenant,
        bindparam("engine_queue", type_=Text),
        literal(1),
        clock.c.now,
        literal(0),
        literal(0),
        parts.position,
    ).select_from(guard.join(clock, literal_column("true")))
    names = ["stream_id", "kind", "tenant", "engine", "revision", "due_at", "priority", "attempts", "cause"]
    statement = insert(reconcile_queue).from_select(names, source)
    new = statement.excluded
    free = or_(queue.lease_until.is_(None), queue.lease_until <= new.due_at)
    return (
        statement.on_conflict_do_update(
            index_elements=["stream_id"],
            set_={
                "engine": new.engine,
                "revision": queue.revision + 1,
                "due_at": case((free, new.due_at), else_=queue.due_at),
                "priority": func.least(queue.priority, new.priority),
                "attempts": 0,
                "first_failed_at": None,
                "cause": new.cause,
            },
        )
        .returning(queue.stream_id)
        .cte("touched")
    )


def complete(parts: Parts) -> CTE:
    """End the claim with the append that leads to its goal. Its row stays when news came since the claim.

    A touch holds the lock on the head row, so only a hint can come between, and it raises the revision, which is
    compared once more at the row's lock. A stream that closes needs no comparison: no news can mean anything then.
    Parameters: lease_owner, claimed_revision, and `closes` of the head row.
    """
    queue = reconcile_queue.c
    unchanged = queue.revision == bindparam("claimed_revision", type_=BigInteger)
    return (
        delete(reconcile_queue)
        .where(
            queue.stream_id == select(parts.guard.c.id).scalar_subquery(),
            queue.lease_owner == bindparam("lease_owner", type_=Uuid),
            or_(unchanged, bindparam("closes", type_=Boolean)),
        )
        .returning(queue.stream_id)
        .cte("completed")
    )
