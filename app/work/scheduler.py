"""The scheduler: APScheduler as clock, trigger engine and job-store interface, on rows that the log itself writes.

**Protocol.** `deadlines` has one row for each deadline of a stream, written by the append that sets or moves the
deadline and deleted by the one that ends it. `DeadlineStore` shows these rows to APScheduler as jobs. Asked for due
jobs it claims up to 200 rows in one statement and moves their `next_run_time` by a lease; the job (`app.work.fire`)
looks at the deadline again. Delivery is at least once, the effect is exactly once.

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

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from apscheduler.job import Job
from apscheduler.jobstores.base import BaseJobStore

from app.store.deadlines.rows import Deadline
from app.work.fire import Deadlines
from app.work.timers import ON_LOOP, Bridge, LoopExecutor, interval

_BATCH = 200
_MAX_WAITING = 400
"""Claimed and not yet run, in this process. More would let leases end before their turn comes."""
_MAX_WAIT_S = 1.0
_BUSY_S = 0.05


class DeadlineStore(BaseJobStore):
    """`deadlines` as APScheduler sees them. The id of a job is `<stream id>/<name>`."""

    def __init__(self, deadlines: Deadlines, bridge: Bridge, executor: LoopExecutor, lease: float) -> None:
        """`lease` in seconds."""
        super().__init__()
        self._deadlines = deadlines
        self._rows = deadlines.rows
        self._bridge = bridge
        self._executor = executor
        self._lease = lease
        self._found = 0
        self._expecting = False
        self._wait: float | None = None

    def get_due_jobs(self, now: datetime) -> list[Job]:
        """Claim. The run time is `now`: the database has said that it is due.

        At the end of a longest wait nothing is expected, so this first asks what is next, and claims only if that is
        due. So an idle worker sends one statement a second instead of two.
        """
        if not self._expecting:
            self._wait = self._earliest()
            if self._wait > 0:
                self._found = 0
                return []
        due: list[Deadline] = self._bridge.ask(self._claim, [])
        self._found, self._wait = len(due), None
        return [self._job(one, now) for one in due]

    def _earliest(self) -> float:
        wait = self._bridge.ask(self._rows.earliest, _MAX_WAIT_S)
        return _MAX_WAIT_S if wait is None else min(wait, _MAX_WAIT_S)

    async def _claim(self) -> list[Deadline]:
        room = min(_BATCH, _MAX_WAITING - self._executor.waiting)
        return await self._rows.claim(room, self._lease) if room > 0 else []

    def get_next_run_time(self) -> datetime:
        """The earliest row's, within a second from now."""
        wait, self._wait = self._earliest() if self._wait is None else self._wait, None
        # Rows that are due and were not found just now are locked by another, or have to wait for room here.
        seconds = max(0.0 if self._found else _BUSY_S, wait)
        self._expecting = seconds < _MAX_WAIT_S
        return datetime.now(UTC) + timedelta(seconds=seconds)

    def lookup_job(self, job_id: str) -> Job | None:
        """One job."""
        stream_id, name = _key(job_id)
        found = self._bridge.ask(lambda: self._rows.lookup(stream_id, name), None)
        return None if found is None else self._job(found, found.leased_until)

    def get_all_jobs(self) -> list[Job]:
        """All jobs, earliest first."""
        everything: list[Deadline] = self._bridge.ask(self._rows.everything, [])
        return [self._job(one, one.leased_until) for one in everything]

    def add_job(self, job: Job) -> None:
        """Only an append writes rows, so that none can be without its stream."""
        raise NotImplementedError

    def update_job(self, job: Job) -> None:
        """Nothing: the claim has moved the row already."""

    def remove_job(self, job_id: str) -> None:
        """Absent is fine."""
        stream_id, name = _key(job_id)
        self._bridge.ask(lambda: self._rows.remove(stream_id, name), None)

    def remove_all_jobs(self) -> None:
        """Deadlines are never deleted as a whole."""
        raise NotImplementedError

    def _job(self, deadline: Deadline, run_time: datetime) -> Job:
        job: Any = Job(
            self._scheduler,
            id=f"{deadline.stream_id}/{deadline.name}",
            name=f"{deadline.name} of {deadline.kind} {deadline.stream_id}",
            func=self._deadlines.fire,
            args=(deadline,),
            kwargs={},
            trigger=interval(self._lease, start=deadline.fires_at),
            executor=ON_LOOP,
            misfire_grace_time=None,
            coalesce=True,
            max_instances=1,
            next_run_time=run_time,
        )
        job._jobstore_alias = self._alias  # noqa: SLF001 - as the interface asks of a store
        return job


def _key(job_id: str) -> tuple[UUID, str]:
    stream_id, _, name = job_id.partition("/")
    return UUID(stream_id), name
