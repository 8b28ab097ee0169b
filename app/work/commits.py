"""Commits of snapshots, outside the slots.

**Protocol.** A run of the snapshot's reconciler gives its claim back and calls `want`. The task here looks at the
source, has the engine commit it, looks again, and records `snapshot.committed` only if the source was at rest at both
times and the log says that the same freeze lasted. Then it lets the source go on and wakes the snapshot, which is
cleaned while the source runs. Meanwhile the row of the snapshot is kept waiting, so that no other worker begins too.
A worker makes `policy.commits` at once, `policy.tenant_commits` of one tenant (`app.work.turns`); each packs what the
source has written, which takes a processor and the disk of the engine.

**Invariants.** An image whose commit was not watched from its beginning to its end is never used: it is removed, and
the commit is repeated. The source still stands still, so the content is the same. Of two workers that both have made
one, the first to record it wins, and the other removes its own.

**How it fails.** A worker that dies leaves the engine at work. Another one claims the row within a lease and commits
once more; the image of the first appears sometime and is removed by the next step, or by the sweep. A pause and a
resume from outside that both fall between two looks of ours, and whose events are lost, are not noticed.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import datetime
from uuid import UUID

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Power
from app.domain.sandbox.plan import Observe
from app.domain.sandbox.state import RuntimeState, Sandbox
from app.domain.snapshot.decide import RecordCommitted
from app.domain.snapshot.plan import DONE
from app.domain.snapshot.state import Snapshot
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeUnavailable, SandledgerError, StoreUnavailable
from app.runtime.driver import Artifact
from app.runtime.faults import AttemptFailed
from app.service.sandboxes import Service
from app.store.log.signal import Signal
from app.store.queue.reconcile import USER, Queue
from app.store.queue.waiting import WaitingRows
from app.work.policy import WorkPolicy
from app.work.reconcile.actors import Actors
from app.work.reconcile.troubles import UNAVAILABLE, describe
from app.work.reconcile.workloads import ref_of
from app.work.station import Station
from app.work.turns import Turns

MOVED = "SOURCE_MOVED"
_PROGRESS = "The files are being copied."
_LOG = logging.getLogger(__name__)


class SourceMoved(AttemptFailed):
    """The source was not at rest all the time."""

    def __init__(self, message: str) -> None:
        super().__init__(MOVED, message)


class Commits:
    """The commits of one worker."""

    def __init__(
        self,
        *,
        station: Station,
        service: Service,
        queue: Queue,
        rows: WaitingRows,
        signal: Signal,
        policy: WorkPolicy,
        actors: Actors,
    ) -> None:
        self._station = station
        self._driver = station.driver
        self._service = service
        self._queue = queue
        self._rows = rows
        self._signal = signal
        self._policy = policy
        self._actors = actors
        self._tasks: dict[UUID, asyncio.Task[None]] = {}
        self._waking: set[asyncio.Task[None]] = set()
        self.turns = Turns(policy.commits, policy.tenant_commits, self._has_turn)
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether a commit is under way."""
        return bool(self._tasks)

    def want(self, snapshot: Snapshot, cause: int | None) -> None:
        """Have it committed. Its row waits from before this call."""
        if self._closed or snapshot.id in self._tasks:
            return
        self.turns.begin(snapshot.id, snapshot.tenant)
        task = asyncio.create_task(self._run(snapshot, cause), name=f"commit-{snapshot.id}")
        self._tasks[snapshot.id] = task
        task.add_done_callback(lambda _: self._ended(snapshot.id))

    async def close(self) -> None:
        """Wait for none of them; other workers begin again at once. The engine ends what it has begun."""
        self._closed = True
        self.turns.close()
        left = dict(self._tasks)
        for task in left.values():
            task.cancel()
        await asyncio.gather(*left.values(), *self._waking, return_exceptions=True)
        with suppress(StoreUnavailable):
            await self._wake(*left)

    def _ended(self, snapshot_id: UUID) -> None:
        self._tasks.pop(snapshot_id, None)
        self.turns.leave(snapshot_id)

    def _has_turn(self, snapshot_id: UUID) -> None:
        """Its row waits; without this it would until its time is over."""

        async def wake() -> None:
            with suppress(StoreUnavailable):
                await self._wake(snapshot_id)

        task = asyncio.create_task(wake(), name=f"turn-{snapshot_id}")
        self._waking.add(task)
        task.add_done_callback(self._waking.discard)

    async def _run(self, snapshot: Snapshot, cause: int | None) -> None:
        keeping = asyncio.create_task(self._keep_waiting(snapshot.id))
        try:
            await self._commit(snapshot, cause)
            keeping.cancel()
            await self._wake(snapshot.id)
        except RuntimeUnavailable as error:
            wait = await self._station.suspect(snapshot.id, error)
            await self._put_off(snapshot.id, UNAVAILABLE, str(error), wait)
        except SourceMoved as error:
            # The source's own reconciler finds out why; the next freeze counts.
            _LOG.warning("the commit of snapshot %s is not used: %s", snapshot.id, error.message)
            await self._put_off(snapshot.id, MOVED, error.message, self._policy.exit_settle)
            if await self._queue.enqueue([snapshot.sandbox_id], USER):
                self._signal.poke(snapshot.sandbox_id, work=True)
        except SandledgerError as error:
            await self._count(snapshot.id, error)
        except Exception as error:  # noqa: BLE001 - another run begins it again
            await self._count(snapshot.id, error)
        finally:
            keeping.cancel()

    async def _commit(self, snapshot: Snapshot, cause: int | None) -> None:
        before, _ = await self._source(snapshot)
        await self._see_at_rest(before)
        artifact = artifact_of(snapshot)
        made = await self._driver.commit(ref_of(before), artifact)
        try:
            await self._see_at_rest(before)
            after, now = await self._source(snapshot)
            _see_same(before, after)
        except SourceMoved:
            await self._driver.drop_image(made.image_id)
            raise
        since = after.freeze_at
        frozen_ms = 0 if since is None else max(0, round((now - since).total_seconds() * 1000))
        meta = self._actors.meta(self._actors.worker, cause)
        committed = RecordCommitted(made.image_id, made.layer, frozen_ms)
        outcome = await self._service.snapshots.execute(snapshot.id, ANY_TENANT, committed, meta)
        if outcome.position is None:
            # It has failed meanwhile, or another worker was first. Only this image is of no use then.
            return await self._driver.drop_image(made.image_id)
        meta = self._actors.meta(self._actors.worker, outcome.position)
        await self._service.execute(after.id, ANY_TENANT, cmd.Thaw(snapshot.id, DONE), meta)
        return None

    async def _source(self, snapshot: Snapshot) -> tuple[Sandbox, datetime]:
        """The source, if the log says that it is at rest for this snapshot.

        Raises:
            SourceMoved: it is not.
        """
        loaded = await self._service.view.load(snapshot.sandbox_id, ANY_TENANT)
        if loaded is None:
            raise SourceMoved("the source is not known")
        source, freeze = loaded[0], loaded[0].frozen_by
        held = freeze is not None and freeze.snapshot_id == snapshot.id and freeze.thaw is None
        frozen = held and freeze is not None and freeze.run == source.run
        if not frozen and source.observed is not RuntimeState.EXITED:
            raise SourceMoved("the source does not stand still")
        return loaded

    async def _see_at_rest(self, source: Sandbox) -> None:
        """Compare what the engine shows with what the log says.

        Raises:
            SourceMoved: it runs, was started again, or is another object.
        """
        shown = await self._driver.observe(ref_of(source))
        known = None if source.runtime is None else source.runtime.main
        if shown is None or shown.main is None or known is None or shown.main.runtime_id != known.runtime_id:
            raise SourceMoved("the engine does not have the container of the source any more")
        started = None if source.runtime is None else source.runtime.started_at
        if shown.power not in (Power.PAUSED, Power.EXITED) or shown.started_at != started:
            raise SourceMoved(f"the container of the source is {shown.power}, or was started again")

    async def _keep_waiting(self, stream_id: UUID) -> None:
        while True:
            await asyncio.sleep(self._policy.progress_every)
            with suppress(StoreUnavailable):
                await self._rows.keep_waiting({stream_id: _PROGRESS}, self._policy.lease)

    async def _count(self, stream_id: UUID, error: Exception) -> None:
        trouble = describe(Observe(), error)
        _LOG.warning("the commit of snapshot %s failed: %s: %s", stream_id, trouble.reason, trouble.message)
        with suppress(StoreUnavailable):
            await self._rows.count_failure(
                stream_id,
                trouble.reason,
                trouble.message,
                base=self._policy.backoff_base,
                longest=self._policy.backoff_max,
            )

    async def _put_off(self, stream_id: UUID, reason: str, message: str, wait: float) -> None:
        with suppress(StoreUnavailable):
            await self._rows.put_off(stream_id, reason, message, wait)

    async def _wake(self, *ids: UUID) -> None:
        for stream_id in await self._rows.wake(ids):
            self._signal.poke(stream_id, work=True)


def _see_same(before: Sandbox, after: Sandbox) -> None:
    """One freeze lasted from the first look to the second.

    Raises:
        SourceMoved: it did not.
    """
    if (after.frozen_by, after.freeze_at, after.run) != (before.frozen_by, before.freeze_at, before.run):
        raise SourceMoved("the source went on before the commit had ended")


def artifact_of(snapshot: Snapshot) -> Artifact:
    """What a driver needs to know of it."""
    return Artifact(snapshot.id, snapshot.tenant, snapshot.since_position + 1, snapshot.created_at)
