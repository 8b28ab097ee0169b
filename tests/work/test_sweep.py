"""Sweeps: adopt, drift, orphans, and the safety nets."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Desired, Phase, RuntimeState
from app.errors import RuntimeUnavailable
from app.runtime.driver import Exit, Observed, Power, Workload
from app.runtime.fake import FakeDriver, name_of
from app.work.resync import Known, Swept, contradicts
from app.work.worker import Worker
from tests.work.stage import Gate, Raiser, Stage

NOW = datetime.now(UTC)


def leftover(stage: Stage, sandbox_id: UUID | None = None, *, age_s: float = 3600) -> UUID:
    """A container of ours that no sandbox knows."""
    sandbox_id = sandbox_id or uuid4()
    work = Workload(sandbox_id, "default", "busybox", ("sleep",), {})
    made = stage.engine.make(name_of(sandbox_id), work, stage.installation)
    born = datetime.now(UTC) - timedelta(seconds=age_s)
    stage.engine.containers[made.name] = msgspec.structs.replace(made, created_at=born)
    stage.engine.start(made.name)
    return sandbox_id


async def sweep(worker: Worker) -> Swept:
    swept = await worker.resync.sweep()
    assert not swept.skipped
    return swept


async def test_nothing_to_say_when_all_is_well(stage: Stage):
    worker = stage.worker()
    for _ in range(3):
        await stage.running(worker)
    paused = await stage.running(worker)
    await stage.ask(paused, cmd.Pause())
    await stage.settle(worker)
    ended = await stage.create(ends=Exit(0))
    await stage.settle(worker)
    assert await stage.phase(ended) is Phase.TERMINATED
    assert await sweep(worker) == Swept(objects=5, sandboxes=5)
    assert await stage.is_idle()()


async def test_the_pages_hold_every_open_sandbox(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.work.resync._PAGE", 3)
    worker = stage.worker()
    for _ in range(10):
        await stage.running(worker)
    assert await sweep(worker) == Swept(objects=10, sandboxes=10)


async def test_drift_is_queued_looked_at_and_recorded(stage: Stage):
    worker = stage.worker()
    exited, frozen, gone, fine = [await stage.running(worker) for _ in range(4)]
    stage.engine.exit(exited, 7)
    stage.engine.set_power(name_of(frozen), Power.PAUSED)
    stage.engine.destroy(name_of(gone))
    assert (await sweep(worker)).enqueued == 3
    assert (await stage.row(exited))["priority"] == 1
    assert await stage.row(fine) is None
    await stage.settle(worker)
    assert await stage.phase(exited) is Phase.FAILED
    assert await stage.phase(frozen) is Phase.RUNNING
    assert await stage.phase(gone) is Phase.RUNNING, "one listing and one look are no verdict"
    assert (await stage.row(gone))["missing_since"] is not None


async def test_what_was_made_and_never_reported_is_adopted(stage: Stage):
    """The row is gone, against all rules, and the sandbox fresh: the sweep finds the object and has it looked at."""
    sandbox_id = await stage.create()
    leftover(stage, sandbox_id)
    await stage.sql("DELETE FROM reconcile_queue")
    worker = stage.worker()
    assert (await sweep(worker)).enqueued == 1
    await stage.settle(worker)
    assert await stage.told(sandbox_id) == ["requested", "runtime_adopted", "started"]


async def test_an_empty_listing_fails_and_removes_nothing(stage: Stage):
    worker = stage.worker()
    sandboxes = [await stage.running(worker) for _ in range(3)]
    stage.engine.empty_listing = True
    for _ in range(3):
        swept = await sweep(worker)
        assert (swept.objects, swept.enqueued, swept.removed) == (0, 3, ())
        await stage.settle(worker)
    for sandbox_id in sandboxes:
        assert await stage.told(sandbox_id) == ["requested", "runtime_created", "started"]
    assert len(stage.engine.containers) == 3
    assert await stage.is_idle()()


async def test_a_listing_that_fails_ends_the_sweep(stage: Stage, caplog):
    broken = Raiser(lambda: RuntimeUnavailable("500"), "list")
    worker = stage.worker(stage.driver(before=broken))
    await stage.running(worker)
    with pytest.raises(RuntimeUnavailable):
        await worker.resync.sweep()
    assert await stage.is_idle()()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            await worker.resync.tick()
    assert broken.raised == 4, "a sweep that failed is owed"
    assert caplog.text.count("no sweep of fake yet") == 1
    broken.armed = False
    for _ in range(3):
        await worker.resync.tick()
    assert stage.engine.calls["list"] == 5, "and then not for some time"


async def test_an_engine_that_is_down_fails_nothing_in_a_whole_worker(stage: Stage, until):
    worker = stage.worker(resync_every=0.05)
    sandboxes = [await stage.running(worker) for _ in range(3)]
    stage.engine.down = True
    async with stage.working(worker):
        asked = stage.engine.calls["version"]

        async def tried() -> bool:
            return stage.engine.calls["version"] > asked + 5

        await until(tried)
        stage.engine.down, stage.engine.empty_listing = False, True
        listed = stage.engine.calls["list"]

        async def listed_more() -> bool:
            return stage.engine.calls["list"] > listed + 5

        await until(listed_more)
    for sandbox_id in sandboxes:
        assert await stage.told(sandbox_id) == ["requested", "runtime_created", "started"]
        assert stage.container(sandbox_id) is not None


async def test_what_happened_while_the_engine_was_away_is_found_when_it_is_back(stage: Stage, until):
    """An engine that restarts has forgotten its events, and its containers have ended."""
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    async with stage.working(worker):
        stage.engine.down = True
        await stage.create()

        async def noticed() -> bool:
            return worker.breaker.open

        await until(noticed)
        ended = stage.engine.containers[name_of(sandbox_id)]
        stage.engine.containers[ended.name] = msgspec.structs.replace(ended, power=Power.EXITED, exit=Exit(143))
        stage.engine.down = False
        await until(stage.is_phase(Phase.FAILED, sandbox_id))


async def test_an_orphan_goes_in_the_second_sweep_that_sees_it(stage: Stage, caplog):
    worker = stage.worker()
    mine = await stage.running(worker)
    orphan = leftover(stage)
    first = await sweep(worker)
    assert (first.suspects, first.removed) == (1, ())
    with caplog.at_level(logging.WARNING):
        second = await sweep(worker)
    assert (second.suspects, second.removed) == (0, (orphan,))
    assert stage.container(orphan) is None
    assert stage.container(mine) is not None
    assert f"sandbox {orphan} is not open" in caplog.text


async def test_the_leftover_of_a_closed_sandbox_is_an_orphan(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    leftover(stage, sandbox_id)
    await sweep(worker)
    assert (await sweep(worker)).removed == (sandbox_id,)


async def test_strangers_and_other_installations_are_not_touched(stage: Stage):
    worker = stage.worker()
    stage.engine.make("web")
    other_id = uuid4()
    work = Workload(other_id, "default", "busybox", ("sleep",), {})
    stage.engine.make(name_of(other_id), work, uuid4())
    for _ in range(4):
        assert await sweep(worker) == Swept()
    assert len(stage.engine.containers) == 2


async def test_a_young_orphan_waits(stage: Stage):
    worker = stage.worker(orphan_grace=120)
    orphan = leftover(stage, age_s=60)
    for _ in range(3):
        assert (await sweep(worker)).removed == ()
    found = stage.engine.containers[name_of(orphan)]
    stage.engine.containers[found.name] = msgspec.structs.replace(found, created_at=NOW - timedelta(seconds=3600))
    assert (await sweep(worker)).removed == (orphan,)


async def test_another_object_of_that_name_begins_anew(stage: Stage):
    worker = stage.worker()
    orphan = leftover(stage)
    await sweep(worker)
    stage.engine.destroy(name_of(orphan))
    leftover(stage, orphan)
    assert (await sweep(worker)).removed == ()
    assert (await sweep(worker)).removed == (orphan,)


async def test_a_dry_run_only_tells(stage: Stage, caplog):
    worker = stage.worker(orphan_dry_run=True)
    orphan = leftover(stage)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (await sweep(worker)).removed == ()
    assert stage.container(orphan) is not None
    assert caplog.text.count("orphan kept, dry run") == 2


async def test_an_orphan_that_turns_out_to_have_a_sandbox_stays(stage: Stage):
    """The sandbox commits between the pages and the removal: the second look at the database saves it."""
    orphan = leftover(stage)
    made = False

    class Checked(FakeDriver):
        async def check(self):
            nonlocal made
            if stage.engine.calls["list"] == 2 and not made:
                made = True
                await stage.create(sandbox_id=orphan)
            return await super().check()

    worker = stage.worker(Checked(stage.engine, stage.installation))
    await sweep(worker)
    assert (await sweep(worker)).removed == ()
    assert made
    assert stage.container(orphan) is not None
    await stage.settle(worker)
    assert await stage.told(orphan) == ["requested", "runtime_adopted", "started"]


async def test_a_removal_that_fails_is_tried_by_the_next_sweep(stage: Stage):
    stuck = Raiser(lambda: RuntimeUnavailable("500"), "remove")
    worker = stage.worker(stage.driver(before=stuck))
    orphan = leftover(stage)
    await sweep(worker)
    assert (await sweep(worker)).removed == ()
    stuck.armed = False
    assert (await sweep(worker)).removed == (orphan,)


async def test_one_sweep_at_a_time_and_none_is_held_off_for_ever(stage: Stage):
    gate = Gate("list")
    busy, other = stage.worker(stage.driver(before=gate)), stage.worker()
    sweeping = asyncio.create_task(busy.resync.sweep())
    await gate.reached.wait()
    assert (await other.resync.sweep()).skipped
    assert (await other.resync.sweep()).skipped
    assert not (await other.resync.sweep()).skipped
    assert (await other.resync.sweep()).skipped
    gate.open.set()
    assert not (await sweeping).skipped
    assert not (await other.resync.sweep()).skipped
    assert not await stage.sql("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND classid = 21324")


async def test_a_sandbox_with_work_and_no_row_gets_one_and_a_complaint(stage: Stage, caplog):
    worker = stage.worker(stranded_after=0)
    stopping, fine = await stage.running(worker), await stage.running(worker)
    await stage.ask(stopping, cmd.Terminate())
    pending = await stage.create()
    await stage.sql("DELETE FROM reconcile_queue")
    with caplog.at_level(logging.WARNING):
        assert (await sweep(worker)).stranded == 2
    assert "which is a bug" in caplog.text
    await stage.settle(worker)
    assert await stage.phase(pending) is Phase.RUNNING
    assert await stage.phase(stopping) is Phase.TERMINATED
    assert await stage.phase(fine) is Phase.RUNNING
    assert (await sweep(worker)).stranded == 0


async def test_a_fresh_sandbox_without_a_row_is_given_time(stage: Stage):
    await stage.create()
    await stage.sql("DELETE FROM reconcile_queue")
    assert (await sweep(stage.worker(stranded_after=30))).stranded == 0


async def test_deadlines_long_past_are_counted_and_complained_about(stage: Stage, caplog):
    worker = stage.worker()
    sandbox_id = await stage.running(worker, timeout_s=60)
    assert (await sweep(worker)).overdue == 0
    with caplog.at_level(logging.ERROR):
        await overdue_for_a_moment(stage, worker, sandbox_id)
    assert "past their expiry" in caplog.text


async def overdue_for_a_moment(stage: Stage, worker: Worker, sandbox_id: UUID) -> None:
    """The head row is bent, and straightened again: the suite compares it with its events at the end."""
    bend = "UPDATE sandboxes SET expires_at = expires_at {} interval '1 hour', version = version {} 1 WHERE id = $1"
    await stage.sql("ALTER TABLE sandboxes DISABLE TRIGGER check_phase")
    await stage.sql(bend.format("-", "+"), sandbox_id)
    assert (await sweep(worker)).overdue == 1
    await stage.sql(bend.format("+", "-"), sandbox_id)


def known(observed: RuntimeState, *, desired: Desired = Desired.RUNNING, queued: bool = False) -> Known:
    return Known(UUID(int=1), desired, observed, "r1", queued)


@pytest.mark.parametrize("observed", RuntimeState)
@pytest.mark.parametrize("power", [None, *Power])
def test_what_is_worth_a_look(observed: RuntimeState, power: Power | None):
    seen = None if power is None else Observed(UUID(int=1), "r1", "sandbox-1", power)
    expected = {
        RuntimeState.NONE: power is not None,
        RuntimeState.CREATED: True,
        RuntimeState.RUNNING: power is not Power.RUNNING,
        RuntimeState.PAUSED: power is not Power.PAUSED,
        RuntimeState.EXITED: power in (Power.RUNNING, Power.PAUSED),
        RuntimeState.LOST: power is not None,
        RuntimeState.REMOVED: power is not None,
    }[observed]
    assert contradicts(known(observed), seen) is expected
    assert not contradicts(known(observed, desired=Desired.TERMINATED), seen)
    if seen is not None and observed in (RuntimeState.RUNNING, RuntimeState.PAUSED):
        assert contradicts(known(observed), msgspec.structs.replace(seen, runtime_id="r2"))
    if seen is not None and observed in (RuntimeState.NONE, RuntimeState.CREATED):
        assert not contradicts(known(observed, queued=True), seen), "somebody is at it"
