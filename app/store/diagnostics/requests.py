"""Questions about a sandbox's object: asked by an API process, which may have no engine, answered by a worker.

**Protocol.** `ask` inserts a row, and the caller wakes the workers of the engine by the engine's id. A worker claims
rows, reads what is asked for, writes the answer, without sealed values, and wakes the caller by the row's id. The
caller takes the answer and the row with it.

**Fairness.** A tenant has at most `MAX_OPEN` open questions to an engine, give or take those that are asked at the same
instant. The next question is that of the tenant of which the fewest are being answered, and a worker leaves some of its
places to other tenants (`app.work.answers`). So one that asks without end delays another's question by the time of a
few answers, and not of all that it asked.

**Invariants.** A row answers its own tenant only. A claim ends by itself, so a worker that dies leaves its questions
to another; the answer of one that comes late is thrown away. Nothing but these rows is deleted by `purge`.

**How it fails.** A caller that has left leaves a row, and so does a worker that answers nobody. Rows live for a minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec
from msgspec import Struct
from sqlalchemy import (
    Double,
    Integer,
    Interval,
    Text,
    Uuid,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.database.times import SECOND
from app.store.tables import engine_requests

_R = engine_requests.c
_NOW = func.clock_timestamp()
_LIFE = literal_column("interval '60 seconds'", Interval)
_ID = _R.id == bindparam("id", type_=Uuid)
_OPEN = (_R.engine == bindparam("engine", type_=Text), _R.answered_at.is_(None), _R.asked_at > _NOW - _LIFE)
_UNHELD = or_(_R.lease_until.is_(None), _R.lease_until <= _NOW)


def _ask() -> Statement:
    open_ = (
        select(func.count())
        .select_from(engine_requests)
        .where(*_OPEN, _R.tenant == bindparam("tenant", type_=Text))
        .scalar_subquery()
    )
    row = select(
        bindparam("id", type_=Uuid),
        bindparam("tenant", type_=Text),
        bindparam("engine", type_=Text),
        bindparam("stream_id", type_=Uuid),
        bindparam("what", type_=Text),
        cast(bindparam("arguments", type_=Text), JSONB),
        _NOW,
    ).where(open_ < bindparam("most", type_=Integer))
    names = ["id", "tenant", "engine", "stream_id", "what", "arguments", "asked_at"]
    return Statement(insert(engine_requests).from_select(names, row).returning(_R.id))


def _free() -> Any:
    """The first of each tenant, then the second of each; of equal ones the oldest. What is `held` counts before."""
    held = func.coalesce(cast(bindparam("held", type_=Text), JSONB)[_R.tenant].astext.cast(Integer), 0)
    turn = held + func.row_number().over(partition_by=_R.tenant, order_by=_R.asked_at)
    lines = select(_R.id, turn.label("turn")).where(*_OPEN, _UNHELD).cte("lines")
    return (
        select(_R.id)
        .join(lines, lines.c.id == _R.id)
        # Of another worker that was first, the row is skipped or has a lease by now.
        .where(_R.answered_at.is_(None), _UNHELD, lines.c.turn <= bindparam("share", type_=Integer))
        .order_by(lines.c.turn, _R.asked_at)
        .limit(bindparam("count", type_=Integer))
        .with_for_update(of=engine_requests, skip_locked=True)
        .cte("free")
    )


_ASK = _ask()
_FREE = _free()
_CLAIM = Statement(
    update(engine_requests)
    .where(_R.id == _FREE.c.id)
    .values(lease_until=_NOW + bindparam("lease", type_=Double) * SECOND)
    .returning(_R.id, _R.tenant, _R.stream_id, _R.what, _R.arguments)
)
_ANSWER = Statement(
    update(engine_requests)
    .where(_ID, _R.tenant == bindparam("tenant", type_=Text), _R.answered_at.is_(None))
    .values(
        answered_at=_NOW,
        answer=bindparam("answer", type_=Text),
        error=bindparam("error", type_=Text),
    )
    .returning(_R.id)
)
_TAKE = Statement(
    delete(engine_requests)
    .where(_ID, _R.tenant == bindparam("tenant", type_=Text), _R.answered_at.is_not(None))
    .returning(_R.answer, _R.error)
)
_FORGET = Statement(delete(engine_requests).where(_ID, _R.tenant == bindparam("tenant", type_=Text)))
_PURGE = Statement(delete(engine_requests).where(_R.asked_at <= _NOW - _LIFE).returning(_R.id))

LOGS, INSPECT = "logs", "inspect"
MAX_OPEN: Final = 64
"""Questions of one tenant to one engine that wait for an answer."""
ABSENT = "ABSENT"
"""The error of an answer: the engine has no such object."""


class Arguments(Struct, frozen=True, omit_defaults=True):
    """How much of a log."""

    tail: int = 100
    since_s: int | None = None
    """Only lines of the last so many seconds."""


class Question(Struct, frozen=True):
    """A row, as it is asked."""

    id: UUID
    tenant: str
    stream_id: UUID
    what: str
    arguments: Arguments


class Reply(Struct, frozen=True):
    """An answer, as JSON, or why there is none."""

    answer: str | None
    error: str | None

    def __repr__(self) -> str:
        """Keep what a program wrote out of tracebacks."""
        return f"Reply(error={self.error!r})"


_decode = msgspec.json.Decoder(Arguments).decode


class EngineRequests:
    """The table `engine_requests`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def ask(self, question: Question, engine: str, most: int = MAX_OPEN) -> bool:
        """Insert. The caller has read the sandbox as one of the question's tenant. False = that has `most` already."""
        made = await self._database.fetch(
            _ASK,
            most=most,
            id=question.id,
            tenant=question.tenant,
            engine=engine,
            stream_id=question.stream_id,
            what=question.what,
            arguments=msgspec.json.encode(question.arguments).decode(),
        )
        return bool(made)

    async def claim(
        self, engine: str, count: int, lease: float, *, share: int | None = None, held: Mapping[str, int] | None = None
    ) -> list[Question]:
        """Questions that nobody answers at the moment, for `lease` seconds, of each tenant in turn. `share` of one
        tenant at most, with those that the caller `held` already; None = `count`.
        """
        rows: Any = await self._database.fetch(
            _CLAIM,
            engine=engine,
            count=count,
            lease=lease,
            share=count if share is None else share,
            held=msgspec.json.encode(held or {}).decode(),
        )
        return [
            Question(
                UUID(int=row["id"].int),
                row["tenant"],
                UUID(int=row["stream_id"].int),
                row["what"],
                _decode(row["arguments"]),
            )
            for row in rows
        ]

    async def answer(self, question: Question, answer: str | None, error: str | None = None) -> None:
        """Unless another worker was first."""
        await self._database.fetch(_ANSWER, id=question.id, tenant=question.tenant, answer=answer, error=error)

    async def take(self, question_id: UUID, tenant: str) -> Reply | None:
        """The answer, which is then gone. None = there is none yet."""
        row = await self._database.fetch_one(_TAKE, id=question_id, tenant=tenant)
        return None if row is None else Reply(row["answer"], row["error"])

    async def forget(self, question_id: UUID, tenant: str) -> None:
        """Nobody waits for the answer any more."""
        await self._database.fetch(_FORGET, id=question_id, tenant=tenant)

    async def purge(self) -> int:
        """Delete what nobody took. Says how many rows that were."""
        return len(await self._database.fetch(_PURGE))


def logs_question(tenant: str, stream_id: UUID, arguments: Arguments) -> Question:
    """What it wrote."""
    return Question(uuid4(), tenant, stream_id, LOGS, arguments)


def inspect_question(tenant: str, stream_id: UUID) -> Question:
    """What its engine says of it."""
    return Question(uuid4(), tenant, stream_id, INSPECT, Arguments())
