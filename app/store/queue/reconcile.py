"""The reconcile queue: one row a stream that wants attention. A row is a key, never an order.

**Protocol.** An append that asks for work touches the row (`app.store.queue.effects`): insert, or raise its
`revision`. A worker claims due rows (`app.store.queue.claiming`); `due_at` moves to the end of the lease, so that a
crash simply makes the row due again. It reads the head *after* the claim, so it sees what the claimed revision stands
for, and ends the claim in one of four ways:

* `complete`: the row goes, if its revision is still the claimed one; else it is due at once.
* `defer`: due later, unless something else is wanted since the claim; then at once. With `awaiting`, any news since
  the claim makes it due at once, hints too.
* `release`: due at once, as if never claimed.
* nothing at all (a crash): due when the lease ends.

A stream whose claim was given back while something is done for it outside of the slots waits as
`app.store.queue.waiting` says.

**Invariants.** At most one holder of a claim: a claim carries a value of its own (`lease_owner`), and every later
statement names it. No wake-up is lost: a writer with news raises the revision whether or not a worker holds the claim,
so a claim that began before the news cannot delete the row. News that only say "look again" (`enqueue`) do not cut a
back-off short, or a container that fails at start would be retried at the speed of its own events; what a client wants
(`touch`) does. `cause` tells the two apart: only a touch changes it.

**Locks.** Statements that wait for several rows take them in the order of their ids, so they cannot deadlock.

**Times** are the database's. Where it is away (`StoreUnavailable`), the caller does nothing: leases run out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from msgspec import Struct
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    Integer,
    SmallInteger,
    Text,
    Uuid,
    any_,
    bindparam,
    case,
    delete,
    func,
    literal,
    null,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.queue.claiming import BACKGROUND, CLAIM, USER, clock, later
from app.store.tables import reconcile_queue, sandboxes, snapshots

__all__ = ["BACKGROUND", "UNPLACED", "USER", "Claim", "Failed", "Queue", "Round"]

UNPLACED = ""
"""The engine of a stream that no engine has taken yet. Any worker claims it."""
KINDS = ("sandbox", "snapshot")
"""Kinds of streams that this version works on."""
_Q = reconcile_queue.c


class Claim(Struct, frozen=True):
    """A row as it was when it was claimed."""

    stream_id: UUID
    tenant: str
    owner: UUID
    revision: int
    kind: str = KINDS[0]
    cause: int | None = None
    attempts: int = 0
    """Counted failures before this claim."""
    first_failed_at: datetime | None = None
    last_reason: str | None = None
    missing_since: datetime | None = None


class Round(Struct, frozen=True):
    """What one round of claiming brought."""

    claims: tuple[Claim, ...]
    due: int
    """Rows that could have been claimed; more than there are claims means: ask again."""
    above: int
    """Due rows of tenants that hold all the slots they may."""


class Beat(Struct, frozen=True):
    """A held claim's row at this moment."""

    revision: int
    cause: int | None


class Failed(Struct, frozen=True):
    """Why a claim is deferred, when it is for trouble. `attempts` is the new count of counted failures."""

    attempts: int
    reason: str
    message: str


class Deferred(Struct, frozen=True):
    """A claim that was given back."""

    due: bool
    """News came meanwhile, so it is due at once."""


def _held() -> Any:
    """The rows of the claims named by `ids` and `owners`, pairwise."""
    pairs = (
        func.unnest(bindparam("ids", type_=ARRAY(Uuid)), bindparam("owners", type_=ARRAY(Uuid)))
        .table_valued("id", "owner")
        .render_derived(name="held")
    )
    return tuple_(_Q.stream_id, _Q.lease_owner).in_(select(pairs.c.id, pairs.c.owner))


def _extend() -> Statement:
    mine = select(_Q.stream_id).where(_held()).order_by(_Q.stream_id).with_for_update().cte("mine")
    until = later(clock(), "lease")
    return Statement(
        update(reconcile_queue)
        .where(_Q.stream_id == mine.c.stream_id)
        .values(lease_until=until, due_at=until)
        .returning(_Q.stream_id, _Q.revision, _Q.cause)
    )


def _mine() -> ColumnElement[bool]:
    return (_Q.stream_id == bindparam("stream_id", type_=Uuid)) & (_Q.lease_owner == bindparam("owner", type_=Uuid))


def _defer(*, awaiting: bool) -> Statement:
    now = clock()
    attempts = bindparam("attempts", type_=Integer)
    asked = _Q.cause.is_distinct_from(bindparam("cause", type_=BigInteger))  # a touch since the claim
    reason, message = bindparam("reason", type_=Text), bindparam("message", type_=Text)
    news = (asked | (_Q.revision > bindparam("revision", type_=BigInteger))) if awaiting else asked
    return Statement(
        update(reconcile_queue)
        .where(_mine())
        .values(
            due_at=case((news, now), else_=later(now, "wait")),
            lease_owner=None,
            lease_until=None,
            attempts=case((asked, 0), else_=attempts),
            first_failed_at=case(
                (asked | (attempts == 0), None),
                else_=func.coalesce(bindparam("first_failed_at", type_=DateTime(timezone=True)), now),
            ),
            last_reason=case((asked, None), else_=reason),
            # A wait that is no failure keeps the text of the last one for as long as its reason stands.
            last_error=case((asked | reason.is_(None), None), else_=func.coalesce(message, _Q.last_error)),
            missing_since=bindparam("missing_since", type_=DateTime(timezone=True)),
        )
        .returning((_Q.due_at <= now).label("due"))
    )


def _enqueue(kind: str, of: Any, named: ColumnElement[Any], ended: ColumnElement[Any]) -> Statement:
    now = clock()
    engine = func.coalesce(of.engine, UNPLACED)
    source = (
        select(
            *(of.id, literal(kind), of.tenant, engine, literal(1), now),
            bindparam("priority", type_=SmallInteger),
            literal(0),
        )
        .where(
            named == any_(bindparam("ids", type_=ARRAY(Uuid))),
            engine.in_([bindparam("engine", type_=Text), literal(UNPLACED)]),
            ended.is_(None),
        )
        .order_by(of.id)
    )
    names = ["stream_id", "kind", "tenant", "engine", "revision", "due_at", "priority", "attempts"]
    statement = insert(reconcile_queue).from_select(names, source)
    new = statement.excluded
    waits = (_Q.lease_until > new.due_at) | (_Q.attempts > 0)
    due: ColumnElement[bool] = _Q.due_at <= now
    return Statement(
        statement.on_conflict_do_update(
            index_elements=["stream_id"],
            set_={
                "revision": _Q.revision + 1,
                "due_at": case((waits, _Q.due_at), else_=func.least(_Q.due_at, new.due_at)),
                "priority": func.least(_Q.priority, new.priority),
            },
        ).returning(_Q.stream_id, due.label("due"))
    )


_EXTEND = _extend()
_PROBE = Statement(select(_Q.stream_id, _Q.revision, _Q.cause).where(_held()))
_COMPLETE = Statement(
    delete(reconcile_queue)
    .where(_mine(), _Q.revision == bindparam("revision", type_=BigInteger))
    .returning(_Q.stream_id)
)
_CLOSE = Statement(delete(reconcile_queue).where(_mine()).returning(_Q.stream_id))
_FREE = {"due_at": clock(), "lease_owner": None, "lease_until": None}
_RELEASE = Statement(update(reconcile_queue).where(_mine()).values(**_FREE))
_AGAIN = Statement(
    update(reconcile_queue)
    .where(_mine())
    .values(**_FREE, attempts=0, first_failed_at=None, last_reason=None, last_error=None, missing_since=None)
)
_DEFER = {awaiting: _defer(awaiting=awaiting) for awaiting in (False, True)}
_ENQUEUE = _enqueue(KINDS[0], sandboxes.c, sandboxes.c.id, sandboxes.c.closed_at)
_ENQUEUE_OBJECTS = _enqueue(KINDS[0], sandboxes.c, sandboxes.c.object_id, sandboxes.c.closed_at)
# Removed ones too: an image of one may have appeared late.
_ENQUEUE_SNAPSHOTS = _enqueue(KINDS[1], snapshots.c, snapshots.c.id, null())


class Queue:
    """The queue of one engine, and of what is not placed yet."""

    def __init__(self, database: Database, engine: str) -> None:
        self._database = database
        self._engine = engine

    async def claim(
        self,
        slots: int,
        *,
        lease: float,
        tenant_slots: int,
        background: int = 0,
        held: Mapping[str, int] | None = None,
        engines: Sequence[str] | None = None,
        left_alone: Sequence[UUID] = (),
    ) -> Round:
        """Take up to `slots` due rows, `background` of them from that lane if it can.

        No tenant gets above `tenant_slots`, counting those that it holds already (`held`). `engines` narrows it, e.g.
        to what is not placed. Streams in `left_alone` are not taken.
        """
        owner = uuid4()
        holds = held or {}
        rows = await self._database.reserved.fetch(
            CLAIM,
            engines=list(engines) if engines is not None else [self._engine, UNPLACED],
            kinds=list(KINDS),
            left_alone=list(left_alone),
            slots=slots,
            tenant_slots=tenant_slots,
            background=background,
            held_tenants=list(holds),
            held_counts=list(holds.values()),
            lease=lease,
            owner=owner,
        )
        claims = tuple(_claim(row, owner) for row in rows if row["stream_id"] is not None)
        return Round(claims, rows[0]["due"], rows[0]["above"])

    async def extend(self, claims: Iterable[Claim], lease: float) -> Mapping[UUID, Beat]:
        """Keep claims. A claim that is missing from the answer is not ours any more."""
        return _beats(await self._database.reserved.fetch(_EXTEND, lease=lease, **_pairs(claims)))

    async def probe(self, claims: Iterable[Claim]) -> Mapping[UUID, Beat]:
        """Say which claims are still held, as `extend` does, but do not extend them."""
        return _beats(await self._database.reserved.fetch(_PROBE, **_pairs(claims)))

    async def complete(self, claim: Claim, *, closed: bool = False) -> bool:
        """Done: nothing to do until something changes. False when news came meanwhile, and it is due again.

        `closed`: the stream has ended, so no news can mean anything; those of our own removal come at this time.
        """
        names = {"stream_id": claim.stream_id, "owner": claim.owner}
        if closed:
            return bool(await self._database.fetch(_CLOSE, **names))
        if await self._database.fetch(_COMPLETE, revision=claim.revision, **names):
            return True
        # Two statements: in one, a touch that commits between its snapshot and its delete would leave the row leased.
        await self._database.fetch(_AGAIN, **names)
        return False

    async def defer(
        self,
        claim: Claim,
        wait: float,
        *,
        awaiting: bool = False,
        failed: Failed | None = None,
        missing_since: datetime | None = None,
    ) -> Deferred | None:
        """Give back, due after `wait` seconds. None when the claim was lost.

        `awaiting`: it waits for something outside; news since the claim, hints included, make it due at once.
        """
        rows = await self._database.fetch(
            _DEFER[awaiting],
            stream_id=claim.stream_id,
            owner=claim.owner,
            **({"revision": claim.revision} if awaiting else {}),
            cause=claim.cause,
            wait=wait,
            attempts=failed.attempts if failed else claim.attempts,
            first_failed_at=claim.first_failed_at,
            reason=failed.reason if failed else claim.last_reason,
            message=failed.message if failed else None,
            missing_since=missing_since,
        )
        return Deferred(rows[0]["due"]) if rows else None

    async def release(self, claim: Claim) -> None:
        """Give back, due at once; the attempt does not count."""
        await self._database.fetch(_RELEASE, stream_id=claim.stream_id, owner=claim.owner)

    async def enqueue(self, ids: Iterable[UUID], priority: int = BACKGROUND) -> int:
        """Have the open ones among these sandboxes of this engine looked at. Says how many that were."""
        return len(await self._database.fetch(_ENQUEUE, engine=self._engine, ids=list(ids), priority=priority))

    async def enqueue_snapshots(self, ids: Iterable[UUID], priority: int = BACKGROUND) -> int:
        """Have these snapshots of this engine looked at, removed ones too. Says how many that were."""
        rows = await self._database.fetch(_ENQUEUE_SNAPSHOTS, engine=self._engine, ids=list(ids), priority=priority)
        return len(rows)

    async def enqueue_objects(self, ids: Iterable[UUID], priority: int = USER) -> list[UUID]:
        """As `enqueue`, for the sandboxes that have these objects. Says which of those are due now."""
        rows = await self._database.fetch(_ENQUEUE_OBJECTS, engine=self._engine, ids=list(ids), priority=priority)
        return ids_of([row for row in rows if row["due"]])


def _claim(row: Any, owner: UUID) -> Claim:
    return Claim(
        stream_id=_uuid(row["stream_id"]),
        tenant=row["tenant"],
        owner=owner,
        revision=row["revision"],
        kind=row["kind"],
        cause=row["cause"],
        attempts=row["attempts"],
        first_failed_at=row["first_failed_at"],
        last_reason=row["last_reason"],
        missing_since=row["missing_since"],
    )


def _pairs(claims: Iterable[Claim]) -> dict[str, list[UUID]]:
    held = list(claims)
    return {"ids": [claim.stream_id for claim in held], "owners": [claim.owner for claim in held]}


def _beats(rows: Sequence[Any]) -> dict[UUID, Beat]:
    return {_uuid(row["stream_id"]): Beat(row["revision"], row["cause"]) for row in rows}


def ids_of(rows: Sequence[Any]) -> list[UUID]:
    """The streams that these rows are of."""
    return [_uuid(row["stream_id"]) for row in rows]


def _uuid(value: Any) -> UUID:
    return UUID(int=value.int)  # asyncpg has a UUID class of its own
