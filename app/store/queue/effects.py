"""What an append does to the workers' tables, in the same statement: no sandbox with work and no queue row, none with
a deadline and no expiry job, can exist.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import CTE, case, delete, func, literal, literal_column, or_, select
from sqlalchemy.dialects.postgresql import insert

from app.store.tables import expiry_jobs, reconcile_queue


def touch(clock: CTE, head: CTE, written: CTE) -> CTE:
    """Ask for attention: one row a sandbox, its generation rises; a running claim keeps its lease and sees the rise.

    Backoff is forgotten, since what is wanted has changed.
    """
    queue = reconcile_queue.c
    statement = insert(reconcile_queue).from_select(
        ["sandbox_id", "tenant", "driver", "generation", "due_at", "priority", "attempts", "cause"],
        select(
            head.c.id, head.c.tenant, head.c.driver, literal(1), clock.c.now, literal(0), literal(0), _position(written)
        ).select_from(head.join(clock, literal_column("true"))),
    )
    new = statement.excluded
    free = or_(queue.lease_until.is_(None), queue.lease_until <= new.due_at)
    return (
        statement.on_conflict_do_update(
            index_elements=["sandbox_id"],
            set_={
                "generation": queue.generation + 1,
                "due_at": case((free, new.due_at), else_=queue.due_at),
                "priority": func.least(queue.priority, new.priority),
                "attempts": 0,
                "first_failed_at": None,
                "cause": new.cause,
            },
        )
        .returning(queue.sandbox_id)
        .cte("touched")
    )


def schedule_expiry(_clock: CTE, head: CTE, written: CTE) -> CTE:
    """Write the expiry job of whoever has a deadline, or move it."""
    deadline = head.c.expires_at
    source = (
        select(head.c.id, deadline, deadline, literal(0), _position(written))
        .select_from(head)
        .where(deadline.is_not(None))
    )
    statement = insert(expiry_jobs).from_select(
        ["sandbox_id", "expires_at", "next_run_time", "attempts", "cause"], source
    )
    new = statement.excluded
    return (
        statement.on_conflict_do_update(
            index_elements=["sandbox_id"],
            set_={"expires_at": new.expires_at, "next_run_time": new.next_run_time, "attempts": 0, "cause": new.cause},
        )
        .returning(expiry_jobs.c.sandbox_id)
        .cte("scheduled")
    )


def cancel_expiry(_clock: CTE, head: CTE, _written: CTE) -> CTE:
    """It has ended: no more expiry."""
    return (
        delete(expiry_jobs)
        .where(expiry_jobs.c.sandbox_id == select(head.c.id).scalar_subquery())
        .returning(expiry_jobs.c.sandbox_id)
        .cte("cancelled")
    )


def _position(written: CTE) -> Any:
    return select(func.max(written.c.position)).scalar_subquery()
