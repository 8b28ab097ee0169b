"""The property that holds for every stream at every time: the fold of its events equals its head row."""

from __future__ import annotations

from sqlalchemy import distinct, func, select

from app.domain.sandbox.state import fold
from app.service.sandboxes import recorded
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.store import EventLog
from app.store.tables import events, sandboxes
from app.views.current import COLUMNS, from_row

_HEADS = Statement(select(*COLUMNS))
_STREAMS = Statement(select(func.count(distinct(events.c.stream_id))))


async def assert_no_drift(dsn: str) -> int:
    """Refold every stream. Says how many there were."""
    database = Database(dsn)
    try:
        log = EventLog(database)
        heads = [from_row(row) for row in await database.fetch(_HEADS)]
        for head in heads:
            facts = [recorded(stored) async for stored in log.whole_history(head.id, head.tenant)]
            assert [fact.version for fact in facts] == list(range(1, len(facts) + 1)), f"versions of {head.id}"
            assert fold(facts) == head, f"stream {head.id} does not fold to its head row"
        streams = (await database.fetch(_STREAMS))[0][0]
        known = len(await database.fetch(Statement(select(sandboxes.c.id))))
        assert streams <= known, "an event without a head row"
        return len(heads)
    finally:
        await database.close()
