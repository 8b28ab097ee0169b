"""What happens when a deadline fires, by kind of stream and name.

**Protocol.** The job executes a command, and `decide` compares the state with the clock again. When it appends, the
append itself has rewritten or deleted the row. When it appends nothing, the deadline was not due: the row was claimed
just before a renewal, or it was set under other limits. Then the row is moved to the time that the state says, or
deleted when the state has no such deadline. In both cases only if nobody rewrote it since the claim.

**Invariants.** A deadline is never lost, because only the state can say that it has ended. A deadline never spins,
because a row that was claimed is either rewritten or moved into the future.

**How it fails.** A job that fails for any reason hands its row back, due in a second. A job whose process dies fires
again when the lease ends. The version guard of the append lets one of two jobs, or a renewal, win.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TypeAlias

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.deadlines import EXPIRY, FREEZE, READY, TRANSITION, Limits, longest
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.snapshot.decide import COMMIT, EndCommit, RecordFailed
from app.domain.snapshot.state import SnapshotState
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.errors import NotFound, StoreUnavailable
from app.service.sandboxes import Service
from app.store.deadlines.rows import Deadline, DeadlineRows

_LOG = logging.getLogger(__name__)
_AGAIN_S = 1.0
Job: TypeAlias = Callable[[Deadline], Awaitable[None]]


def next_due(sandbox: Sandbox, name: str, now: datetime, limits: Limits) -> datetime | None:
    """When a deadline of this sandbox fires. None = it has no such deadline in its present state."""
    if name == EXPIRY:
        return sandbox.expires_at if sandbox.ending is None else None
    if name == READY:
        began = sandbox.begun_at if sandbox.awaits_agent else None
        return None if began is None else began + timedelta(seconds=limits.ready_s)
    if name == FREEZE:
        asked = sandbox.freeze_at if sandbox.holds_still else None
        return None if asked is None else asked + timedelta(seconds=limits.freeze_s)
    limit = longest(sandbox, limits) if name == TRANSITION else None
    if limit is None:
        return None
    if sandbox.phase is not Phase.STOPPING:
        return sandbox.changed_at + timedelta(seconds=limit)
    _, wait = limits.report((now - sandbox.changed_at).total_seconds())
    return now + timedelta(seconds=wait)


class Deadlines:
    """The jobs of all deadlines."""

    def __init__(
        self, rows: DeadlineRows, service: Service, limits: Limits, *, timer_id: str, app_version: str
    ) -> None:
        """`timer_id` says in the log which worker fired a deadline. `limits` are those of the service."""
        self.rows = rows
        self._service = service
        self._limits = limits
        self._timer_id = timer_id
        self._app_version = app_version
        self._jobs: dict[tuple[str, str], Job] = {
            ("sandbox", EXPIRY): self._fire_sandbox,
            ("sandbox", TRANSITION): self._fire_sandbox,
            ("sandbox", READY): self._fire_sandbox,
            ("sandbox", FREEZE): self._fire_freeze,
            ("snapshot", COMMIT): self._fire_snapshot,
        }

    async def fire(self, deadline: Deadline) -> None:
        """The job of one row. Never raises on account of one stream."""
        what = f"deadline {deadline.name} of {deadline.kind} {deadline.stream_id}"
        job = self._jobs.get((deadline.kind, deadline.name))
        if job is None:
            # A newer version wrote it; its own workers fire it. The lease keeps it from coming back at once.
            _LOG.warning("%s is not known to this version; it is left to a newer one", what)
            return
        try:
            await job(deadline)
        except NotFound:
            _LOG.warning("%s has no stream, which is a bug; the deadline is deleted", what)
            await self.rows.remove(deadline.stream_id, deadline.name)
        except Exception as error:  # noqa: BLE001 - it fires again whatever it was
            # Its first line: PostgreSQL's details repeat the row.
            said = str(error).partition("\n")[0]
            _LOG.warning("%s could not be fired, again in a second: %s: %s", what, type(error).__name__, said)
            with suppress(StoreUnavailable):
                await self.rows.hand_back(deadline, _AGAIN_S)

    def _meta(self, deadline: Deadline) -> Meta:
        return Meta(Actor(ActorKind.TIMER, self._timer_id, deadline.name), self._app_version, cause=deadline.cause)

    async def _fire_freeze(self, deadline: Deadline) -> None:
        """The snapshot has failed, then its source goes on. In the other order it might be frozen once more."""
        try:
            await self._end_snapshot(deadline)
        finally:
            await self._fire_sandbox(deadline)

    async def _end_snapshot(self, deadline: Deadline) -> None:
        loaded = await self._service.view.load(deadline.stream_id, ANY_TENANT)
        sandbox, now = loaded if loaded is not None else (None, None)
        due = None if sandbox is None or now is None else next_due(sandbox, FREEZE, now, self._limits)
        if sandbox is None or now is None or sandbox.frozen_by is None or due is None or now < due:
            return
        message = f"The source stood still for {self._limits.freeze_s:.0f} s, and its files were not copied by then."
        failed = RecordFailed("snapshot_runtime_timeout", message)
        with suppress(NotFound):
            await self._service.snapshots.execute(
                sandbox.frozen_by.snapshot_id, ANY_TENANT, failed, self._meta(deadline)
            )

    async def _fire_snapshot(self, deadline: Deadline) -> None:
        command = EndCommit(self._limits, deadline.last_reason, deadline.last_error)
        snapshots = self._service.snapshots
        outcome = await snapshots.execute(deadline.stream_id, ANY_TENANT, command, self._meta(deadline))
        if outcome.events:
            return
        if outcome.snapshot.state is SnapshotState.CREATING:
            await self.rows.postpone(deadline, outcome.snapshot.created_at + timedelta(seconds=self._limits.commit_s))
        else:
            await self.rows.drop(deadline)

    async def _fire_sandbox(self, deadline: Deadline) -> None:
        meta = self._meta(deadline)
        outcome = await self._service.execute(deadline.stream_id, ANY_TENANT, self._command(deadline), meta)
        if outcome.events:
            return
        loaded = await self._service.view.load(deadline.stream_id, ANY_TENANT)
        assert loaded is not None, "a head row is never deleted"
        sandbox, now = loaded
        at = next_due(sandbox, deadline.name, now, self._limits)
        if at is None:
            await self.rows.drop(deadline)
        else:
            await self.rows.postpone(deadline, at)

    def _command(self, deadline: Deadline) -> cmd.Expire | cmd.EndTransition | cmd.EndProbe | cmd.EndFreeze:
        if deadline.name == FREEZE:
            return cmd.EndFreeze(self._limits)
        if deadline.name == EXPIRY:
            return cmd.Expire()
        if deadline.name == READY:
            return cmd.EndProbe(self._limits)
        return cmd.EndTransition(self._limits, deadline.last_reason, deadline.last_error)
