"""The property that holds for every stream at every time: the fold of its events equals its head row, and its deadlines
are those of its state.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from uuid import UUID

from sqlalchemy import distinct, func, select

from app.domain.engine import events as engine_events
from app.domain.engine.state import fold as fold_engine
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import EXPIRY, TRANSITION, Limits
from app.domain.sandbox.state import Phase, Sandbox, fold
from app.service.streams import decoded
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.store import EventLog
from app.store.tables import deadlines, events, operations, sandboxes
from app.views import current, engines

_HEADS = Statement(select(*current.COLUMNS))
_ENGINES = Statement(select(*engines.COLUMNS))
_STREAMS = Statement(select(func.count(distinct(events.c.stream_id))))
_DEADLINES = Statement(select(deadlines.c.stream_id, deadlines.c.name, deadlines.c.fires_at))


async def assert_no_drift(dsn: str) -> int:
    """Refold every stream. Says how many sandboxes there were."""
    database = Database(dsn)
    try:
        log = EventLog(database)
        heads = [current.from_row(row) for row in await database.fetch(_HEADS)]
        due = defaultdict(dict)
        for row in await database.fetch(_DEADLINES):
            due[UUID(int=row["stream_id"].int)][row["name"]] = row["fires_at"]
        for head in heads:
            stored = [one async for one in log.whole_history(head.id, head.tenant)]
            assert [one.version for one in stored] == list(range(1, len(stored) + 1)), f"versions of {head.id}"
            assert {one.kind for one in stored} == {"sandbox"}
            assert fold(decoded(ev.REGISTRY, one) for one in stored) == head, (
                f"stream {head.id} does not fold to its row"
            )
            _assert_deadlines(head, due.pop(head.id, {}))
        assert not due, "a deadline without a stream"
        rows = await database.fetch(_ENGINES)
        for engine in map(engines.from_row, rows):
            stored = [one async for one in log.whole_history(engine.id, engine.tenant)]
            assert fold_engine(decoded(engine_events.REGISTRY, one) for one in stored) == engine
        streams = (await database.fetch(_STREAMS))[0][0]
        known = len(await database.fetch(Statement(select(sandboxes.c.id))))
        known += len(rows) + len(await database.fetch(Statement(select(operations.c.id))))
        assert streams <= known, "an event without a head row"
        return len(heads)
    finally:
        await database.close()


def _assert_deadlines(head: Sandbox, found: dict[str, object]) -> None:
    alive = head.ending is None
    assert found.get(EXPIRY) == (head.expires_at if alive else None), f"expiry of {head.id}"
    transitional = head.closed_at is None and Limits().of(head.phase) is not None
    assert (TRANSITION in found) == transitional, f"transition of {head.id} in {head.phase}: {found}"
    if transitional and head.phase is not Phase.STOPPING:
        # Tests may set limits of their own; the deadline then lies elsewhere, but never before the phase began.
        assert found[TRANSITION] >= head.changed_at + timedelta(0)  # pyright: ignore[reportOperatorIssue]
