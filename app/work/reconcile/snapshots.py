"""One claim on a snapshot, from head to goal: plan -> act -> record -> plan again.

The protocol of claims is that of `app.work.reconcile.reconciler`. Three things differ. What is recorded is compared
with the state and not with a version: what the engine has of a snapshot does not depend on the log. The source is asked
through its own stream. And nothing of a snapshot is final before `ready` and `failed`, so a run that is cut leaves
nothing to clean up: its row is due again.

**How it fails.** A fault of the engine is no attempt; any other failure is counted in the queue row, and tried again
later. While the snapshot is Creating, the deadline `commit` ends that. A removal is never given up.
"""

from __future__ import annotations

import asyncio
import logging

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.plan import WAIT_INTERVAL, Observe
from app.domain.sandbox.state import Sandbox
from app.domain.snapshot import plan as steps
from app.domain.snapshot.decide import Command, RecordArtifact, RecordFailed, RecordReady, RecordRemoved
from app.domain.snapshot.plan import Found, plan
from app.domain.snapshot.state import MISSING, Snapshot, SnapshotState
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeRejected, RuntimeUnavailable, StoreUnavailable, UnknownEvent
from app.runtime.driver import SnapshotImage
from app.service.sandboxes import Service
from app.store.queue.reconcile import Failed
from app.views.snapshots import is_newer
from app.work.commits import Commits, artifact_of
from app.work.policy import WorkPolicy
from app.work.reconcile.actors import Actors
from app.work.reconcile.leases import Held, LeaseLost
from app.work.reconcile.outcomes import Outcomes
from app.work.reconcile.reconciler import GivenBack, NoProgress
from app.work.reconcile.troubles import UNAVAILABLE, backoff, describe
from app.work.station import Station

TURN = "WAITING_FOR_TURN"
"""Other snapshots are being made."""
_MAX_STEPS = 8
_LOG = logging.getLogger(__name__)


class SnapshotReconciler:
    """Brings single snapshots to their goals."""

    def __init__(
        self,
        *,
        service: Service,
        station: Station,
        commits: Commits,
        outcomes: Outcomes,
        policy: WorkPolicy,
        actors: Actors,
    ) -> None:
        self._service = service
        self._snapshots = service.snapshots
        self._station = station
        self._driver = station.driver
        self._commits = commits
        self._outcomes = outcomes
        self._policy = policy
        self._actors = actors

    async def run(self, held: Held) -> None:
        """Work on a claim to its end. Raises nothing but a cancellation."""
        try:
            await self._to_goal(held)
        except (GivenBack, LeaseLost):
            pass
        except asyncio.CancelledError:
            if not held.lost and not held.left:
                await self._outcomes.hand_back(held)
            raise
        except StoreUnavailable as error:
            _LOG.warning("snapshot %s is left to the end of its lease: %s", held.stream_id, error)
        except UnknownEvent as error:
            await self._outcomes.leave_alone(held, error)
        except Exception as error:  # noqa: BLE001 - one snapshot's error must not end the worker
            await self._outcomes.set_aside(held, error)

    async def _to_goal(self, held: Held) -> None:
        found: Found | None = None
        for number in range(_MAX_STEPS + 1):
            loaded = await self._snapshots.view.load(held.stream_id, ANY_TENANT)
            if loaded is None:
                return await self._outcomes.complete(held)
            snapshot = loaded[0]
            if is_newer(snapshot):
                raise UnknownEvent(f"snapshot {snapshot.id} was written by a newer version")
            source = await self._service.view.load(snapshot.sandbox_id, ANY_TENANT)
            sandbox = None if source is None else source[0]
            step = plan(snapshot, sandbox, found, held.claim.attempts)
            if isinstance(step, steps.Settled):
                return await self._outcomes.complete(held, closed=snapshot.state is SnapshotState.REMOVED)
            if number == _MAX_STEPS:
                return await self._judge(held, snapshot, step, NoProgress())
            try:
                found = await self._take(held, snapshot, sandbox, step)
            except (StoreUnavailable, LeaseLost, UnknownEvent, GivenBack):
                raise
            except Exception as error:  # noqa: BLE001 - every other failure is judged
                await self._judge(held, snapshot, step, error)
                return None
            self._station.succeeded(snapshot.id)
        return None

    async def _take(self, held: Held, snapshot: Snapshot, source: Sandbox | None, step: steps.Step) -> Found | None:
        """Act, and record. What the engine has of the snapshot from then on, if that is known.

        Raises:
            GivenBack: the claim has ended.
        """
        match step:
            case steps.Freeze():
                await self._take_turn(held, snapshot, stands_still=False)
                await self._freeze(held, snapshot)
            case steps.AwaitSource():
                if source is None or source.frozen_by is None or source.frozen_by.snapshot_id != snapshot.id:
                    self._commits.turns.leave(snapshot.id)
                await self._outcomes.give_back(held, WAIT_INTERVAL.total_seconds(), awaiting=True)
                raise GivenBack
            case steps.Commit():
                await self._take_turn(held, snapshot, stands_still=source is not None and source.frozen_by is not None)
                if await self._outcomes.give_back(held, self._policy.lease, awaiting=True):
                    self._commits.want(snapshot, held.cause)
                raise GivenBack
            case steps.Thaw(reason=reason):
                await self._ask_source(held, snapshot, cmd.Thaw(snapshot.id, reason))
            case steps.Clean():
                return await self._clean(held, snapshot, source)
            case steps.Look():
                return await self._look(held, snapshot)
            case steps.DropImages(raw_only=raw_only):
                return await self._drop(held, snapshot, raw_only=raw_only)
            case steps.Fail(reason=reason, message=message):
                self._commits.turns.leave(snapshot.id)
                await self._record(held, snapshot, RecordFailed(reason, message))
            case steps.Settled():  # no act
                pass
        return None

    async def _take_turn(self, held: Held, snapshot: Snapshot, *, stands_still: bool) -> None:
        wait = self._commits.turns.ask(snapshot.id, snapshot.tenant, stands_still=stands_still)
        if wait:
            await self._outcomes.put_off(held, wait, Failed(held.claim.attempts, TURN, ""))
            raise GivenBack

    async def _freeze(self, held: Held, snapshot: Snapshot) -> None:
        """Ask the source, which wakes this stream when it stands still. Each question counts."""
        await self._ask_source(held, snapshot, cmd.Freeze(snapshot.id))
        failed = Failed(held.claim.attempts + 1, steps.SOURCE_FREEZING, "")
        await self._outcomes.put_off(held, WAIT_INTERVAL.total_seconds(), failed)
        raise GivenBack

    async def _clean(self, held: Held, snapshot: Snapshot, source: Sandbox | None) -> Found:
        images = await self._driver.snapshot_images(snapshot.id)
        image = next((image for image in images if not image.raw), None)
        if image is None or any(each.image_id == snapshot.raw_id for each in images):
            image = await self._make_clean(snapshot, source)
        # Else an earlier run has made it, and was cut after it had removed the raw one.
        await self._drop_raw(snapshot)  # before it is ready: no secret of the source stays on the disk
        await self._record(held, snapshot, RecordReady(image.image_id, image.size_bytes or 0))
        return Found(image.image_id)

    async def _make_clean(self, snapshot: Snapshot, source: Sandbox | None) -> SnapshotImage:
        image_id = None if source is None or source.runtime is None else source.runtime.image_id
        if image_id is None or snapshot.raw_id is None:
            raise RuntimeRejected("SNAPSHOT_IMAGE_MISSING", "it is not known which image the source was made from")
        return await self._driver.clean(artifact_of(snapshot), snapshot.raw_id, image_id)

    async def _look(self, held: Held, snapshot: Snapshot) -> Found:
        images = await self._driver.snapshot_images(snapshot.id)
        raw = tuple(image.image_id for image in images if image.raw)
        ready = [image.image_id for image in images if not image.raw]
        present = snapshot.image_id in ready
        if snapshot.state is SnapshotState.READY:
            if not present:
                await self._confirm_engine(held)
            await self._record(held, snapshot, RecordArtifact(present))
        return Found(ready[0] if ready else None, raw)

    async def _drop(self, held: Held, snapshot: Snapshot, *, raw_only: bool) -> Found:
        await self._drop_raw(snapshot)
        if raw_only:
            return Found(snapshot.image_id)
        for image in await self._driver.snapshot_images(snapshot.id):
            await self._driver.drop_image(image.image_id)
        if snapshot.state is SnapshotState.DELETING:
            await self._confirm_engine(held)
            await self._record(held, snapshot, RecordRemoved())
        return Found()

    async def _drop_raw(self, snapshot: Snapshot) -> None:
        for image in await self._driver.snapshot_images(snapshot.id):
            if image.raw:
                await self._driver.drop_image(image.image_id)

    async def _confirm_engine(self, held: Held) -> None:
        """Before absence is recorded: is this the engine that the log knows?"""
        if not await self._station.confirm_identity():
            await self._outcomes.give_back(held, self._policy.missing_grace)
            raise GivenBack

    async def _ask_source(self, held: Held, snapshot: Snapshot, command: cmd.Command) -> None:
        meta = self._actors.meta(self._actors.worker, held.cause)
        await self._service.execute(snapshot.sandbox_id, ANY_TENANT, command, meta)

    async def _record(self, held: Held, snapshot: Snapshot, command: Command) -> None:
        meta = self._actors.meta(self._actors.worker, held.cause)
        outcome = await self._snapshots.execute(snapshot.id, ANY_TENANT, command, meta)
        if outcome.position is not None:
            held.cause = outcome.position
            held.start_over()

    async def _judge(self, held: Held, snapshot: Snapshot, step: steps.Step, error: Exception) -> None:
        if isinstance(error, RuntimeUnavailable):
            wait = await self._station.suspect(snapshot.id, error)
            return await self._outcomes.put_off(held, wait, Failed(held.claim.attempts, UNAVAILABLE, str(error)))
        self._station.succeeded(snapshot.id)
        if isinstance(error, RuntimeRejected) and snapshot.state is SnapshotState.CREATING:
            reason = MISSING if error.reason == "SNAPSHOT_IMAGE_MISSING" else "snapshot_runtime_failed"
            await self._confirm_engine(held)
            await self._record(held, snapshot, RecordFailed(reason, error.message))
            return await self._outcomes.pass_on(held)
        trouble = describe(Observe(), error)
        attempt = held.claim.attempts + 1
        wait = backoff(Observe(), attempt, self._policy)
        _LOG.warning(
            "step %s of snapshot %s failed (attempt %d), next in %.1f s: %s: %s",
            steps.STEP_NAMES.get(type(step), "check_source"),
            snapshot.id,
            attempt,
            wait,
            trouble.reason,
            trouble.message,
        )
        return await self._outcomes.put_off(held, wait, Failed(attempt, trouble.reason, trouble.message))
