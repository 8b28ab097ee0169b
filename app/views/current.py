"""The `sandboxes` row as head of the stream: how a state becomes the row, and the row a state.

A JSON column is written only by an append that changed it, so a server that does not know a newer field of it does not
erase that field in passing. A change of the column itself writes it whole; a new folded field therefore comes with a
higher revision of the registry. A row whose `schema` is above this version's revision is read, if its words are known,
and never appended to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache, partial
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from msgspec import Struct
from sqlalchemy import (
    Boolean,
    Double,
    Interval,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    func,
    literal_column,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.domain.engine.state import EngineState
from app.domain.sandbox import events as ev
from app.domain.sandbox.freeze import Freeze
from app.domain.sandbox.observed import Address, Waiting
from app.domain.sandbox.spec import SandboxSpec
from app.domain.sandbox.state import Desired, Ending, Failure, Runtime, RuntimeState, Sandbox
from app.domain.sandbox.status import Attempt
from app.domain.tenants import ANY_TENANT, AnyTenant
from app.errors import UnknownEvent
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.database.times import SECOND
from app.store.log.append import Effect, Parts, head_columns, insert_head, update_head
from app.store.log.epoch import EPOCH
from app.store.tables import engines, reconcile_queue, sandboxes

_S = sandboxes.c
_ALWAYS = (
    _S.version,
    _S.schema,
    _S.phase,
    _S.desired,
    _S.observed,
    _S.engine,
    _S.epoch,
    _S.place,
    _S.object_id,
    _S.generation,
    _S.run,
    _S.gpus,
    _S.expires_at,
    _S.end_cause,
    _S.ended_by,
    _S.link_number,
)
"""Columns that every append writes."""
_JSON = ("metadata", "runtime", "address", "waiting", "failure", "frozen_by")
"""Columns that an append writes when it changed them."""
_ONCE = (_S.spec, _S.cpu_nanos, _S.memory_bytes, _S.key_id, _S.key_name, _S.fingerprint)
"""Columns that only the first append writes."""
_encode = msgspec.json.Encoder().encode


def _begin(parts: Parts) -> dict[str, Any]:
    row = head_columns([column for column in (*_ALWAYS, *_ONCE) if column is not _S.expires_at])
    row |= head_columns([sandboxes.c[name] for name in _JSON])
    return row | {
        "created_at": parts.clock.c.now,
        "changed_at": parts.clock.c.now,
        "expires_at": parts.clock.c.now + bindparam("timeout_s", type_=Double) * SECOND,
        "since_position": parts.first - 1,
    }


begin: Effect = insert_head(sandboxes, _begin)
"""The first head row. Parameters: those of `begin_values`."""


@lru_cache
def move(changed: frozenset[str]) -> Effect:
    """The next head row, with these JSON columns. Parameters: those of `move_values`."""

    def values(parts: Parts) -> dict[str, Any]:
        now = parts.now
        return {
            **head_columns([*_ALWAYS, *(sandboxes.c[name] for name in sorted(changed))]),
            "changed_at": case((bindparam("phase_moved", type_=Boolean), now), else_=_S.changed_at),
            "ready_at": case(
                (bindparam("ready", type_=Text) == "now", now),
                (bindparam("ready", type_=Text) == "cleared", None),
                else_=_S.ready_at,
            ),
            "begun_at": case((bindparam("begins", type_=Boolean), now), else_=_S.begun_at),
            "freeze_at": case(
                (bindparam("freeze", type_=Text) == "now", now),
                (bindparam("freeze", type_=Text) == "cleared", None),
                else_=_S.freeze_at,
            ),
            "ended_at": _first_time("ends", _S.ended_at, now),
            "closed_at": _first_time("closes", _S.closed_at, now),
        }

    return update_head(sandboxes, values)


def _first_time(flag: str, present: Any, now: Any) -> Any:
    return case((and_(bindparam(flag, type_=Boolean), present.is_(None)), now), else_=present)


def _json(sandbox: Sandbox, name: str) -> str | None:
    value = getattr(sandbox, name)
    return None if value is None else _encode(value).decode()


def _always(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "version": sandbox.version,
        "schema": sandbox.schema,
        "phase": sandbox.phase.value,
        "desired": sandbox.desired.value,
        "observed": sandbox.observed.value,
        "engine": sandbox.engine,
        "epoch": sandbox.epoch,
        "place": sandbox.place,
        "object_id": sandbox.object_id,
        "generation": sandbox.generation,
        "run": sandbox.run,
        "gpus": sandbox.gpus,
        "end_cause": sandbox.ending and sandbox.ending.cause,
        "ended_by": sandbox.ending and sandbox.ending.by,
        "link_number": sandbox.link_number,
    }


def begin_values(sandbox: Sandbox, timeout_s: float | None) -> dict[str, Any]:
    """Parameters of `begin`: the head row after the first events of a stream."""
    return {
        **_always(sandbox),
        **{name: _json(sandbox, name) for name in ("spec", *_JSON)},
        "tenant": sandbox.tenant,
        "cpu_nanos": sandbox.cpu_nanos,
        "memory_bytes": sandbox.memory_bytes,
        "key_id": sandbox.key_id,
        "key_name": sandbox.key_name,
        "fingerprint": sandbox.fingerprint,
        "timeout_s": timeout_s,
    }


def changed_json(before: Sandbox, after: Sandbox) -> frozenset[str]:
    """The JSON columns that an append changes."""
    return frozenset(name for name in _JSON if getattr(before, name) != getattr(after, name))


def move_values(before: Sandbox, after: Sandbox) -> dict[str, Any]:
    """Parameters of `move`. Times other than the expiry come from the statement's clock."""
    ready = "kept" if after.ready_at == before.ready_at else "cleared" if after.ready_at is None else "now"
    freeze = "kept" if after.freeze_at == before.freeze_at else "cleared" if after.freeze_at is None else "now"
    return {
        **_always(after),
        **{name: _json(after, name) for name in changed_json(before, after)},
        "expected": before.version,
        "expires_at": after.expires_at,
        "phase_moved": after.changed_at != before.changed_at,
        "begins": after.begun_at != before.begun_at,
        "ready": ready,
        "freeze": freeze,
        "ends": after.ending is not None,
        "closes": after.closed_at is not None,
    }


COLUMNS = tuple(sandboxes.c)
_BY_ID = sandboxes.c.id == bindparam("id", type_=Uuid)
_LOAD = Statement(select(*COLUMNS, func.clock_timestamp().label("now")).where(_BY_ID))
_LOAD_MANY = Statement(
    select(*COLUMNS, func.clock_timestamp().label("now")).where(
        sandboxes.c.id == any_(bindparam("ids", type_=ARRAY(Uuid)))
    )
)
_LOCK = Statement(select(*COLUMNS, func.clock_timestamp().label("now")).where(_BY_ID).with_for_update())
_Q = reconcile_queue.c
_E = engines.c
_NOW = func.clock_timestamp()
_SILENT = literal_column("interval '15 seconds'", Interval)
"""An engine that no worker has reached for this long is away."""
_ATTEMPTS = Statement(
    select(
        _Q.stream_id,
        (_Q.lease_until > _NOW).label("claimed"),
        ((_Q.due_at <= _NOW) & _Q.lease_owner.is_(None)).label("waits_for_slot"),
        _Q.attempts,
        _Q.last_reason,
        _Q.last_error,
        _Q.progress,
        # Its row stays due meanwhile: no worker claims work for an engine that cannot be used.
        func.coalesce((_E.state != EngineState.UP.value) | (_E.last_seen_at < _NOW - _SILENT), False).label(
            "engine_away"
        ),
    )
    .select_from(reconcile_queue.outerjoin(engines, _E.name == _Q.engine))
    .where(_Q.stream_id == any_(bindparam("ids", type_=ARRAY(Uuid))))
)


_BEGINNING = Statement(
    select(_S.since_position, EPOCH.label("epoch")).where(_BY_ID, _S.tenant == bindparam("tenant", type_=Text))
)


class Beginning(Struct, frozen=True):
    """Where the history of a sandbox begins in the log."""

    since: int
    """A position below all of its events."""
    epoch: int
    """The log's, read before any event is."""


class CurrentView:
    """Reads of single sandboxes; lists are in `app.views.listing`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self, sandbox_id: UUID, tenant: str | AnyTenant) -> tuple[Sandbox, datetime] | None:
        """The sandbox and the database's clock. None when it is absent or another tenant's."""
        row = await self._database.fetch_one(_LOAD, id=sandbox_id)
        return _loaded(row, tenant)

    async def load_many(self, ids: Sequence[UUID]) -> Mapping[UUID, Callable[[], tuple[Sandbox, datetime]]]:
        """Those of any tenant, with the database's clock. Each is decoded when it is called for.

        One that a newer version wrote raises UnknownEvent then, and does not keep the others from their readers.
        """
        rows = await self._database.fetch(_LOAD_MANY, ids=list(ids))
        return {UUID(int=row["id"].int): partial(_read, row) for row in rows}

    async def beginning(self, sandbox_id: UUID, tenant: str) -> Beginning | None:
        """Of a sandbox that is live or has ended. None = this tenant never had it."""
        row = await self._database.fetch_one(_BEGINNING, id=sandbox_id, tenant=tenant)
        return None if row is None else Beginning(row["since_position"], row["epoch"])

    async def attempt(self, sandbox: Sandbox) -> Attempt | None:
        """How the queue stands about a Pending sandbox. None = it is not in the queue.

        The queue is read by id alone. So this takes a sandbox, which the caller has read as one of a tenant, and no id,
        which may be of anybody.
        """
        return (await self.attempts([sandbox])).get(sandbox.id)

    async def attempts(self, pending: Sequence[Sandbox]) -> Mapping[UUID, Attempt]:
        """The same of several; those that are not in the queue are left out."""
        rows = await self._database.fetch(_ATTEMPTS, ids=[sandbox.id for sandbox in pending])
        return {UUID(int=stream_id.int): Attempt(bool(claimed), *rest) for stream_id, claimed, *rest in rows}


Fetch = Callable[..., Any]


async def load_locked(fetch: Fetch, sandbox_id: UUID, tenant: str | AnyTenant) -> tuple[Sandbox, datetime] | None:
    """As `load`, and hold the row for the rest of the transaction that `fetch` belongs to."""
    rows = await fetch(_LOCK, id=sandbox_id)
    return _loaded(rows[0] if rows else None, tenant)


def _loaded(row: asyncpg.Record | None, tenant: str | AnyTenant) -> tuple[Sandbox, datetime] | None:
    if row is None or (tenant is not ANY_TENANT and row["tenant"] != tenant):
        return None
    return _read(row)


def _read(row: asyncpg.Record) -> tuple[Sandbox, datetime]:
    return from_row(row), row["now"]


_decode_spec = msgspec.json.Decoder(SandboxSpec).decode
_decode_metadata = msgspec.json.Decoder(dict[str, str]).decode
_decode_runtime = msgspec.json.Decoder(Runtime).decode
_decode_address = msgspec.json.Decoder(Address).decode
_decode_waiting = msgspec.json.Decoder(Waiting).decode
_decode_failure = msgspec.json.Decoder(Failure).decode
_decode_freeze = msgspec.json.Decoder(Freeze).decode


def from_row(row: asyncpg.Record) -> Sandbox:
    """The state that the row is a snapshot of.

    Raises:
        UnknownEvent: a newer version wrote it, in words that this one does not know.
    """
    try:
        return _from_row(row)
    except ValueError as error:  # also msgspec's
        raise UnknownEvent(f"sandbox {row['id']} was written by a newer version: {error}") from error


def is_newer(sandbox: Sandbox) -> bool:
    """Whether a newer version appended to it; this one must leave it alone."""
    return sandbox.schema > ev.REGISTRY.revision


def _from_row(row: asyncpg.Record) -> Sandbox:
    runtime, address, waiting, failure = row["runtime"], row["address"], row["waiting"], row["failure"]
    ended_at, object_id, frozen_by = row["ended_at"], row["object_id"], row["frozen_by"]
    return Sandbox(
        id=UUID(int=row["id"].int),
        tenant=row["tenant"],
        version=row["version"],
        position=row["position"],
        schema=row["schema"],
        spec=_decode_spec(row["spec"]),
        fingerprint=row["fingerprint"],
        metadata=_decode_metadata(row["metadata"]),
        created_at=row["created_at"],
        changed_at=row["changed_at"],
        key_id=row["key_id"],
        key_name=row["key_name"],
        cpu_nanos=row["cpu_nanos"],
        memory_bytes=row["memory_bytes"],
        gpus=row["gpus"],
        expires_at=row["expires_at"],
        engine=row["engine"],
        epoch=row["epoch"],
        place=row["place"],
        object_id=None if object_id is None else UUID(int=object_id.int),
        desired=Desired(row["desired"]),
        observed=RuntimeState(row["observed"]),
        generation=row["generation"],
        run=row["run"],
        begun_at=row["begun_at"],
        ready_at=row["ready_at"],
        runtime=None if runtime is None else _decode_runtime(runtime),
        address=None if address is None else _decode_address(address),
        waiting=None if waiting is None else _decode_waiting(waiting),
        failure=None if failure is None else _decode_failure(failure),
        frozen_by=None if frozen_by is None else _decode_freeze(frozen_by),
        freeze_at=row["freeze_at"],
        link_number=row["link_number"],
        ending=None if ended_at is None else Ending(ended_at, row["end_cause"], row["ended_by"]),
        closed_at=row["closed_at"],
    )
