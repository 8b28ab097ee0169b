"""Queue rows that may be worked on again, because their engine can be used again."""

from __future__ import annotations

from sqlalchemy import Text, bindparam, case, func, select, update

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
        )
        # In the order of ids, as every statement that waits for several rows.
        .order_by(_Q.stream_id)
        .with_for_update()
        .cte("waiting")
    )
    return Statement(
        update(reconcile_queue)
        .where(_Q.stream_id.in_(select(waiting.c.stream_id)))
        .values(
            # A claim that is held ends by itself; its row would otherwise be claimed a second time. But its holder may
            # have looked before the engine could be used, and wait for it: the revision tells it that there is news.
            revision=_Q.revision + 1,
            due_at=case((_Q.lease_until > _NOW, _Q.due_at), else_=_NOW),
        )
        .returning(_Q.stream_id)
    )


_WAKE = _wake()


async def make_engine_due(connections: Connections, engine: str) -> int:
    """Rows of this engine, and of no engine yet, are due now, or when their claims are given back. Says how many."""
    return len(await connections.fetch(_WAKE, engine=engine))
