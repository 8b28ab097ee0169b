"""Rows that wait, without a claim, for something that a process does outside of the slots.

**Protocol.** A run gives its claim back (`Queue.defer`, awaiting) and has something done for its stream, e.g. a pull.
The process that does it keeps the row waiting: it moves `due_at` on while it lives, and writes how far it is. When it
is done it wakes the stream; when it fails it puts the row off, with a count and a back-off.

**Invariants.** Only a row that nobody holds and that is not due is kept or put off. News (a touch, a hint) make it due,
and a process that keeps it waiting cannot take that back. So a delete during a pull is handled at once, by any worker.

**How it fails.** A process that dies stops moving the time on; the row is due soon, and the next claim plans again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy import ColumnElement, Double, Integer, Text, Uuid, any_, bindparam, case, column, func, select, update
from sqlalchemy.dialects.postgresql import ARRAY

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.database.times import SECOND
from app.store.queue.claiming import clock, later
from app.store.queue.reconcile import ids_of
from app.store.tables import reconcile_queue, sandboxes

_Q = reconcile_queue.c


class PutOff(Struct, frozen=True):
    """A waiting row that was put off. Both values are from before."""

    attempts: int
    last_reason: str | None


def _wake() -> Statement:
    """Due now, whatever it waits for. Who holds it learns by the revision."""
    now = clock()
    which = _Q.stream_id == any_(bindparam("ids", type_=ARRAY(Uuid)))
    rows = select(_Q.stream_id).where(which).order_by(_Q.stream_id).with_for_update().cte("rows")
    return Statement(
        update(reconcile_queue)
        .where(_Q.stream_id == rows.c.stream_id)
        .values(
            revision=_Q.revision + 1,
            due_at=case((_Q.lease_until > now, _Q.due_at), else_=func.least(_Q.due_at, now)),
            progress=None,
        )
        .returning(_Q.stream_id)
    )


def _waiting(now: Any) -> ColumnElement[bool]:
    """Nobody holds it, and no news has made it due."""
    return _Q.lease_owner.is_(None) & (_Q.due_at > now)


def _keep_waiting() -> Statement:
    now = clock()
    pairs = (
        func.unnest(bindparam("ids", type_=ARRAY(Uuid)), bindparam("texts", type_=ARRAY(Text)))
        .table_valued(column("id", Uuid), column("text", Text))
        .render_derived(name="progress")
    )
    rows = (
        select(_Q.stream_id, pairs.c.text)
        .join(pairs, pairs.c.id == _Q.stream_id)
        .where(_waiting(now))
        .order_by(_Q.stream_id)
        .with_for_update(of=reconcile_queue)
        .cte("rows")
    )
    return Statement(
        update(reconcile_queue)
        .where(_Q.stream_id == rows.c.stream_id)
        .values(due_at=func.greatest(_Q.due_at, later(now, "lease")), progress=rows.c.text)
        .returning(_Q.stream_id)
    )


def _put_off() -> Statement:
    now = clock()
    counted = bindparam("counted", type_=Integer)
    row = (
        select(_Q.stream_id, _Q.attempts, _Q.last_reason)
        .where(_Q.stream_id == bindparam("stream_id", type_=Uuid), _waiting(now))
        .with_for_update()
        .cte("row")
    )
    longest = bindparam("longest", type_=Double)
    doubled = bindparam("base", type_=Double) * func.power(2.0, func.least(row.c.attempts, 30))
    wait = bindparam("dice", type_=Double) * func.least(longest, doubled) + bindparam("wait", type_=Double)
    return Statement(
        update(reconcile_queue)
        .where(_Q.stream_id == row.c.stream_id)
        .values(
            due_at=now + wait * SECOND,
            attempts=row.c.attempts + counted,
            first_failed_at=case((counted > 0, func.coalesce(_Q.first_failed_at, now)), else_=_Q.first_failed_at),
            last_reason=bindparam("reason", type_=Text),
            last_error=bindparam("message", type_=Text),
            progress=None,
        )
        .returning(row.c.attempts, row.c.last_reason)
    )


_WAKE = _wake()
_KEEP_WAITING = _keep_waiting()
_PUT_OFF = _put_off()
_PENDING = Statement(
    select(_Q.stream_id)
    .join(sandboxes, sandboxes.c.id == _Q.stream_id)
    .where(_Q.stream_id == any_(bindparam("ids", type_=ARRAY(Uuid))), sandboxes.c.phase == "Pending")
)


class WaitingRows:
    """The rows of the queue that wait."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def wake(self, ids: Iterable[UUID]) -> list[UUID]:
        """What these streams wait for has come or will not come: due now, back-off or not."""
        return ids_of(await self._database.fetch(_WAKE, ids=list(ids)))

    async def keep_waiting(self, progress: Mapping[UUID, str | None], wait: float) -> set[UUID]:
        """Move the time on for streams that still wait, and say how far it is. Answers those that still wait."""
        rows = await self._database.fetch(_KEEP_WAITING, ids=list(progress), texts=list(progress.values()), lease=wait)
        return set(ids_of(rows))

    async def count_failure(
        self, stream_id: UUID, reason: str, message: str, *, base: float, longest: float
    ) -> PutOff | None:
        """An attempt failed: full-jitter back-off. None = it does not wait any more, so nothing was counted."""
        return await self._put_off(stream_id, reason, message, counted=1, base=base, longest=longest, dice=_dice())

    async def put_off(self, stream_id: UUID, reason: str, message: str, wait: float) -> PutOff | None:
        """Try again later, without counting. None = it does not wait any more."""
        return await self._put_off(stream_id, reason, message, counted=0, base=0, longest=0, dice=0, wait=wait)

    async def _put_off(self, stream_id: UUID, reason: str, message: str, *, wait: float = 0, **values: Any) -> Any:
        row = await self._database.fetch_one(
            _PUT_OFF, stream_id=stream_id, reason=reason, message=message, wait=wait, **values
        )
        return None if row is None else PutOff(row["attempts"], row["last_reason"])

    async def pending(self, ids: Iterable[UUID]) -> set[UUID]:
        """Which of these are still to be provided."""
        return set(ids_of(await self._database.fetch(_PENDING, ids=list(ids))))


def _dice() -> float:
    return random.random()  # noqa: S311 - jitter, not a secret
