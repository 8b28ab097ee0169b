"""The reconcile queue: one row a sandbox that wants attention. A row is a key, never an order.

**Protocol.** An append that asks for work touches the row (`app.store.queue.effects`): insert, or raise its
`generation`. A worker claims due rows; `due_at` moves to the end of the lease, so that a crash simply makes the row
due again. It reads the head *after* the claim, so it sees what the claimed generation stands for, and ends the claim in
one of four ways:

* `complete`: the row goes, if its generation is still the claimed one; else it is due at once.
* `defer`: due later, unless something else is wanted since the claim; then at once.
* `release`: due at once, as if never claimed.
* nothing at all (a crash): due when the lease ends.

**Invariants.** At most one holder of a claim: a claim carries a value of its own (`lease_owner`), and every later
statement names it. No wake-up is lost: whoever has news raises the generation whether or not somebody is at work, so a
claim that began before the news cannot delete the row. News that only say "look again" (`enqueue`) do not cut a
back-off short, or a container that fails at start would be retried at the speed of its own events; what a client wants
(`touch`) does. `cause` tells the two apart: only a touch changes it.

**Fairness.** A round takes at most `share` rows of a tenant, ranked among the first few hundred due; the user lane
goes first, but the caller can keep slots for the background lane. Tenants take turns.

**Locks.** A claim skips locked rows; the recheck of `due_at` at the lock keeps two claims from taking one row.
Statements that wait for several rows take them in the order of their ids, so they cannot deadlock.

**Times** are the database's. Where it is away (`StoreUnavailable`), the caller does nothing: leases run out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from msgspec import Struct
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    Double,
    Integer,
    Interval,
    SmallInteger,
    Text,
    Uuid,
    any_,
    bindparam,
    case,
    delete,
    extract,
    func,
    literal,
    literal_column,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import reconcile_queue, sandboxes

USER, BACKGROUND = 0, 1
_WINDOW = 400
"""Rows among which a round ranks, a lane."""
_SPARE = 100
_Q = reconcile_queue.c


class Claim(Struct, frozen=True):
    """A row as it was when it was claimed."""

    sandbox_id: UUID
    owner: UUID
    generation: int
    cause: int | None = None
    attempts: int = 0
    """Counted failures before this claim."""
    first_failed_at: datetime | None = None
    failing_for: float = 0
    """Seconds from the first of them to this claim."""
    last_code: str | None = None
    missing_since: datetime | None = None


class Round(Struct, frozen=True):
    """What one round of claiming brought. `due` counts what was due, so more than claimed means: ask again."""

    claims: tuple[Claim, ...]
    due: int


class Beat(Struct, frozen=True):
    """A held claim's row at this moment."""

    generation: int
    cause: int | None


class Failed(Struct, frozen=True):
    """Why a claim is deferred, when it is for trouble. `attempts` is the new count of counted failures."""

    attempts: int
    code: str | None
    message: str


class Depth(Struct, frozen=True):
    """How the queue of one driver stands."""

    rows: int
    leased: int
    due: int
    oldest_due_s: float
    """How long the oldest due row has been due."""


_SECOND: ColumnElement[timedelta] = literal_column("interval '1 second'", Interval)


def _clock() -> ColumnElement[datetime]:
    # One reading a statement; and a subquery can bound an index scan, which a bare volatile function cannot.
    clock = select(func.clock_timestamp().label("now")).cte("clock")
    return select(clock.c.now).scalar_subquery()


def _later(now: ColumnElement[datetime], seconds: str) -> Any:
    return now + bindparam(seconds, type_=Double) * _SECOND


def _claim() -> Statement:
    now = _clock()
    slots = bindparam("slots", type_=Integer)
    due = union_all(
        *(
            select(_Q.sandbox_id, _Q.tenant, _Q.priority, _Q.due_at)
            .where(_Q.driver == bindparam("driver", type_=Text), _Q.priority == literal(lane), _Q.due_at <= now)
            .order_by(_Q.due_at)
            .limit(_WINDOW)
            .subquery()
            .select()
            for lane in (USER, BACKGROUND)
        )
    ).cte("due")
    turn = func.row_number().over(partition_by=(due.c.priority, due.c.tenant), order_by=due.c.due_at)
    ranked = select(due, turn.label("turn")).cte("ranked")
    place = func.row_number().over(partition_by=ranked.c.priority, order_by=(ranked.c.turn, ranked.c.due_at))
    fair = (
        select(ranked.c.sandbox_id, ranked.c.priority, place.label("place"))
        .where(ranked.c.turn <= bindparam("share", type_=Integer))
        .cte("fair")
    )
    kept = (fair.c.priority == BACKGROUND) & (fair.c.place <= bindparam("background", type_=Integer))
    order = func.row_number().over(order_by=(case((kept, 0), else_=1), fair.c.priority, fair.c.place))
    # Some more than slots, for those that others have locked; so few that they are fetched one by one.
    first = select(fair.c.sandbox_id, order.label("order")).order_by("order").limit(_SPARE + slots).cte("first")
    picked = (
        select(_Q.sandbox_id)
        .join(first, first.c.sandbox_id == _Q.sandbox_id)
        .where(_Q.due_at <= now)
        .order_by(first.c.order)
        .limit(slots)
        .with_for_update(of=reconcile_queue, skip_locked=True)
        .cte("picked")
    )
    until = _later(now, "lease")
    claimed = (
        update(reconcile_queue)
        .where(_Q.sandbox_id == picked.c.sandbox_id)
        .values(lease_owner=bindparam("owner", type_=Uuid), lease_until=until, due_at=until)
        .returning(
            *(_Q.sandbox_id, _Q.generation, _Q.cause, _Q.attempts, _Q.last_code, _Q.missing_since, _Q.first_failed_at),
            func.coalesce(extract("epoch", now - _Q.first_failed_at), 0.0).cast(Double).label("failing_for"),
        )
        .cte("claimed")
    )
    total = select(func.count()).select_from(due).cte("total")
    return Statement(
        select(total.c[0].label("due"), claimed).select_from(total.outerjoin(claimed, literal_column("true")))
    )


def _held() -> Any:
    """The rows of the claims named by `ids` and `owners`, pairwise."""
    pairs = (
        func.unnest(bindparam("ids", type_=ARRAY(Uuid)), bindparam("owners", type_=ARRAY(Uuid)))
        .table_valued("id", "owner")
        .render_derived(name="held")
    )
    return tuple_(_Q.sandbox_id, _Q.lease_owner).in_(select(pairs.c.id, pairs.c.owner))


def _extend() -> Statement:
    mine = select(_Q.sandbox_id).where(_held()).order_by(_Q.sandbox_id).with_for_update().cte("mine")
    until = _later(_clock(), "lease")
    return Statement(
        update(reconcile_queue)
        .where(_Q.sandbox_id == mine.c.sandbox_id)
        .values(lease_until=until, due_at=until)
        .returning(_Q.sandbox_id, _Q.generation, _Q.cause)
    )


def _mine() -> ColumnElement[bool]:
    return (_Q.sandbox_id == bindparam("sandbox_id", type_=Uuid)) & (_Q.lease_owner == bindparam("owner", type_=Uuid))


def _defer() -> Statement:
    now = _clock()
    attempts = bindparam("attempts", type_=Integer)
    asked = _Q.cause.is_distinct_from(bindparam("cause", type_=BigInteger))  # a touch since the claim
    return Statement(
        update(reconcile_queue)
        .where(_mine())
        .values(
            due_at=case((asked, now), else_=_later(now, "wait")),
            lease_owner=None,
            lease_until=None,
            attempts=case((asked, 0), else_=attempts),
            first_failed_at=case(
                (asked | (attempts == 0), None),
                else_=func.coalesce(bindparam("first_failed_at", type_=DateTime(timezone=True)), now),
            ),
            last_code=bindparam("code", type_=Text),
            last_error=bindparam("message", type_=Text),
            missing_since=bindparam("missing_since", type_=DateTime(timezone=True)),
        )
        .returning(_Q.sandbox_id)
    )


def _enqueue() -> Statement:
    now = _clock()
    box = sandboxes.c
    source = (
        select(
            *(box.id, box.tenant, box.driver, literal(1), now),
            bindparam("priority", type_=SmallInteger),
            literal(0),
        )
        .where(
            box.id == any_(bindparam("ids", type_=ARRAY(Uuid))),
            box.driver == bindparam("driver", type_=Text),
            box.closed_at.is_(None),
        )
        .order_by(box.id)
    )
    names = ["sandbox_id", "tenant", "driver", "generation", "due_at", "priority", "attempts"]
    statement = insert(reconcile_queue).from_select(names, source)
    new = statement.excluded
    waits = (_Q.lease_until > new.due_at) | (_Q.attempts > 0)
    return Statement(
        statement.on_conflict_do_update(
            index_elements=["sandbox_id"],
            set_={
                "generation": _Q.generation + 1,
                "due_at": case((waits, _Q.due_at), else_=func.least(_Q.due_at, new.due_at)),
                "priority": func.least(_Q.priority, new.priority),
            },
        ).returning(_Q.sandbox_id)
    )


def _stats() -> Statement:
    now = _clock()
    late = _Q.due_at <= now
    return Statement(
        select(
            func.count().label("rows"),
            func.count().filter(_Q.lease_until > now).label("leased"),
            func.count().filter(late).label("due"),
            func.coalesce(extract("epoch", now - func.min(_Q.due_at).filter(late)), 0.0)
            .cast(Double)
            .label("oldest_due_s"),
        ).where(_Q.driver == bindparam("driver", type_=Text))
    )


CLAIM = _claim()
_EXTEND = _extend()
_PROBE = Statement(select(_Q.sandbox_id, _Q.generation, _Q.cause).where(_held()))
_COMPLETE = Statement(
    delete(reconcile_queue)
    .where(_mine(), _Q.generation == bindparam("generation", type_=BigInteger))
    .returning(_Q.sandbox_id)
)
_RELEASE = Statement(update(reconcile_queue).where(_mine()).values(due_at=_clock(), lease_owner=None, lease_until=None))
_AGAIN = Statement(
    update(reconcile_queue)
    .where(_mine())
    .values(due_at=_clock(), lease_owner=None, lease_until=None, attempts=0, first_failed_at=None, missing_since=None)
)
_DEFER = _defer()
_ENQUEUE = _enqueue()
_STATS = _stats()


class Queue:
    """The queue of one driver."""

    def __init__(self, database: Database, driver: str) -> None:
        self._database = database
        self._driver = driver

    async def claim(self, slots: int, *, lease: float, share: int, background: int = 0) -> Round:
        """Take up to `slots` due rows, at most `share` of a tenant, `background` of them from that lane if it can."""
        owner = uuid4()
        rows = await self._database.reserved.fetch(
            CLAIM, driver=self._driver, slots=slots, share=share, background=background, lease=lease, owner=owner
        )
        claims = tuple(
            Claim(
                sandbox_id=_uuid(row["sandbox_id"]),
                owner=owner,
                generation=row["generation"],
                cause=row["cause"],
                attempts=row["attempts"],
                first_failed_at=row["first_failed_at"],
                failing_for=row["failing_for"],
                last_code=row["last_code"],
                missing_since=row["missing_since"],
            )
            for row in rows
            if row["sandbox_id"] is not None
        )
        return Round(claims, rows[0]["due"])

    async def extend(self, claims: Iterable[Claim], lease: float) -> Mapping[UUID, Beat]:
        """Keep claims. Whoever is missing from the answer is not ours any more."""
        return _beats(await self._database.reserved.fetch(_EXTEND, lease=lease, **_pairs(claims)))

    async def probe(self, claims: Iterable[Claim]) -> Mapping[UUID, Beat]:
        """As `extend`, without extending."""
        return _beats(await self._database.reserved.fetch(_PROBE, **_pairs(claims)))

    async def complete(self, claim: Claim) -> bool:
        """Done: nothing to do until something changes. False when news came meanwhile, and it is due again."""
        names = {"sandbox_id": claim.sandbox_id, "owner": claim.owner}
        if await self._database.fetch(_COMPLETE, generation=claim.generation, **names):
            return True
        # Two statements: in one, a touch that commits between its snapshot and its delete would leave the row leased.
        await self._database.fetch(_AGAIN, **names)
        return False

    async def defer(
        self, claim: Claim, wait: float, *, failed: Failed | None = None, missing_since: datetime | None = None
    ) -> bool:
        """Give back, due after `wait` seconds. False when the claim was lost."""
        rows = await self._database.fetch(
            _DEFER,
            sandbox_id=claim.sandbox_id,
            owner=claim.owner,
            cause=claim.cause,
            wait=wait,
            attempts=failed.attempts if failed else claim.attempts,
            first_failed_at=claim.first_failed_at,
            code=failed.code if failed else claim.last_code,
            message=failed.message if failed else None,
            missing_since=missing_since,
        )
        return bool(rows)

    async def release(self, claim: Claim) -> None:
        """Give back, due at once; the attempt does not count."""
        await self._database.fetch(_RELEASE, sandbox_id=claim.sandbox_id, owner=claim.owner)

    async def enqueue(self, ids: Iterable[UUID], priority: int = BACKGROUND) -> int:
        """Have the open ones among these sandboxes looked at. Says how many that were."""
        return len(await self._database.fetch(_ENQUEUE, driver=self._driver, ids=list(ids), priority=priority))

    async def stats(self) -> Depth:
        """For operators."""
        row = (await self._database.fetch(_STATS, driver=self._driver))[0]
        return Depth(row["rows"], row["leased"], row["due"], row["oldest_due_s"])


def _pairs(claims: Iterable[Claim]) -> dict[str, list[UUID]]:
    held = list(claims)
    return {"ids": [claim.sandbox_id for claim in held], "owners": [claim.owner for claim in held]}


def _beats(rows: Sequence[Any]) -> dict[UUID, Beat]:
    return {_uuid(row["sandbox_id"]): Beat(row["generation"], row["cause"]) for row in rows}


def _uuid(value: Any) -> UUID:
    return UUID(int=value.int)  # asyncpg has a UUID class of its own
