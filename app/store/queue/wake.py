"""Queue rows that may be worked on again, because their engine can be used again."""

from __future__ import annotations

from sqlalchemy import Text, bindparam, func, or_, select, update

from app.store.database.statement import Connections, Statement
from app.store.tables import reconcile_queue

_Q = reconcile_queue.c
_NOW = select(func.clock_timestamp()).scalar_subquery()


def _wake() -> Statement:
    waiting = (
        select(_Q.stream_id)
        .where(
            _Q.engine.in_(("", bindparam("engine", type_=Text))),
            _Q.due_at > _NOW,
            # A claim that is held ends by itself; its row would otherwise be claimed a second time.
            or_(_Q.lease_until.is_(None), _Q.lease_until <= _NOW),
        )
        # In the order of ids, as every statement that waits for several rows.
        .order_by(_Q.stream_id)
        .with_for_update()
        .cte("waiting")
    )
    return Statement(
        update(reconcile_queue)
        .where(_Q.stream_id.in_(select(waiting.c.stream_id)))
        .values(due_at=_NOW)
        .returning(_Q.stream_id)
    )


_WAKE = _wake()


async def make_engine_due(connections: Connections, engine: str) -> int:
    """Rows of this engine, and rows of no engine yet, are due now. Says how many that were."""
    return len(await connections.fetch(_WAKE, engine=engine))
