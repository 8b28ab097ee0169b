"""Snapshots on the fake: freezes that are broken, late, refused or crossed by what the source's owner does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import pytest
from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Phase
from app.domain.sandbox.status import status_of
from app.domain.snapshot.state import MISSING, SnapshotState
from app.errors import Conflict, RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import Artifact
from app.runtime.fake import FakeImage, name_of
from app.runtime.faults import AttemptFailed
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Secrets
from app.views.differences import stranded
from app.work.worker import Worker
from tests.work.stage import CLIENT, Raiser, Stage

CREATING, READY, FAILED = SnapshotState.CREATING, SnapshotState.READY, SnapshotState.FAILED
WHOLE = ["freeze_requested", "frozen", "thaw_requested", "thawed"]


@pytest.fixture
def short(stage: Stage, database: Database, signal: Signal) -> Stage:
    """Freezes last a moment."""
    stage.limits = Limits(freeze_s=0.3)
    stage.service = Service(database, signal, stage.limits)
    return stage


async def source_of(stage: Stage, until: Any, **details: Any) -> UUID:
    source = await stage.create(**details)
    await until(stage.is_phase(Phase.RUNNING, source))
    return source


async def after_ready(stage: Stage, source: UUID) -> list[str]:
    told = await stage.told(source)
    return told[told.index("ready") + 1 :]


async def reasons(stage: Stage, source: UUID) -> list[str]:
    return [one.event.reason for one in await stage.history(source) if isinstance(one.event, ev.ThawRequested)]


def images(stage: Stage) -> list[FakeImage]:
    return list(stage.engine.snapshots.values())


def power(stage: Stage, source: UUID) -> Power:
    return stage.engine.containers[name_of(source)].power


def copies(stage: Stage) -> Callable[[], Awaitable[bool]]:
    """The engine is in the middle of a commit."""

    async def reached() -> bool:
        return bool(stage.engine.commits)

    return reached


def busy(*workers: Worker) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return any(worker.commits.busy for worker in workers)

    return reached


async def test_the_source_stands_still_for_the_copy_only(stage: Stage, until: Any):
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker()):
        source = await source_of(stage, until, secrets=Secrets({"TOKEN": "canary"}))
        snapshot_id = await stage.take(source, "one")
        await until(copies(stage))
        sandbox = await stage.sandbox(source)
        assert power(stage, source) is Power.PAUSED
        assert (sandbox.phase, status_of(sandbox).reason) == (Phase.RUNNING, "SNAPSHOT_IN_PROGRESS")
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
        assert power(stage, source) is Power.RUNNING
    assert await after_ready(stage, source) == WHOLE
    (image,) = images(stage)
    assert (image.raw, image.env) == (False, {})
    snapshot = await stage.snapshot(snapshot_id)
    last = (await stage.history(source))[-1].event
    assert isinstance(last, ev.Thawed)
    assert snapshot.frozen_ms is not None
    assert last.frozen_ms >= snapshot.frozen_ms > 0


async def test_a_pause_of_ours_is_no_pause_from_outside(stage: Stage, until: Any):
    """A look would else record it, and the reconciler would let the source run in the middle of the copy."""
    stage.engine.commit_gate = asyncio.Event()
    worker = stage.worker()
    async with stage.working(worker):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(copies(stage))
        assert (await worker.sweeper.sweep()).enqueued == 0, "the source does not differ"
        looks = stage.engine.calls["inspect"]
        await worker.queue.enqueue([source], 0)

        async def looked() -> bool:
            return stage.engine.calls["inspect"] > looks

        await until(looked)
        await until(stage.is_snapshot(CREATING, snapshot_id))
        assert power(stage, source) is Power.PAUSED
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
    assert await after_ready(stage, source) == WHOLE


async def test_a_copy_that_was_disturbed_is_not_used(stage: Stage, until: Any):
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(copies(stage))
        stage.engine.set_power(name_of(source), Power.RUNNING)  # as `docker unpause`
        await until(stage.is_told(source, "thaw_requested"))
        torn = asyncio.gather(*stage.engine.commits)
        stage.engine.commit_gate.set()
        (first,) = await torn
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
    assert await reasons(stage, source) == ["BROKEN", "DONE"]
    assert (await stage.snapshot(snapshot_id)).raw_id != first.image_id
    assert [image.raw for image in images(stage)] == [False]


async def test_a_freeze_ends_at_its_deadline_and_a_late_image_is_removed(short: Stage, until: Any):
    short.engine.commit_gate = asyncio.Event()
    worker = short.worker()
    async with short.working(worker):
        source = await source_of(short, until)
        snapshot_id = await short.take(source)
        await until(copies(short))
        late = list(short.engine.commits)
        await until(short.is_snapshot(FAILED, snapshot_id))
        await until(short.is_told(source, "thawed"))
        assert power(short, source) is Power.RUNNING
        short.engine.commit_gate.set()
        await asyncio.gather(*late)

        async def swept() -> bool:
            await worker.sweeper.sweep()
            return images(short) == []

        await until(swept)
        await until(short.is_idle())
    assert (await short.snapshot(snapshot_id)).reason == "snapshot_runtime_timeout"
    assert await reasons(short, source) == ["DEADLINE"]


async def test_an_image_that_appears_when_all_have_given_up_is_swept(stage: Stage, until: Any):
    worker = stage.worker()
    async with stage.working(worker):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
        kept = (await stage.snapshot(snapshot_id)).image_id
        container = stage.engine.containers[name_of(source)]
        artifact = images(stage)[0].artifact
        await stage.engine.begin_commit(container, artifact, stage.installation)  # of a worker that was killed
        assert len(images(stage)) == 2
        await worker.sweeper.sweep()
        await until(stage.is_idle())
        assert [image.image_id for image in images(stage)] == [kept]


async def test_a_delete_in_the_middle_waits_for_the_copy(stage: Stage, until: Any):
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(copies(stage))
        await stage.ask(source, cmd.Terminate())
        assert (await stage.sandbox(source)).phase is Phase.STOPPING
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_phase(Phase.TERMINATED, source))


async def test_a_source_that_is_removed_in_the_middle_fails_it(stage: Stage, until: Any):
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(copies(stage))
        stage.engine.destroy(name_of(source))
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(FAILED, snapshot_id))
        await until(stage.is_idle())
        assert images(stage) == []
    assert (await stage.snapshot(snapshot_id)).reason == "snapshot_source_removed"


async def test_a_source_that_ends_by_itself_is_copied_all_the_same(stage: Stage, until: Any):
    """Nothing writes to its files any more."""
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        stage.engine.refusals["pause"] = AttemptFailed("PAUSE_REFUSED", "not now")
        snapshot_id = await stage.take(source)
        await until(stage.is_told(source, "freeze_requested"))
        stage.engine.exit(source, 3)
        await until(stage.is_snapshot(READY, snapshot_id))


async def test_its_owner_may_pause_and_resume_it_meanwhile(stage: Stage, until: Any):
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        first = await stage.take(source)
        await until(copies(stage))
        await stage.ask(source, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, source))
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, first))
        await until(stage.is_told(source, "thawed"))
        assert power(stage, source) is Power.PAUSED
        await stage.ask(source, cmd.Resume())
        await until(stage.is_phase(Phase.RUNNING, source))

        stage.engine.commit_gate = asyncio.Event()
        second = await stage.take(source)
        await until(copies(stage))
        await stage.ask(source, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, source))
        await stage.ask(source, cmd.Resume())
        assert (await stage.sandbox(source)).phase is Phase.RESUMING
        assert power(stage, source) is Power.PAUSED, "not before the copy is made"
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, second))
        await until(stage.is_phase(Phase.RUNNING, source))
        await until(stage.is_idle())
        assert power(stage, source) is Power.RUNNING


async def test_two_workers_make_one_copy_and_one_goes_on_for_the_other(stage: Stage, until: Any):
    stage.engine.commit_gate = asyncio.Event()
    one, two = stage.worker(worker_id="w1"), stage.worker(worker_id="w2")
    async with stage.working(two):
        async with stage.working(one):
            source = await source_of(stage, until)
            snapshot_id = await stage.take(source)
            await until(copies(stage))
            assert stage.engine.calls["commit"] == 1
            both = set(stage.engine.commits)
        # The first is stopped, perhaps in the middle; the engine goes on with what it began.
        await until(busy(two))
        await until(copies(stage))
        both |= stage.engine.commits
        stage.engine.commit_gate.set()
        await asyncio.gather(*both)
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
        await two.sweeper.sweep()
        await until(stage.is_idle())
    assert [image.raw for image in images(stage)] == [False]
    assert await after_ready(stage, source) == WHOLE


async def test_of_two_copies_of_one_freeze_the_first_that_is_recorded_stays(stage: Stage, until: Any):
    """Each would else remove what the other has recorded, and the snapshot would have no image."""
    stage.engine.commit_gate = asyncio.Event()
    one, two = stage.worker(worker_id="w1"), stage.worker(worker_id="w2")
    async with stage.working(one):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(busy(one))
        two.commits.want(await stage.snapshot(snapshot_id), None)  # as when its row fell due meanwhile

        async def both() -> bool:
            return len(stage.engine.commits) == 2

        await until(both)
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())

        async def done() -> bool:
            return not one.commits.busy and not two.commits.busy

        await until(done)
        await one.sweeper.sweep()
        await until(stage.is_idle())
    assert [image.raw for image in images(stage)] == [False]
    assert await after_ready(stage, source) == WHOLE


async def test_snapshots_of_one_sandbox_take_turns(stage: Stage, until: Any):
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        ids = [await stage.take(source) for _ in range(3)]
        await until(stage.is_snapshot(READY, *ids), 60)
        await until(stage.is_idle())
    frozen = [one.event.snapshot_id for one in await stage.history(source) if isinstance(one.event, ev.Frozen)]
    assert sorted(frozen) == sorted(ids)
    assert len(images(stage)) == 3


@pytest.mark.parametrize(
    ("call", "refusal", "reason"),
    [
        ("commit", AttemptFailed("COMMIT_FAILED", "no space left on device"), "snapshot_runtime_failed"),
        ("pause", RuntimeRejected("PAUSE_NOT_SUPPORTED", "cgroup is not available"), "snapshot_runtime_failed"),
        ("load", RuntimeRejected("SNAPSHOT_IMAGE_MISSING", "the layers are gone"), MISSING),
    ],
)
async def test_an_engine_that_cannot_fails_the_snapshot_and_not_its_source(
    stage: Stage, until: Any, call: str, refusal: Any, reason: str
):
    stage.engine.refusals[call] = refusal
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(FAILED, snapshot_id), 60)
        await until(stage.is_idle())
        assert (await stage.sandbox(source)).phase is Phase.RUNNING
        assert power(stage, source) is Power.RUNNING
        assert images(stage) == []
    assert (await stage.snapshot(snapshot_id)).reason == reason
    assert (await stage.sandbox(source)).frozen_by is None


async def test_an_image_that_vanished_is_told_and_one_that_comes_back_too(stage: Stage, until: Any):
    worker = stage.worker()
    async with stage.working(worker):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
        gone = dict(stage.engine.snapshots)
        stage.engine.snapshots.clear()
        late = await stage.create(image="", snapshot_id=snapshot_id)  # before it was noticed
        await until(stage.is_phase(Phase.FAILED, late))
        await until(stage.is_idle())
        snapshot = await stage.snapshot(snapshot_id)
        assert (snapshot.state, snapshot.is_missing) == (READY, True)
        with pytest.raises(Conflict, match="does not have its image"):
            await stage.create(image="", snapshot_id=snapshot_id)
        stage.engine.snapshots.update(gone)
        await worker.sweeper.sweep()
        await until(stage.is_idle())
        assert not (await stage.snapshot(snapshot_id)).is_missing
        copy = await stage.create(image="", snapshot_id=snapshot_id)
        await until(stage.is_phase(Phase.RUNNING, copy))
    failure = (await stage.sandbox(late)).failure
    assert failure is not None
    assert failure.reason == "IMAGE_NOT_FOUND"


async def test_another_engine_at_its_address_is_no_proof_that_an_image_is_gone(stage: Stage, until: Any):
    worker = stage.worker()
    source = await stage.create()
    await stage.settle(worker)
    snapshot_id = await stage.take(source)
    async with stage.working(worker):
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
    other = stage.worker(worker_id="w2")
    await stage.turn(other)
    mark = stage.engine.marks.pop(stage.installation)  # from now on another engine answers
    gone = dict(stage.engine.snapshots)
    stage.engine.snapshots.clear()
    copy = await stage.create(image="", snapshot_id=snapshot_id)
    await other.queue.enqueue_snapshots([snapshot_id])
    await stage.turn(other)
    assert (await stage.sandbox(copy)).phase is Phase.PENDING
    assert not (await stage.snapshot(snapshot_id)).is_missing
    stage.engine.marks[stage.installation] = mark
    stage.engine.snapshots.update(gone)
    async with stage.working(stage.worker(worker_id="w3")):
        await until(stage.is_phase(Phase.RUNNING, copy))


async def test_a_delete_waits_for_an_engine_that_is_away(stage: Stage, until: Any):
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(READY, snapshot_id))
        stage.engine.down = True
        await stage.service.snapshots.delete(snapshot_id, "default", CLIENT)
        assert (await stage.snapshot(snapshot_id)).state is SnapshotState.DELETING
        stage.engine.down = False
        await until(stage.is_snapshot(SnapshotState.REMOVED, snapshot_id))
    assert images(stage) == []


async def test_an_image_of_an_unknown_snapshot_is_a_leftover(stage: Stage, until: Any):
    worker = stage.worker(orphan_grace=0)
    async with stage.working(worker):
        source = await source_of(stage, until)
        await until(stage.is_idle())
    # Its own sweep, after the start, may come at any time; from here on there is none but ours.
    sandbox = await stage.sandbox(source)
    artifact = Artifact(uuid4(), "default", sandbox.position, sandbox.created_at)
    container = stage.engine.containers[name_of(source)]
    await stage.engine.begin_commit(container, artifact, stage.installation)
    await stage.engine.begin_commit(container, replace(artifact, snapshot_id=uuid4()), uuid4())  # a stranger's
    await worker.sweeper.sweep()
    assert len(images(stage)) == 2, "seen once"
    await worker.sweeper.sweep()
    (left,) = images(stage)
    assert left.installation != stage.installation


async def test_a_snapshot_that_takes_too_long_has_failed(stage: Stage, database: Database, signal: Signal, until: Any):
    """Its deadline fires although its source stands still within its own."""
    stage.limits = Limits(commit_s=0.3)
    stage.service = Service(database, signal, stage.limits)
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(stage.is_snapshot(FAILED, snapshot_id))
        await until(stage.is_told(source, "thawed"))
        assert power(stage, source) is Power.RUNNING
        late = list(stage.engine.commits)
        stage.engine.commit_gate.set()
        await asyncio.gather(*late)
        await until(stage.is_idle())

        async def gone() -> bool:
            return images(stage) == []

        await until(gone)
    assert (await stage.snapshot(snapshot_id)).reason == "snapshot_runtime_timeout"
    assert await reasons(stage, source) == ["FAILED"]


async def test_a_run_that_was_cut_after_it_had_cleaned_goes_on(stage: Stage, until: Any):
    """The raw image is gone by then, so it must not be cleaned again."""
    worker = stage.worker(stage.driver(after=(cut := Raiser(Killed, "drop_image"))))
    source = await stage.create()
    await stage.settle(worker)
    snapshot_id = await stage.take(source)

    async def turned() -> bool:
        await stage.turn(worker)
        return cut.raised > 0

    await until(turned)
    assert [image.raw for image in images(stage)] == [False]
    assert (await stage.snapshot(snapshot_id)).state is CREATING
    cut.armed = False

    async def made() -> bool:
        await stage.turn(worker)
        return (await stage.snapshot(snapshot_id)).state is READY

    await until(made)


async def test_an_image_from_beyond_the_end_of_the_log_is_not_removed(stage: Stage):
    """The database is an older copy: its snapshot was made after it."""
    worker = stage.worker(orphan_grace=0)
    source = await stage.create()
    await stage.settle(worker)
    artifact = Artifact(uuid4(), "default", 10**9, (await stage.sandbox(source)).created_at)
    await stage.engine.begin_commit(stage.engine.containers[name_of(source)], artifact, stage.installation)
    for _ in range(2):
        with pytest.raises(RuntimeUnavailable, match=r"went back|not confirmed"):
            await worker.sweeper.sweep()
    assert len(images(stage)) == 1
    assert "position 1000000000" in worker.station.trouble


async def test_a_thaw_whose_queue_row_was_lost_is_found_by_a_sweep(stage: Stage, until: Any):
    """That would be a bug; the source must not stand still for it."""
    worker = stage.worker(stranded_after=0)
    source = await stage.create()
    await stage.settle(worker)
    await stage.ask(source, cmd.Freeze(uuid4()))
    await stage.settle(worker)
    assert power(stage, source) is Power.PAUSED
    assert (await worker.sweeper.sweep()).stranded == 0, "it stands still as it should"
    freeze = (await stage.sandbox(source)).frozen_by
    assert freeze is not None
    await stage.ask(source, cmd.Thaw(freeze.snapshot_id, "DONE"))
    await stage.sql("DELETE FROM reconcile_queue")
    await stage.settle(worker)
    assert power(stage, source) is Power.PAUSED
    assert (await worker.sweeper.sweep()).stranded == 1
    await stage.settle(worker)
    assert power(stage, source) is Power.RUNNING
    assert (await stage.sandbox(source)).frozen_by is None


class Killed(Exception):
    """Stands for the death of the process."""


async def test_a_resume_waits_for_the_copy_however_long_it_takes(
    stage: Stage, database: Database, signal: Signal, until: Any
):
    """Its deadline would else end it while nothing could be done, and a sweep would find it forgotten."""
    stage.limits = Limits(resuming_s=0.1)
    stage.service = Service(database, signal, stage.limits)
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker()):
        source = await source_of(stage, until)
        snapshot_id = await stage.take(source)
        await until(copies(stage))
        await stage.ask(source, cmd.Pause())
        await until(stage.is_phase(Phase.PAUSED, source))
        await stage.ask(source, cmd.Resume())
        looks = stage.engine.calls["inspect"]

        async def rests() -> bool:
            row = await stage.row(source)
            return row is None or (row["lease_owner"] is None and stage.engine.calls["inspect"] > looks)

        await until(rests)
        (row,) = await stage.sql(
            "SELECT fires_at - clock_timestamp() AS left FROM deadlines WHERE stream_id = $1 AND name = 'transition'",
            source,
        )
        assert row["left"].total_seconds() > 10, "not before the deadline of the freeze"
        assert await stranded(database, stage.engine_name, 0) == []
        assert (await stage.sandbox(source)).phase is Phase.RESUMING
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_phase(Phase.RUNNING, source))
        await until(stage.is_idle())
    assert "resume_failed" not in await stage.told(source)


async def test_a_snapshot_whose_queue_row_was_lost_is_found_by_a_sweep(
    stage: Stage, until: Any, caplog: pytest.LogCaptureFixture
):
    """That would be a bug; it must not be Creating until its deadline."""
    worker = stage.worker(stranded_after=0)
    source = await stage.create()
    await stage.settle(worker)
    snapshot_id = await stage.take(source)
    await stage.sql("DELETE FROM reconcile_queue")
    async with stage.working(worker):
        await worker.sweeper.sweep()
        await until(stage.is_snapshot(READY, snapshot_id))
        await until(stage.is_idle())
    assert str(snapshot_id) in caplog.text
