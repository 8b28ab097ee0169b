"""What an operator asks first: are the engines there, does the queue move, is anything stuck?

Each figure comes from one statement, so two figures may be some milliseconds apart. Nothing here asks an engine: an
engine is as the workers last recorded it.

A sandbox that fails because of what its user asked for (an image that does not exist, a login that the registry
refuses, an entrypoint that is not there) is shown and is no problem: the operator cannot mend it, and any user could
otherwise turn an alarm on. These are the reasons that a driver gives as final because of the request. All else is the
operator's: the engine, the database, errors of ours, sealed values, a name that another object has, every phase that
lasts too long, and a pull that fails without a final answer of the registry. A host without DNS, with a full disk or
behind a rate limit fails the pulls of everybody; that a user named a registry that does not exist looks the same.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from msgspec import Struct
from sqlalchemy import Double, Integer, Text, any_, bindparam, case, extract, func, literal, select
from sqlalchemy.dialects.postgresql import ARRAY

from app.domain.snapshot.plan import SOURCE_FREEZING
from app.domain.snapshot.state import SnapshotState
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.store import EventLog
from app.store.stations import SAID_SECONDS
from app.store.tables import deadlines, engines, reconcile_queue, sandboxes, snapshots, stations

DARK_AFTER_SECONDS = 15.0
LATE_AFTER_SECONDS = 15.0
"""A row that is due for longer than this is late: no worker has taken it."""
FAILING_ATTEMPTS = 3
MAX_HELD_POSITIONS = 1000
"""A horizon that lies further behind is held back by a writer that hangs."""
MAX_SHOWN = 20
"""Stuck sandboxes that are read and listed, the operator's first."""
USERS_REASONS = (
    "ENTRYPOINT_NOT_EXECUTABLE",
    "ENTRYPOINT_NOT_FOUND",
    "IMAGE_AUTH_FAILED",
    "IMAGE_AUTH_REQUIRED",
    "IMAGE_NOT_FOUND",
    "IMAGE_PLATFORM_MISMATCH",
    "IMAGE_REFERENCE_INVALID",
    "SPEC_REJECTED",
    "START_REJECTED",
)
"""Reasons of failures that only the user of the sandbox can mend."""

_now = func.clock_timestamp()
_USERS = literal(list(USERS_REASONS), ARRAY(Text))
_Q, _D, _S, _E = reconcile_queue.c, deadlines.c, sandboxes.c, engines.c
_N, _W = snapshots.c, stations.c


def _seconds(earlier: Any) -> Any:
    return extract("epoch", _now - earlier).cast(Double)


class EngineLine(Struct, frozen=True):
    """One engine as the workers last recorded it, with the ages of their last contact and sweep."""

    name: str
    kind: str
    state: str
    state_since: datetime
    trouble: str
    version: str
    sandboxes: int
    """Not closed yet."""
    seen_s: float | None
    """Seconds since a worker last reached it."""
    swept_s: float | None
    """Seconds since a worker last compared all of it."""
    engine_id: str
    mark: str


class QueueLine(Struct, frozen=True):
    """The queue of one engine; an empty name = not placed."""

    engine: str
    rows: int
    claimed: int
    due: int
    failing: int
    oldest_due_s: float


class DeadlineLine(Struct, frozen=True):
    """How many deadlines of one name there are, and how many are late."""

    name: str
    rows: int
    overdue: int
    """Deadlines that are due and have not fired."""
    oldest_overdue_s: float


class StuckLine(Struct, frozen=True):
    """A sandbox or snapshot that stays in a transitional phase, or whose attempts fail."""

    id: UUID
    tenant: str
    phase: str
    """Of a snapshot its state."""
    engine: str | None
    since_s: float
    attempts: int
    reason: str | None
    message: str | None
    users: bool = False
    """Pending for a reason that only its user can mend. No problem of the operator's."""
    kind: str = "sandbox"


class StationLine(Struct, frozen=True):
    """A worker that cannot use its engine, as it said itself."""

    name: str
    engine: str
    trouble: str
    since_s: float


class LogLine(Struct, frozen=True):
    """The state of the log."""

    last_position: int
    horizon: int
    partitions_ahead: int

    @property
    def lag(self) -> int:
        """Positions that are handed out and not settled."""
        return self.last_position - self.horizon


class Overview(Struct, frozen=True):
    """The whole status of an installation."""

    engines: tuple[EngineLine, ...]
    queue: tuple[QueueLine, ...]
    deadlines: tuple[DeadlineLine, ...]
    stuck: tuple[StuckLine, ...]
    log: LogLine
    phases: dict[str, int]
    """Sandboxes that are not closed, by phase."""
    stations: tuple[StationLine, ...] = ()
    """Workers that cannot use their engines."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, in words; empty when nothing is."""
        return (*self._engine_problems(), *self._work_problems(), *self._log_problems())

    def _engine_problems(self) -> list[str]:
        found: list[str] = []
        if not self.engines:
            found.append("no engine is registered: start a worker that can reach one")
        for engine in self.engines:
            if engine.state != "up":
                found.append(f"engine {engine.name} is {engine.state}: {engine.trouble}")
            elif engine.seen_s is None or engine.seen_s > DARK_AFTER_SECONDS:
                ago = "never" if engine.seen_s is None else f"{engine.seen_s:.0f} s ago"
                found.append(f"no worker serves engine {engine.name}: last seen {ago}")
        found += [
            f"worker {line.name} cannot use engine {line.engine}: {line.trouble} (for {line.since_s:.0f} s)"
            for line in self.stations
        ]
        return found

    def _work_problems(self) -> list[str]:
        found = [
            f"queue of engine {line.engine or '(not placed)'}: {line.due} due, the oldest for {line.oldest_due_s:.0f} s"
            for line in self.queue
            if line.oldest_due_s > LATE_AFTER_SECONDS
        ]
        found += [
            f"{line.overdue} deadlines {line.name} have not fired, the oldest for {line.oldest_overdue_s:.0f} s"
            for line in self.deadlines
            if line.oldest_overdue_s > LATE_AFTER_SECONDS
        ]
        for kind, kinds in (("sandbox", "sandboxes"), ("snapshot", "snapshots")):
            stuck = sum(line.kind == kind and not line.users for line in self.stuck)
            if stuck:
                bound = "at least " if stuck == MAX_SHOWN else ""
                found.append(f"{bound}{stuck} {kinds} are stuck or failing; they are listed below")
        return found

    def _log_problems(self) -> list[str]:
        found: list[str] = []
        if self.log.lag > MAX_HELD_POSITIONS:
            found.append(f"the log's horizon is {self.log.lag} positions behind: a writer hangs in its transaction")
        if self.log.partitions_ahead < 1:
            found.append("no spare partition of the log is left: a worker makes them; check its log")
        return found


def _engines_statement() -> Statement:
    open_ = (
        select(func.count())
        .select_from(sandboxes)
        .where(_S.engine == _E.name, _S.closed_at.is_(None))
        .scalar_subquery()
    )
    return Statement(
        select(
            _E.name,
            _E.kind,
            _E.state,
            _E.state_since,
            _E.trouble,
            _E.server_version,
            open_.label("sandboxes"),
            _seconds(_E.last_seen_at).label("seen_s"),
            _seconds(_E.swept_at).label("swept_s"),
            _E.engine_id,
            _E.mark,
        ).order_by(_E.name)
    )


def _oldest(column: Any) -> Any:
    return func.coalesce(_seconds(func.min(column).filter(column <= _now)), 0.0).cast(Double)


_ENGINES = _engines_statement()
_QUEUE = Statement(
    select(
        _Q.engine,
        func.count().label("rows"),
        func.count().filter(_Q.lease_until > _now).label("claimed"),
        func.count().filter(_Q.due_at <= _now).label("due"),
        func.count().filter(_Q.attempts > 0).label("failing"),
        _oldest(_Q.due_at).label("oldest_due_s"),
    )
    .group_by(_Q.engine)
    .order_by(_Q.engine)
)
_DEADLINES = Statement(
    select(
        _D.name,
        func.count().label("rows"),
        func.count().filter(_D.fires_at <= _now).label("overdue"),
        _oldest(_D.fires_at).label("oldest_overdue_s"),
    )
    .group_by(_D.name)
    .order_by(_D.name)
)
_STATIONS = Statement(
    select(_W.name, _W.engine, _W.trouble, _seconds(_W.since).label("since_s"))
    .where(_seconds(_W.said_at) < bindparam("last_s", type_=Double))
    .order_by(_W.engine, _W.name)
    .limit(MAX_SHOWN)
)
_PHASES = Statement(select(_S.phase, func.count()).where(_S.closed_at.is_(None)).group_by(_S.phase))


def _stuck_statement() -> Statement:
    reason = func.coalesce(_Q.last_reason, _S.waiting["reason"].astext).cast(Text)
    users = func.coalesce((_S.phase == "Pending") & (reason == any_(_USERS)), False)
    since_s = _seconds(_S.changed_at)
    too_long = case(
        (_S.phase == "Stopping", since_s > bindparam("stopping_s", type_=Double)),
        ((_S.phase == "Pausing") | (_S.phase == "Resuming"), since_s > bindparam("power_s", type_=Double)),
        else_=False,
    )
    return Statement(
        select(
            _S.id,
            _S.tenant,
            _S.phase,
            _S.engine,
            since_s.label("since_s"),
            func.coalesce(_Q.attempts, 0).cast(Integer).label("attempts"),
            reason.label("reason"),
            func.coalesce(_Q.last_error, _S.waiting["message"].astext).cast(Text).label("message"),
            users.label("users"),
        )
        .select_from(sandboxes)
        .outerjoin(reconcile_queue, _Q.stream_id == _S.id)
        .where(_S.closed_at.is_(None), (_Q.attempts >= FAILING_ATTEMPTS) | too_long)
        .order_by(users, _S.changed_at)
        .limit(MAX_SHOWN)
    )


def _stuck_snapshots_statement() -> Statement:
    since_s = _seconds(_N.changed_at)
    # While it is Creating, each question to its source counts like an attempt; the deadline ends what lasts too long.
    fails = (_Q.attempts >= FAILING_ATTEMPTS) & (_Q.last_reason != SOURCE_FREEZING)
    too_long = (_N.state == SnapshotState.DELETING) & (since_s > bindparam("stopping_s", type_=Double))
    return Statement(
        select(
            _N.id,
            _N.tenant,
            _N.state,
            _N.engine,
            since_s.label("since_s"),
            func.coalesce(_Q.attempts, 0).cast(Integer).label("attempts"),
            _Q.last_reason,
            _Q.last_error,
        )
        .select_from(snapshots)
        .outerjoin(reconcile_queue, _Q.stream_id == _N.id)
        .where(_N.removed_at.is_(None), fails | too_long)
        .order_by(_N.changed_at)
        .limit(MAX_SHOWN)
    )


_STUCK = _stuck_statement()
_STUCK_SNAPSHOTS = _stuck_snapshots_statement()


class OverviewReader:
    """Reads the status from the database."""

    def __init__(self, database: Database, *, stopping_s: float = 60, power_s: float = 60) -> None:
        """On an open database, with the operator's limits of transitional phases."""
        self._database = database
        self._log = EventLog(database, remember=0)
        self._limits = {"stopping_s": stopping_s, "power_s": power_s}

    async def engines(self) -> tuple[EngineLine, ...]:
        """Every engine that the log knows, by name."""
        return tuple(EngineLine(*row) for row in await self._database.fetch(_ENGINES))

    async def read(self) -> Overview:
        """Read the status at this moment."""
        fetch = self._database.fetch
        identity = await self._log.identity()
        return Overview(
            await self.engines(),
            tuple(QueueLine(*row) for row in await fetch(_QUEUE)),
            tuple(DeadlineLine(*row) for row in await fetch(_DEADLINES)),
            (*await self._stuck(), *await self._stuck_snapshots()),
            LogLine(identity.last_position, await self._log.horizon(), await self._log.partitions_ahead()),
            {row[0]: row[1] for row in await fetch(_PHASES)},
            tuple(StationLine(*row) for row in await fetch(_STATIONS, last_s=SAID_SECONDS)),
        )

    async def _stuck(self) -> list[StuckLine]:
        rows = await self._database.fetch(_STUCK, **self._limits)
        return [StuckLine(UUID(int=row[0].int), *row[1:]) for row in rows]

    async def _stuck_snapshots(self) -> list[StuckLine]:
        rows = await self._database.fetch(_STUCK_SNAPSHOTS, stopping_s=self._limits["stopping_s"])
        return [StuckLine(UUID(int=row[0].int), *row[1:], kind="snapshot") for row in rows]
