"""Where the log and the engine are compared as wholes. It judges nothing about sandboxes: it only has them looked at.

**Sweep.** At start, every `resync_every`, and soon after a sweep has failed or the engine was away: the inventory is
read whole, then the open sandboxes, page by page. What differs goes to the queue, and a reconciler looks at it on its
own: adopts, records, or confirms that it is missing. A listing is never a verdict; one that fails ends the sweep, one
that is empty leads to looks that find everything.
The order matters: objects are made after their sandbox, so what the inventory shows is in the pages or is an orphan.

**Orphans.** An object of ours that belongs to no open sandbox, and whose id is still not open when the database is
asked once more, is removed if it was there, as the same object, in the sweep before, is older than `orphan_grace`, and
the engine says it is well. The inventory holds only what bears our installation's label: strangers are out of reach.

**Once a driver at a time.** A sweep takes a session-level advisory lock on a connection of its own: no transaction
stays open, and a killed process lets go. The lock only saves work, since all of this may be done twice; so that no
pooler that keeps it for a dead client can stop sweeps, a worker passes by at most twice in a row, then sweeps anyway.

**Safety nets**, which must always find nothing and complain if they do: open sandboxes that want work and have no queue
row (they get one), and deadlines that passed two minutes ago without an expiry.

**Hints** come from the engine's events: ids, gathered for a moment, put in the user lane. Lossy by contract.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy import (
    ColumnElement,
    Double,
    Integer,
    Interval,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.domain.sandbox.state import Desired, Phase, RuntimeState
from app.errors import RuntimeFault, StoreUnavailable
from app.runtime.driver import Driver, Observed, Power
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.signal import Signal
from app.store.queue.reconcile import BACKGROUND, USER, Queue
from app.store.tables import reconcile_queue, sandboxes
from app.work.policy import WorkPolicy

_PAGE = 500
_MOST_PASSES = 2
_OVERDUE_S = 120.0
_REOPEN_S = 1.0
_LOG = logging.getLogger(__name__)

_S = sandboxes.c
_SECOND = literal_column("interval '1 second'", Interval)
_NOW = select(func.clock_timestamp()).scalar_subquery()
_OF_DRIVER = and_(_S.driver == bindparam("driver", type_=Text), _S.closed_at.is_(None))
# Two int keys: another space than the one-key locks of the log's horizon. 21324 = 0x534C, 'SL'.
_KEY: tuple[ColumnElement[Any], ...] = (literal_column("21324"), func.hashtext(bindparam("driver", type_=Text)))
_LOCK = Statement(select(func.pg_try_advisory_lock(*_KEY).label("taken")))
_UNLOCK = Statement(select(func.pg_advisory_unlock(*_KEY)))
_OPEN = Statement(
    select(
        *(_S.id, _S.desired, _S.observed, _S.runtime["id"].astext.label("runtime_id")),
        reconcile_queue.c.sandbox_id.is_not(None).label("queued"),
    )
    .select_from(sandboxes.outerjoin(reconcile_queue, reconcile_queue.c.sandbox_id == _S.id))
    .where(_OF_DRIVER, _S.id > bindparam("after", type_=Uuid))
    .order_by(_S.id)
    .limit(bindparam("limit", type_=Integer))
)
_STILL_OPEN = Statement(
    select(_S.id, _NOW.label("now")).where(_S.id == any_(bindparam("ids", type_=ARRAY(Uuid))), _S.closed_at.is_(None))
)
_CLOCK = Statement(select(func.clock_timestamp().label("now")))
_WANTS_WORK = or_(
    *(_S.phase == phase for phase in (Phase.PENDING, Phase.PAUSING, Phase.RESUMING, Phase.STOPPING)),
    and_(_S.failure_reason.is_not(None), _S.observed != RuntimeState.REMOVED),
)
_STRANDED = Statement(
    select(_S.id)
    .select_from(sandboxes.outerjoin(reconcile_queue, reconcile_queue.c.sandbox_id == _S.id))
    .where(
        _OF_DRIVER,
        _WANTS_WORK,
        reconcile_queue.c.sandbox_id.is_(None),
        _S.changed_at < _NOW - bindparam("age", type_=Double) * _SECOND,
    )
    .limit(_PAGE)
)
_OVERDUE = Statement(
    select(func.count().label("overdue")).where(
        _OF_DRIVER, _S.ended_at.is_(None), _S.expires_at < _NOW - bindparam("age", type_=Double) * _SECOND
    )
)


class Swept(Struct, frozen=True):
    """What a sweep found. `skipped`: another worker is at it."""

    skipped: bool = False
    objects: int = 0
    sandboxes: int = 0
    enqueued: int = 0
    suspects: int = 0
    """Orphans by the look of this sweep; the next one may remove them."""
    removed: tuple[UUID, ...] = ()
    stranded: int = 0
    overdue: int = 0


class Known(Struct, frozen=True):
    """What the log says of an open sandbox, as far as a listing can contradict it."""

    id: UUID
    desired: Desired
    observed: RuntimeState
    runtime_id: str | None
    queued: bool


def contradicts(box: Known, seen: Observed | None) -> bool:
    """Whether the sandbox is worth a look of its own."""
    if box.desired is Desired.TERMINATED:
        return False  # it has a queue row, or is found stranded
    if seen is None:
        return box.observed in (RuntimeState.CREATED, RuntimeState.RUNNING, RuntimeState.PAUSED)
    match box.observed:
        case RuntimeState.NONE | RuntimeState.CREATED:
            return not box.queued  # who holds the row is about to find out
        case RuntimeState.RUNNING | RuntimeState.PAUSED:
            return seen.power.value != box.observed.value or seen.runtime_id != box.runtime_id
        case RuntimeState.EXITED:
            return seen.power in (Power.RUNNING, Power.PAUSED)
        case RuntimeState.LOST | RuntimeState.REMOVED:
            return True


class Resync:
    """Sweeps of one driver, and its hints."""

    def __init__(self, database: Database, driver: Driver, queue: Queue, signal: Signal, policy: WorkPolicy) -> None:
        self._database = database
        self._driver = driver
        self._queue = queue
        self._signal = signal
        self._policy = policy
        self._passes = 0
        self._due_at = 0.0
        self._failing = False
        self._suspects: frozenset[tuple[UUID, str]] = frozenset()

    def owe(self) -> None:
        """Events may have been missed: sweep at the next tick."""
        self._due_at = 0.0

    async def tick(self) -> None:
        """Sweep if it is time. Trouble is logged, never raised, and leaves the sweep owed."""
        if time.monotonic() < self._due_at:
            return
        pause = self._policy.resync_every * random.uniform(0.9, 1.1)  # noqa: S311 - jitter, not a secret
        self._due_at = time.monotonic() + pause  # before the sweep: what is owed during it stays owed
        try:
            swept = await self.sweep()
        except (RuntimeFault, StoreUnavailable) as error:
            _LOG.log(
                logging.DEBUG if self._failing else logging.WARNING, "no sweep of %s yet: %s", self._driver.name, error
            )
        except Exception:  # noqa: BLE001 - the next one may work
            _LOG.exception("a sweep of %s failed", self._driver.name)
        else:
            self._failing = False
            _LOG.info("swept %s: %s", self._driver.name, swept)
            return
        self._failing = True
        self.owe()

    async def sweep(self) -> Swept:
        """Compare everything once.

        Raises:
            RuntimeFault, StoreUnavailable: nothing was concluded.
        """
        async with self._alone() as mine:
            if not mine:
                return Swept(skipped=True)
            stranded = await self._rescue_stranded()
            overdue = await self._count_overdue()
            await self._driver.check()
            seen = {found.sandbox_id: found async for found in self._driver.inventory()}
            differing, known = await self._compare(seen)
            enqueued = await self._queue.enqueue(differing, BACKGROUND) if differing else 0
            removed, suspects = await self._orphans({id_: seen[id_] for id_ in seen.keys() - known})
            return Swept(
                objects=len(seen),
                sandboxes=len(known),
                enqueued=enqueued,
                suspects=suspects,
                removed=removed,
                stranded=stranded,
                overdue=overdue,
            )

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[bool]:
        async with self._database.connection() as connection:
            taken = (await connection.fetch(_LOCK, driver=self._driver.name))[0]["taken"]
            self._passes = 0 if taken or self._passes >= _MOST_PASSES else self._passes + 1
            try:
                yield taken or self._passes == 0
            finally:
                if taken:
                    await connection.fetch(_UNLOCK, driver=self._driver.name)

    async def _compare(self, seen: Mapping[UUID, Observed]) -> tuple[list[UUID], set[UUID]]:
        differing: list[UUID] = []
        known: set[UUID] = set()
        async for box in self._open():
            known.add(box.id)
            if contradicts(box, seen.get(box.id)):
                differing.append(box.id)
        return differing, known

    async def _open(self) -> AsyncIterator[Known]:
        after = UUID(int=0)
        while rows := await self._database.fetch(_OPEN, driver=self._driver.name, after=after, limit=_PAGE):
            for row in rows:
                after = UUID(int=row["id"].int)
                yield Known(
                    after, Desired(row["desired"]), RuntimeState(row["observed"]), row["runtime_id"], row["queued"]
                )

    async def _orphans(self, unknown: Mapping[UUID, Observed]) -> tuple[tuple[UUID, ...], int]:
        """Remove those that were there before; remember the others."""
        before, self._suspects = self._suspects, frozenset((id_, found.runtime_id) for id_, found in unknown.items())
        due = [found for id_, found in unknown.items() if (id_, found.runtime_id) in before]
        removed = [found.sandbox_id for found in await self._without_sandbox(due) if await self._remove(found)]
        return tuple(removed), len(unknown) - len(removed)

    async def _without_sandbox(self, due: list[Observed]) -> list[Observed]:
        if not due:
            return []
        now: datetime = (await self._database.fetch(_CLOCK))[0]["now"]
        grace = timedelta(seconds=self._policy.orphan_grace)
        old = [found for found in due if found.created_at is None or found.created_at < now - grace]
        await self._driver.check()
        rows = await self._database.fetch(_STILL_OPEN, ids=[found.sandbox_id for found in old])
        open_now = {UUID(int=row["id"].int) for row in rows}
        return [found for found in old if found.sandbox_id not in open_now]

    async def _remove(self, found: Observed) -> bool:
        what = f"{found.name} ({found.runtime_id[:12]}, {found.power}, made {found.created_at})"
        why = f"bears our label, sandbox {found.sandbox_id} is not open, seen in two sweeps"
        if self._policy.orphan_dry_run:
            _LOG.warning("orphan kept, dry run: %s: %s", what, why)
            return False
        try:
            await self._driver.remove(found.sandbox_id)
        except RuntimeFault as error:
            _LOG.warning("orphan %s could not be removed, the next sweep tries again: %s", what, error)
            return False
        _LOG.warning("orphan removed: %s: %s", what, why)
        return True

    async def _rescue_stranded(self) -> int:
        rows = await self._database.fetch(_STRANDED, driver=self._driver.name, age=self._policy.stranded_after)
        ids = [UUID(int=row["id"].int) for row in rows]
        if ids:
            _LOG.warning("sandboxes that wanted work had no queue row, which is a bug; they have one now: %s", ids)
            await self._queue.enqueue(ids, USER)
        return len(ids)

    async def _count_overdue(self) -> int:
        row = await self._database.fetch_one(_OVERDUE, driver=self._driver.name, age=_OVERDUE_S)
        overdue: int = 0 if row is None else row["overdue"]
        if overdue:
            _LOG.error("%d sandboxes are alive two minutes past their expiry, which is a bug or a long outage", overdue)
        return overdue

    async def follow_hints(self) -> None:
        """Put what stirs on the queue, for ever."""
        stirred: set[UUID] = set()
        news = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._gather(stirred, news), name="hints-gather")
            tasks.create_task(self._flush(stirred, news), name="hints-flush")

    async def _gather(self, stirred: set[UUID], news: asyncio.Event) -> None:
        while True:
            try:
                async for sandbox_id in self._driver.hints():
                    if sandbox_id is None:
                        self.owe()  # the stream broke: whatever happened meanwhile is for the sweep
                        continue
                    stirred.add(sandbox_id)
                    news.set()
            except Exception as error:  # noqa: BLE001 - hints may fail in any way, the sweep makes up for it
                _LOG.warning("hints of %s ended, following them again: %s", self._driver.name, type(error).__name__)
            self.owe()
            await asyncio.sleep(_REOPEN_S)

    async def _flush(self, stirred: set[UUID], news: asyncio.Event) -> None:
        while True:
            await news.wait()
            await asyncio.sleep(self._policy.hint_window)
            news.clear()
            ids = sorted(stirred)
            stirred.clear()
            try:
                await self._queue.enqueue(ids, USER)
            except StoreUnavailable:
                stirred.update(ids)
                news.set()
                await asyncio.sleep(_REOPEN_S)
            except Exception:  # noqa: BLE001
                _LOG.exception("hints could not be queued")
            else:
                for sandbox_id in ids:
                    self._signal.poke(sandbox_id)
