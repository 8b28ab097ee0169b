"""The `sandboxes` row as head of the stream: how a state becomes the row, and the row a state.

`head_insert` and `head_update` are the guards of the append (see `app.store.log.append`): the insert does nothing when
the id exists, the update does nothing when the version is another. They are two statements and not one clever upsert,
so that "expected 5 on a missing stream" cannot insert.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from sqlalchemy import (
    CTE,
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Double,
    Integer,
    Interval,
    Text,
    Uuid,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, insert

from app.domain.sandbox.events import EndCause
from app.domain.sandbox.spec import SandboxSpec
from app.domain.sandbox.state import Desired, Ending, Failure, Runtime, RuntimeState, Sandbox
from app.errors import UnknownEvent
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import sandboxes

_INTERVAL_SECOND: ColumnElement[timedelta] = literal_column("interval '1 second'", Interval)
_LAST_POSITION = literal_column("(SELECT last_value FROM sandledger.events_position)", BigInteger)


def _json(name: str) -> Any:
    return cast(bindparam(name, type_=Text), JSONB)


def head_insert(clock: CTE) -> CTE:
    """Version 1 of a stream. Parameters: id, tenant, version, driver, spec, metadata, fingerprint, timeout_s."""
    ttl = bindparam("timeout_s", type_=Double)
    row: dict[str, Any] = {
        "id": bindparam("id", type_=Uuid),
        "tenant": bindparam("tenant", type_=Text),
        "version": bindparam("version", type_=Integer),
        "phase": bindparam("phase", type_=Text),
        "driver": bindparam("driver", type_=Text),
        "desired": bindparam("desired", type_=Text),
        "observed": bindparam("observed", type_=Text),
        "spec": _json("spec"),
        "metadata": _json("metadata"),
        "fingerprint": bindparam("fingerprint", type_=Text),
        "created_at": clock.c.now,
        "changed_at": clock.c.now,
        "expires_at": clock.c.now + ttl * _INTERVAL_SECOND,
        "since_position": _LAST_POSITION - 1,
    }
    source = select(*[value.label(name) for name, value in row.items()]).select_from(clock)
    statement = insert(sandboxes).from_select(list(row), source).on_conflict_do_nothing(index_elements=["id"])
    return statement.returning(sandboxes.c.id, sandboxes.c.tenant, sandboxes.c.driver, sandboxes.c.expires_at).cte(
        "head"
    )


def head_update(clock: CTE) -> CTE:
    """The next version. Parameters: id, expected, and the mutable columns as `head_values` gives them."""
    now = select(clock.c.now).scalar_subquery()
    moved = bindparam("phase_moved", type_=Boolean)
    statement = (
        update(sandboxes)
        .where(
            sandboxes.c.id == bindparam("id", type_=Uuid), sandboxes.c.version == bindparam("expected", type_=Integer)
        )
        .values(
            version=bindparam("version", type_=Integer),
            phase=bindparam("phase", type_=Text),
            desired=bindparam("desired", type_=Text),
            observed=bindparam("observed", type_=Text),
            metadata=_json("metadata"),
            runtime=_json("runtime"),
            failure_reason=bindparam("failure_reason", type_=Text),
            failure_message=bindparam("failure_message", type_=Text),
            changed_at=case((moved, now), else_=sandboxes.c.changed_at),
            expires_at=bindparam("expires_at", type_=DateTime(timezone=True)),
            ended_at=_first_time("ends", sandboxes.c.ended_at, now),
            end_cause=bindparam("end_cause", type_=Text),
            ended_by=bindparam("ended_by", type_=Text),
            closed_at=_first_time("closes", sandboxes.c.closed_at, now),
        )
    )
    return statement.returning(sandboxes.c.id, sandboxes.c.tenant, sandboxes.c.driver, sandboxes.c.expires_at).cte(
        "head"
    )


def _first_time(flag: str, present: Any, now: Any) -> Any:
    return case((and_(bindparam(flag, type_=Boolean), present.is_(None)), now), else_=present)


def insert_values(box: Sandbox) -> dict[str, Any]:
    """Parameters of `head_insert`."""
    return {
        "id": box.id,
        "tenant": box.tenant,
        "version": box.version,
        "phase": box.phase.value,
        "driver": box.driver,
        "desired": box.desired.value,
        "observed": box.observed.value,
        "spec": msgspec.json.encode(box.spec).decode(),
        "metadata": msgspec.json.encode(box.metadata).decode(),
        "fingerprint": box.fingerprint,
        "timeout_s": None if box.spec.timeout_s is None else float(box.spec.timeout_s),
    }


def update_values(before: Sandbox, after: Sandbox) -> dict[str, Any]:
    """Parameters of `head_update`. Times other than the deadline come from the statement's clock."""
    return {
        "id": after.id,
        "expected": before.version,
        "version": after.version,
        "phase": after.phase.value,
        "desired": after.desired.value,
        "observed": after.observed.value,
        "metadata": msgspec.json.encode(after.metadata).decode(),
        "runtime": None if after.runtime is None else msgspec.json.encode(after.runtime).decode(),
        "failure_reason": after.failure and after.failure.reason,
        "failure_message": after.failure and after.failure.message,
        "phase_moved": after.changed_at != before.changed_at,
        "expires_at": after.expires_at,
        "ends": after.ending is not None,
        "end_cause": after.ending and after.ending.cause.value,
        "ended_by": after.ending and after.ending.by,
        "closes": after.closed_at is not None,
    }


COLUMNS = tuple(sandboxes.c)
_LOAD = Statement(
    select(*COLUMNS, func.clock_timestamp().label("now")).where(sandboxes.c.id == bindparam("id", type_=Uuid))
)


class CurrentView:
    """Reads of single sandboxes; lists are in `app.views.listing`."""

    def __init__(self, database: Database) -> None:
        """On an open database."""
        self._database = database

    async def load(self, sandbox_id: UUID, tenant: str | None = None) -> tuple[Sandbox, datetime] | None:
        """The sandbox and the database's clock. None when absent, or another tenant's (None = any tenant's)."""
        row = await self._database.fetch_one(_LOAD, id=sandbox_id)
        if row is None or (tenant is not None and row["tenant"] != tenant):
            return None
        return from_row(row), row["now"]


_decode_spec = msgspec.json.Decoder(SandboxSpec).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str]).decode
_decode_runtime = msgspec.json.Decoder(Runtime).decode


def from_row(row: asyncpg.Record) -> Sandbox:
    """The state that the row is a snapshot of.

    Raises:
        UnknownEvent: a newer version wrote it, in words that this one does not know.
    """
    try:
        return _from_row(row)
    except ValueError as error:  # also msgspec's
        raise UnknownEvent(f"sandbox {row['id']} was written by a newer version: {error}") from error


def _from_row(row: asyncpg.Record) -> Sandbox:
    runtime, reason, ended_at = row["runtime"], row["failure_reason"], row["ended_at"]
    return Sandbox(
        id=UUID(int=row["id"].int),
        tenant=row["tenant"],
        version=row["version"],
        driver=row["driver"],
        spec=_decode_spec(row["spec"]),
        fingerprint=row["fingerprint"],
        metadata=_decode_metadata(row["metadata"]),
        created_at=row["created_at"],
        changed_at=row["changed_at"],
        expires_at=row["expires_at"],
        desired=Desired(row["desired"]),
        observed=RuntimeState(row["observed"]),
        runtime=None if runtime is None else _decode_runtime(runtime),
        failure=None if reason is None else Failure(reason, row["failure_message"]),
        ending=None if ended_at is None else Ending(ended_at, EndCause(row["end_cause"]), row["ended_by"]),
        closed_at=row["closed_at"],
    )
