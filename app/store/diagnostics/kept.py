"""The end of a sandbox's object: log and inspection, read before it was removed. The worker that reads it masks it.

One row a run. The first row that has a log stays: a removal that is asked for twice, or by two workers, finds a log
that is empty or gone the second time, and must not write that over what is kept. A row without a log, because the
engine did not give it in time, is replaced by one that has it.

A row is readable for the operator's time and then deleted, by any worker.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct
from sqlalchemy import (
    Boolean,
    Double,
    Integer,
    Text,
    Uuid,
    bindparam,
    cast,
    delete,
    func,
    select,
)
from sqlalchemy.dialects.postgresql import JSONB, insert

from app.domain.sandbox.diagnostics import Inspection, LogText
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.database.times import DAY, SECOND
from app.store.tables import kept_ends

_K = kept_ends.c
_NOW = func.clock_timestamp()
_PURGED_AT_ONCE = 1000
_OF_RUN = (
    (_K.stream_id == bindparam("stream_id", type_=Uuid))
    & (_K.generation == bindparam("generation", type_=Integer))
    & (_K.run == bindparam("run", type_=Integer))
)
_IS_DONE = Statement(
    select(_K.logs.is_not(None) | (_K.taken_at <= _NOW - bindparam("patience", type_=Double) * SECOND)).where(_OF_RUN)
)


def _keep() -> Statement:
    row = insert(kept_ends).values(
        stream_id=bindparam("stream_id", type_=Uuid),
        generation=bindparam("generation", type_=Integer),
        run=bindparam("run", type_=Integer),
        tenant=bindparam("tenant", type_=Text),
        taken_at=_NOW,
        logs=bindparam("logs", type_=Text),
        more=bindparam("more", type_=Boolean),
        inspect=cast(bindparam("inspect", type_=Text), JSONB),
        error=bindparam("error", type_=Text),
        keep_until=_NOW + bindparam("days", type_=Double) * DAY,
    )
    new = row.excluded
    replaced = {name: new[name] for name in ("taken_at", "logs", "more", "inspect", "error")}
    return Statement(
        row.on_conflict_do_update(
            index_elements=[_K.stream_id, _K.generation, _K.run],
            set_=replaced,
            where=_K.logs.is_(None) & new.logs.is_not(None),
        )
    )


_KEEP = _keep()
_READ = Statement(
    select(_K.logs, _K.more, _K.inspect, _K.error)
    .where(
        _K.stream_id == bindparam("stream_id", type_=Uuid),
        _K.tenant == bindparam("tenant", type_=Text),
        _K.keep_until > _NOW,
    )
    .order_by(_K.generation.desc(), _K.run.desc())
    .limit(1)
)
_OLD = (
    select(_K.stream_id, _K.generation, _K.run)
    .where(_K.keep_until <= _NOW)
    .order_by(_K.keep_until)
    .limit(_PURGED_AT_ONCE)
    .with_for_update(skip_locked=True)
    .cte("old")
)
_PURGE = Statement(
    delete(kept_ends)
    .where(_K.stream_id == _OLD.c.stream_id, _K.generation == _OLD.c.generation, _K.run == _OLD.c.run)
    .returning(_K.stream_id)
)
_decode = msgspec.json.Decoder(Inspection).decode


class Run(Struct, frozen=True):
    """Which end: of which run of which object."""

    stream_id: UUID
    generation: int
    run: int


class End(Struct, frozen=True):
    """What was read before the removal, without sealed values."""

    logs: LogText | None
    """None = the log could not be read; `error` says why."""
    inspection: Inspection | None
    error: str = ""


class KeptEnds:
    """The table `kept_ends`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def is_done(self, run: Run, patience: float) -> bool:
        """Whether its log is kept, or has been tried to be kept for so many seconds."""
        row = await self._database.fetch_one(_IS_DONE, **msgspec.structs.asdict(run), patience=patience)
        return row is not None and bool(row[0])

    async def keep(self, run: Run, tenant: str, end: End, *, days: float) -> None:
        """Store for so many days."""
        logs, inspection = end.logs, end.inspection
        await self._database.fetch(
            _KEEP,
            **msgspec.structs.asdict(run),
            tenant=tenant,
            logs=None if logs is None else logs.text,
            more=logs is not None and logs.more,
            inspect=None if inspection is None else msgspec.json.encode(inspection).decode(),
            error=end.error or None,
            days=days,
        )

    async def read(self, stream_id: UUID, tenant: str) -> End | None:
        """The last end of a sandbox of this tenant. None = there is none, or it is not kept any more."""
        row: Any = await self._database.fetch_one(_READ, stream_id=stream_id, tenant=tenant)
        if row is None:
            return None
        logs = None if row["logs"] is None else LogText(row["logs"], row["more"])
        inspection = None if row["inspect"] is None else _decode(row["inspect"])
        return End(logs, inspection, row["error"] or "")

    async def purge(self) -> int:
        """Delete what is not to be kept any more. Says how many rows that were."""
        purged = 0
        while found := len(await self._database.fetch(_PURGE)):
            purged += found
        return purged
