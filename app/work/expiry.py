"""Expiry: APScheduler as clock, trigger engine and job-store interface, on rows that the log itself writes.

**Protocol.** `expiry_jobs` has one row for every sandbox with a deadline, written by the append that sets or moves the
deadline and deleted by the one that ends the sandbox. `ExpiryJobStore` shows these rows to APScheduler as jobs. Asked
for due jobs it claims up to 200 rows in one statement and moves their `next_run_time` by a lease; the job runs
`Expire`, and `decide` looks at the deadline again. Delivery is at least once, the effect is exactly once: the version
guard of the append lets one of two expiries, or a renewal, win.

**Invariants.**

* Every worker runs this; there is no leader. Rows locked by another are skipped.
* A claim that is never run (kill -9) fires again when its lease ends: jobs have an *interval* trigger, period = lease,
  because APScheduler removes the row of a `date` job when it is submitted, not when it is done.
* The database's clock decides what is due. A claimed job is given APScheduler's own `now` as run time, so a local clock
  that is behind cannot hold a claimed row back for a lease; waits are computed in the database and never exceed a
  second, so one that is ahead cannot spin, and rows added by others are seen within that second.
* Jobs are rebuilt from columns; nothing is pickled, so no version of the code can fail to read another's.

**How it fails.** A database that is away: "nothing due, ask again in a second". A job that fails hands its row back,
due in a second; one whose process dies waits for the lease. See `app.work.timers` for the thread.
"""

# APScheduler 3 ships without types, and its base class has methods without results.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from apscheduler.job import Job
from apscheduler.jobstores.base import BaseJobStore
from msgspec import Struct
from sqlalchemy import (
    DateTime,
    Double,
    Integer,
    Interval,
    Uuid,
    any_,
    bindparam,
    delete,
    func,
    literal_column,
    select,
    update,
)

from app.domain.sandbox.commands import Expire
from app.domain.sandbox.events import Actor, Meta
from app.errors import NotFound, StoreUnavailable
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import expiry_jobs
from app.work.policy import WorkPolicy
from app.work.timers import ON_LOOP, Bridge, LoopExecutor, interval

_LOG = logging.getLogger(__name__)
_BATCH = 200
_MOST_WAITING = 400
"""Claimed and not yet run, in this process. More would let leases end before their turn comes."""
_LOOK_S = 1.0
_BUSY_S = 0.05
_AGAIN_S = 1.0

_J = expiry_jobs.c
_NOW = select(func.clock_timestamp()).scalar_subquery()
_SECOND = literal_column("interval '1 second'", Interval)
_COLUMNS = (_J.sandbox_id, _J.expires_at, _J.next_run_time, _J.cause)


def _claim() -> Statement:
    due = (
        select(_J.sandbox_id)
        .where(_J.next_run_time <= _NOW)
        .order_by(_J.next_run_time)
        .limit(bindparam("limit", type_=Integer))
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    return Statement(
        update(expiry_jobs)
        # As an array, so that the rows are fetched by key however many others there are.
        .where(_J.sandbox_id == any_(func.array(select(due.c.sandbox_id).scalar_subquery())))
        .values(next_run_time=_NOW + bindparam("lease", type_=Double) * _SECOND, attempts=_J.attempts + 1)
        .returning(*_COLUMNS)
    )


CLAIM = _claim()
EARLIEST = Statement(
    # The wait is taken off the row that an index scan finds first; an aggregate over all rows would read them all.
    select(func.greatest(0.0, func.extract("epoch", _J.next_run_time - _NOW)).cast(Double).label("wait"))
    .order_by(_J.next_run_time)
    .limit(1)
)
_LOOKUP = Statement(select(*_COLUMNS).where(_J.sandbox_id == bindparam("sandbox_id", type_=Uuid)))
_ALL = Statement(select(*_COLUMNS).order_by(_J.next_run_time))
_REMOVE = Statement(delete(expiry_jobs).where(_J.sandbox_id == bindparam("sandbox_id", type_=Uuid)))
_HAND_BACK = Statement(
    update(expiry_jobs)
    .where(
        _J.sandbox_id == bindparam("sandbox_id", type_=Uuid),
        # A renewal meanwhile has set another time, which stays.
        _J.next_run_time == bindparam("leased_until", type_=DateTime(timezone=True)),
    )
    .values(next_run_time=_NOW + bindparam("wait", type_=Double) * _SECOND)
)


class Due(Struct, frozen=True):
    """A row, claimed or looked up."""

    sandbox_id: UUID
    expires_at: datetime
    leased_until: datetime
    cause: int | None


class ExpiryJobs:
    """The rows, and what one job does."""

    def __init__(
        self, database: Database, service: Service, policy: WorkPolicy, actor: Actor, app_version: str
    ) -> None:
        self._database = database
        self._service = service
        self._lease = policy.expiry_lease
        self._actor = actor
        self._app_version = app_version

    async def claim(self, limit: int) -> list[Due]:
        """Due rows, earliest first; nobody else gets them before the lease ends."""
        rows = await self._database.reserved.fetch(CLAIM, limit=limit, lease=self._lease)
        return sorted(map(_due, rows), key=lambda due: due.expires_at)

    async def earliest(self) -> float | None:
        """Seconds until the earliest row is due."""
        row = await self._database.reserved.fetch_one(EARLIEST)
        return None if row is None else row["wait"]

    async def lookup(self, sandbox_id: UUID) -> Due | None:
        """One row."""
        row = await self._database.fetch_one(_LOOKUP, sandbox_id=sandbox_id)
        return None if row is None else _due(row)

    async def everything(self) -> list[Due]:
        """All rows, earliest first."""
        return [_due(row) for row in await self._database.fetch(_ALL)]

    async def remove(self, sandbox_id: UUID) -> None:
        """Absent is fine."""
        await self._database.fetch(_REMOVE, sandbox_id=sandbox_id)

    async def expire(self, due: Due) -> None:
        """The job. Never raises on account of one sandbox."""
        meta = Meta(self._actor, self._app_version, cause=due.cause)
        try:
            outcome = await self._service.execute(due.sandbox_id, Expire(), meta)
        except NotFound:
            _LOG.warning("expiry job of sandbox %s, which does not exist: removed", due.sandbox_id)
            await self.remove(due.sandbox_id)
        except Exception as error:  # noqa: BLE001 - it fires again whatever it was
            what = f"{type(error).__name__}: {error}"
            _LOG.warning("expiry of sandbox %s did not work, again in a second: %s", due.sandbox_id, what)
            with suppress(StoreUnavailable):
                await self._database.fetch(
                    _HAND_BACK, sandbox_id=due.sandbox_id, leased_until=due.leased_until, wait=_AGAIN_S
                )
        else:
            if not outcome.events and outcome.sandbox.ending is not None:
                await self.remove(due.sandbox_id)  # it had ended before; the append that did removed the row it saw


def _due(row: Any) -> Due:
    return Due(UUID(int=row["sandbox_id"].int), row["expires_at"], row["next_run_time"], row["cause"])


class ExpiryJobStore(BaseJobStore):
    """`expiry_jobs` as APScheduler sees them."""

    def __init__(self, jobs: ExpiryJobs, bridge: Bridge, executor: LoopExecutor, lease: float) -> None:
        super().__init__()
        self._jobs = jobs
        self._bridge = bridge
        self._executor = executor
        self._lease = lease
        self._found = 0

    def get_due_jobs(self, now: datetime) -> list[Job]:
        """Claim. The run time is `now`: the database has said that it is due."""
        due: list[Due] = self._bridge.ask(self._claim, [])
        self._found = len(due)
        return [self._job(one, now) for one in due]

    async def _claim(self) -> list[Due]:
        room = min(_BATCH, _MOST_WAITING - self._executor.waiting)
        return await self._jobs.claim(room) if room > 0 else []

    def get_next_run_time(self) -> datetime:
        """The earliest row's, within a second from now."""
        wait = self._bridge.ask(self._jobs.earliest, _LOOK_S)
        # Rows that are due and were not found just now are locked by another, or have to wait for room here.
        floor = 0.0 if self._found else _BUSY_S
        return datetime.now(UTC) + timedelta(seconds=min(max(floor, _LOOK_S if wait is None else wait), _LOOK_S))

    def lookup_job(self, job_id: str) -> Job | None:
        """One job."""
        due = self._bridge.ask(lambda: self._jobs.lookup(UUID(job_id)), None)
        return None if due is None else self._job(due, due.leased_until)

    def get_all_jobs(self) -> list[Job]:
        """All jobs, earliest first."""
        everything: list[Due] = self._bridge.ask(self._jobs.everything, [])
        return [self._job(due, due.leased_until) for due in everything]

    def add_job(self, job: Job) -> None:
        """Only an append writes rows, so that none can be without its sandbox."""
        raise NotImplementedError

    def update_job(self, job: Job) -> None:
        """Nothing: the claim has moved the row already."""

    def remove_job(self, job_id: str) -> None:
        """Absent is fine."""
        self._bridge.ask(lambda: self._jobs.remove(UUID(job_id)), None)

    def remove_all_jobs(self) -> None:
        """Not a thing to do to deadlines."""
        raise NotImplementedError

    def _job(self, due: Due, run_time: datetime) -> Job:
        job: Any = Job(
            self._scheduler,
            id=str(due.sandbox_id),
            name=f"expire {due.sandbox_id}",
            func=self._jobs.expire,
            args=(due,),
            kwargs={},
            trigger=interval(self._lease, start=due.expires_at),
            executor=ON_LOOP,
            misfire_grace_time=None,
            coalesce=True,
            max_instances=1,
            next_run_time=run_time,
        )
        job._jobstore_alias = self._alias  # noqa: SLF001 - as the interface asks of a store
        return job
