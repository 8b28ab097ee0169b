"""The property that holds for every stream at every time: the fold of its events equals its head row, its deadlines are
those of its state, and it has sealed values only while it may run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
from sqlalchemy import func, select

from app.domain import operations
from app.domain.engine import events as engine_events
from app.domain.engine.state import fold as fold_engine
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import EXPIRY, FREEZE, TRANSITION, Limits
from app.domain.sandbox.state import Phase, Sandbox, fold
from app.domain.snapshot import events as snapshot_events
from app.domain.snapshot.decide import COMMIT
from app.domain.snapshot.state import Snapshot, SnapshotState
from app.domain.snapshot.state import fold as fold_snapshot
from app.domain.stream import Registry
from app.service.streams import advance, decoded
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.store import EventLog, StoredEvent
from app.store.tables import deadlines, events, idempotency_keys, reconcile_queue, sandboxes, sealed_values
from app.store.tables import operations as operations_table
from app.store.tables import snapshots as snapshots_table
from app.views import current, engines, snapshots

_HEADS = Statement(select(*current.COLUMNS))
_SINCE = Statement(select(sandboxes.c.id, sandboxes.c.since_position))
_ENGINES = Statement(select(*engines.COLUMNS))
_SNAPSHOTS = Statement(select(snapshots_table))
_OPERATIONS = Statement(select(operations_table))
_STREAMS = Statement(
    select(events.c.stream_id, events.c.kind, func.count().label("count")).group_by("stream_id", "kind")
)
_DEADLINES = Statement(select(deadlines))
_BESIDE = {
    table.name: Statement(select(table.c.stream_id, table.c.kind, table.c.tenant))
    for table in (reconcile_queue, sealed_values, idempotency_keys, deadlines)
}


async def assert_no_drift(dsn: str) -> int:
    """Refold every stream. Says how many sandboxes there were."""
    database = Database(dsn)
    try:
        log = EventLog(database)
        known: dict[tuple[UUID, str], int] = {}
        heads = [current.from_row(row) for row in await database.fetch(_HEADS)]
        since = {UUID(int=row[0].int): row[1] for row in await database.fetch(_SINCE)}
        due = await _deadlines(database)
        for head in heads:
            stored = await _stored(log, ev.REGISTRY, head.id, head.tenant)
            known[head.id, "sandbox"] = len(stored)
            folded = fold(decoded(ev.REGISTRY, one) for one in stored)
            assert folded == head, f"stream {head.id} does not fold to its row"
            assert since[head.id] < stored[0].position, f"history of {head.id} would miss its first event"
            _assert_deadlines(head, due.pop(head.id, {}))
        taken = [snapshots.from_row(row) for row in await database.fetch(_SNAPSHOTS)]
        for snapshot in taken:
            stored = await _stored(log, snapshot_events.REGISTRY, snapshot.id, snapshot.tenant)
            known[snapshot.id, "snapshot"] = len(stored)
            assert fold_snapshot(decoded(snapshot_events.REGISTRY, one) for one in stored) == snapshot
            creating = snapshot.state is SnapshotState.CREATING
            assert set(due.pop(snapshot.id, {})) == ({COMMIT} if creating else set()), f"deadlines of {snapshot.id}"
        assert not due, "a deadline without a stream"
        for engine in map(engines.from_row, await database.fetch(_ENGINES)):
            stored = await _stored(log, engine_events.REGISTRY, engine.id, engine.tenant)
            known[engine.id, "engine"] = len(stored)
            assert fold_engine(decoded(engine_events.REGISTRY, one) for one in stored) == engine
        for row in await database.fetch(_OPERATIONS):
            found = operations.Operations(UUID(int=row["id"].int), *tuple(row)[1:])
            stored = await _stored(log, operations.REGISTRY, found.id, found.tenant)
            known[found.id, "operations"] = len(stored)
            recorded = [decoded(operations.REGISTRY, one) for one in stored]
            assert advance(operations.evolve, None, recorded) == found
        streams = {(UUID(int=row[0].int), row[1]): row[2] for row in await database.fetch(_STREAMS)}
        assert streams == known, "an event without a head row, or of another kind"
        await _assert_beside(database, {head.id: head for head in (*heads, *taken)})
        return len(heads)
    finally:
        await database.close()


async def _stored(log: EventLog, registry: Registry[Any], stream_id: UUID, tenant: str) -> list[StoredEvent]:
    stored = [one async for one in log.whole_history(stream_id, tenant)]
    assert [one.version for one in stored] == list(range(1, len(stored) + 1)), f"versions of {stream_id}"
    assert {one.kind for one in stored} == {registry.kind}
    positions = [one.position for one in stored]
    assert positions == sorted(positions), f"positions of {stream_id}"
    return stored


async def _deadlines(database: Database) -> dict[UUID, dict[str, asyncpg.Record]]:
    due: dict[UUID, dict[str, asyncpg.Record]] = defaultdict(dict)
    for row in await database.fetch(_DEADLINES):
        due[UUID(int=row["stream_id"].int)][row["name"]] = row
    return due


def _assert_deadlines(head: Sandbox, found: Mapping[str, asyncpg.Record]) -> None:
    fires_at: dict[str, datetime] = {name: row["fires_at"] for name, row in found.items()}
    alive = head.ending is None
    assert fires_at.get(EXPIRY) == (head.expires_at if alive else None), f"expiry of {head.id}"
    assert (FREEZE in fires_at) == head.holds_still, f"freeze of {head.id}"
    transitional = head.closed_at is None and Limits().of(head.phase) is not None
    assert (TRANSITION in fires_at) == transitional, f"transition of {head.id} in {head.phase}: {fires_at}"
    if transitional and head.phase is not Phase.STOPPING:
        # Tests may set limits of their own; the deadline then lies elsewhere, but never before the phase began.
        assert fires_at[TRANSITION] >= head.changed_at


async def _assert_beside(database: Database, heads: Mapping[UUID, Sandbox | Snapshot]) -> None:
    """Whatever stands beside a stream names its kind and its tenant; values are sealed only while it may run."""
    for name, statement in _BESIDE.items():
        for row in await database.fetch(statement):
            head = heads.get(UUID(int=row["stream_id"].int))
            assert head is not None, f"{name}: a row without a stream"
            kind = "sandbox" if isinstance(head, Sandbox) else "snapshot"
            assert (row["kind"], row["tenant"]) == (kind, head.tenant), f"{name} of {head.id}"
            assert name != "sealed_values" or (isinstance(head, Sandbox) and head.may_run), (
                f"{head.id} can never run again and keeps its values"
            )
