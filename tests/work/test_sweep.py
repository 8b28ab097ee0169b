"""Sweeps: what differs is marked as due, orphans and leftovers, one sweep an engine, and the safety nets."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import msgspec
import pytest

from app.domain.engine import events as engine_events
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.observed import Observed, Part, Power
from app.domain.sandbox.state import Desired, Phase, RuntimeState
from app.errors import RuntimeUnavailable
from app.runtime.driver import Image, Leftover, Ref, Workload
from app.runtime.fake import FakeDriver, FakeEngine, name_of
from app.views.differences import Known
from app.work.station import Station
from app.work.sweep import Sweeper, Swept, contradicts
from tests.work.field import QUICK, WORKER, Field

NOW = datetime.now(UTC)


class Raiser:
    """A hook that raises at some calls while it is armed."""

    def __init__(self, *calls: str) -> None:
        self.calls = calls
        self.armed = True

    async def __call__(self, call: str) -> None:
        if self.armed and call in self.calls:
            raise RuntimeUnavailable("500")


async def queued(field: Field) -> dict[UUID, int]:
    rows = await field.sql("SELECT stream_id, priority FROM reconcile_queue")
    return {UUID(int=row["stream_id"].int): row["priority"] for row in rows}


def listings(field: Field) -> int:
    return field.engine.calls["list"]


async def contacted(field: Field, **changes) -> tuple[Station, Sweeper]:
    """A station that has been in contact, and its sweeper."""
    station = field.station(**changes)
    assert await station.contact()
    return station, field.sweeper(station, **changes)


async def test_nothing_differs_when_all_is_well(field: Field):
    _, sweeper = await contacted(field)
    for _ in range(3):
        await field.run()
    assert await sweeper.sweep() == Swept(objects=3, sandboxes=3)
    assert await queued(field) == {}


async def test_the_pages_hold_every_open_sandbox(field: Field):
    _, sweeper = await contacted(field, sweep_page=3)
    for _ in range(10):
        await field.run()
    assert await sweeper.sweep() == Swept(objects=10, sandboxes=10)


async def test_what_differs_is_queued_and_not_judged(field: Field):
    _, sweeper = await contacted(field)
    exited, frozen, gone, fine = [await field.run() for _ in range(4)]
    field.engine.exit(exited, 7)
    field.engine.set_power(name_of(frozen), Power.PAUSED)
    field.engine.destroy(name_of(gone))
    assert (await sweeper.sweep()).enqueued == 3
    assert await queued(field) == dict.fromkeys((exited, frozen, gone), 1)
    for sandbox_id in (exited, frozen, gone, fine):
        assert await field.phase(sandbox_id) is Phase.RUNNING


async def test_an_object_that_was_made_and_never_reported_is_found(field: Field):
    _, sweeper = await contacted(field)
    sandbox_id = await field.create()
    field.orphan(sandbox_id)
    await field.sql("DELETE FROM reconcile_queue")
    assert (await sweeper.sweep()).enqueued == 1
    assert list(await queued(field)) == [sandbox_id]


async def test_an_empty_listing_removes_and_judges_nothing(field: Field):
    _, sweeper = await contacted(field)
    sandboxes = [await field.run() for _ in range(3)]
    field.engine.empty_listing = True
    for _ in range(3):
        swept = await sweeper.sweep()
        assert (swept.objects, swept.enqueued, swept.removed) == (0, 3, ())
    for sandbox_id in sandboxes:
        assert await field.phase(sandbox_id) is Phase.RUNNING
    assert len(field.engine.containers) == 3


async def test_a_listing_that_fails_ends_the_sweep_and_leaves_it_due(field: Field, caplog: pytest.LogCaptureFixture):
    broken = Raiser("list")
    await field.station().contact()
    broken.armed = False
    station = field.station(field.driver(before=broken))
    await station.contact()
    sweeper = field.sweeper(station)
    before = listings(field)
    broken.armed = True
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            await sweeper.tick()
    assert listings(field) == before + 3
    assert (await field.standing()).swept_at is None, "given back"
    assert [record.levelname for record in caplog.records if "no sweep of fake yet" in record.message] == [
        "WARNING",
        "DEBUG",
        "DEBUG",
    ]
    broken.armed = False
    for _ in range(3):
        await sweeper.tick()
    assert listings(field) == before + 4, "and then not for some time"


# --- identity


async def test_another_engine_is_not_swept(field: Field):
    """Everything would be missing there, and what is there of another installation's making would be an orphan."""
    station, sweeper = await contacted(field)
    sandbox_id = await field.run()
    mark = field.engine.marks.pop(field.installation)
    field.engine.empty_listing = True
    with pytest.raises(RuntimeUnavailable, match="MARK_ABSENT"):
        await sweeper.sweep()
    assert await queued(field) == {}
    assert station.open
    before = listings(field)
    await sweeper.tick()
    assert listings(field) == before, "an engine that cannot be used is not swept"
    field.engine.marks[field.installation] = mark
    field.engine.empty_listing = False
    assert await station.contact()
    assert (await sweeper.sweep()).enqueued == 0
    assert await field.phase(sandbox_id) is Phase.RUNNING


async def test_an_engine_that_changes_before_the_removal_keeps_its_objects(field: Field):
    station = field.station()
    await station.contact()
    orphan = field.orphan()

    class Swapped(FakeDriver):
        async def inventory(self):
            async for found in super().inventory():
                yield found
            if self.engine.calls["list"] == 3:
                self.engine.marks.clear()

    station = field.station(Swapped(field.engine, field.installation))
    await station.contact()
    field.engine.calls["list"] = 1
    sweeper = field.sweeper(station)
    await sweeper.sweep()
    with pytest.raises(RuntimeUnavailable, match="MARK_ABSENT"):
        await sweeper.sweep()
    assert field.engine.of(orphan) is not None


async def test_an_object_from_beyond_the_logs_end_ends_the_sweep(field: Field):
    station, sweeper = await contacted(field)
    gone, old = await field.run(), field.orphan()
    field.engine.destroy(name_of(gone))
    await sweeper.sweep()
    await field.sql("DELETE FROM reconcile_queue")
    beyond = field.orphan(position=1_000_000)
    with pytest.raises(RuntimeUnavailable, match="LOG_WENT_BACK"):
        await sweeper.sweep()
    assert station.open
    assert await queued(field) == {}, "nothing is concluded"
    assert field.engine.of(old) is not None, "nor removed, though it was seen twice"
    assert field.engine.of(beyond) is not None
    assert (await field.engine_told())[-1] == "mismatch"


async def test_an_object_whose_sandbox_the_log_knows_is_no_sign(field: Field):
    _, sweeper = await contacted(field)
    sandbox_id = await field.create()
    field.orphan(sandbox_id, position=1_000_000)
    assert (await sweeper.sweep()).sandboxes == 1


# --- orphans and leftovers


async def test_an_orphan_goes_in_the_second_sweep_that_sees_it(field: Field, caplog: pytest.LogCaptureFixture):
    _, sweeper = await contacted(field)
    mine, orphan = await field.run(), field.orphan(position=1)
    first = await sweeper.sweep()
    assert (first.suspects, first.removed) == (1, ())
    second = await sweeper.sweep()
    assert (second.suspects, second.removed) == (0, (name_of(orphan),))
    assert field.engine.of(orphan) is None
    assert field.engine.of(mine) is not None
    assert f"object {orphan} belongs to no open sandbox" in caplog.text
    last = (await field.engines.history("fake"))[-1]
    assert last.event == engine_events.LeftoverRemoved("main", name_of(orphan), orphan, 1)
    assert last.meta == WORKER


async def test_a_leftover_part_goes_in_the_second_sweep(field: Field):
    _, sweeper = await contacted(field)
    part = Leftover("volume", "sandledger-x", "v1", uuid4(), NOW - timedelta(hours=1), 1)
    nameless = Leftover("run", "sandledger-y", "v2", None, None, None)
    for leftover in (part, nameless):
        field.engine.leave(field.installation, leftover)
    assert (await sweeper.sweep()).suspects == 2
    assert (await sweeper.sweep()).removed == (part.name, nameless.name)
    assert field.engine.leftovers == {}
    told = [one.event for one in (await field.engines.history("fake"))[-2:]]
    assert told == [
        engine_events.LeftoverRemoved("volume", part.name, part.object_id, 1),
        engine_events.LeftoverRemoved("run", nameless.name),
    ]


async def test_a_part_of_an_open_sandbox_is_no_leftover(field: Field):
    """A create makes the parts one after the other."""
    _, sweeper = await contacted(field)
    sandbox_id = await field.create()
    field.engine.leave(field.installation, Leftover("volume", "v", "v1", sandbox_id, NOW - timedelta(hours=1), 1))
    for _ in range(3):
        assert (await sweeper.sweep()).suspects == 0
    assert "v" in field.engine.leftovers


async def test_the_object_of_a_closed_sandbox_is_an_orphan(field: Field):
    _, sweeper = await contacted(field)
    sandbox_id = await field.run()
    await field.ask(sandbox_id, cmd.Terminate())
    await field.service.record(await field.sandbox(sandbox_id), cmd.RecordRemoved(), WORKER)
    born = NOW - timedelta(hours=1)
    found = field.engine.containers[name_of(sandbox_id)]
    field.engine.containers[found.name] = msgspec.structs.replace(found, created_at=born)
    await sweeper.sweep()
    assert (await sweeper.sweep()).removed == (name_of(sandbox_id),)


async def test_strangers_and_other_installations_are_not_touched(field: Field):
    _, sweeper = await contacted(field)
    field.engine.make("web")
    other_id = uuid4()
    field.engine.make(name_of(other_id), Workload(Ref(other_id), "default", Image("b"), ("x",), {}), uuid4())
    for _ in range(4):
        assert await sweeper.sweep() == Swept()
    assert len(field.engine.containers) == 2


async def test_a_young_orphan_waits(field: Field):
    _, sweeper = await contacted(field, orphan_grace=120)
    orphan = field.orphan(age_s=60)
    for _ in range(3):
        assert (await sweeper.sweep()).removed == ()
    found = field.engine.containers[name_of(orphan)]
    field.engine.containers[found.name] = msgspec.structs.replace(found, created_at=NOW - timedelta(hours=1))
    assert (await sweeper.sweep()).removed == (name_of(orphan),)


async def test_another_object_of_that_name_begins_anew(field: Field):
    _, sweeper = await contacted(field)
    orphan = field.orphan()
    await sweeper.sweep()
    field.engine.destroy(name_of(orphan))
    field.orphan(orphan)
    assert (await sweeper.sweep()).removed == ()
    assert (await sweeper.sweep()).removed == (name_of(orphan),)


async def test_a_dry_run_only_reports(field: Field, caplog: pytest.LogCaptureFixture):
    _, sweeper = await contacted(field, orphan_dry_run=True)
    orphan = field.orphan()
    for _ in range(3):
        assert (await sweeper.sweep()).removed == ()
    assert field.engine.of(orphan) is not None
    assert caplog.text.count("orphan kept, dry run") == 2


async def test_an_orphan_that_turns_out_to_have_a_sandbox_stays(field: Field):
    """The sandbox commits between the pages and the removal: the second question to the database saves it."""
    await field.station().contact()
    orphan, made = field.orphan(), False

    class Checked(FakeDriver):
        async def check(self):
            nonlocal made
            if self.engine.calls["list"] == 2 and not made:
                made = True
                await field.create(sandbox_id=orphan)
            return await super().check()

    station = field.station(Checked(field.engine, field.installation))
    field.engine.calls["list"] = -1
    await station.contact()
    sweeper = field.sweeper(station)
    await sweeper.sweep()
    field.engine.calls["list"] = 1
    assert (await sweeper.sweep()).removed == ()
    assert made
    assert field.engine.of(orphan) is not None


async def test_a_removal_that_fails_or_lasts_is_tried_by_the_next_sweep(field: Field):
    stuck = Raiser("remove")
    stuck.armed = False
    await field.station().contact()
    station = field.station(field.driver(before=stuck))
    await station.contact()
    sweeper = field.sweeper(station)
    orphan = field.orphan()
    await sweeper.sweep()
    stuck.armed = True
    assert (await sweeper.sweep()).removed == ()
    stuck.armed = False
    field.engine.slow_removals = True
    assert (await sweeper.sweep()).removed == ()
    assert (await field.engine_told())[-1] != "leftover_removed"
    field.engine.finish_removals()
    assert (await sweeper.sweep()).suspects == 0
    assert field.engine.of(orphan) is None


# --- one sweep an engine


async def test_one_worker_sweeps_an_engine(field: Field):
    """Per worker, four workers would compare everything four times."""
    pairs = [await contacted(field) for _ in range(4)]
    for _, sweeper in pairs:
        await sweeper.tick()
    before = listings(field)
    for _ in range(3):
        await asyncio.gather(*[sweeper.tick() for _, sweeper in pairs])
    assert listings(field) == before
    await field.sql("UPDATE engines SET swept_at = swept_at - interval '2 hours'")
    await asyncio.gather(*[sweeper.tick() for _, sweeper in pairs])
    assert listings(field) == before + 1


async def test_a_sweep_that_began_after_the_need_serves_it(field: Field):
    (_, one), (_, other) = await contacted(field), await contacted(field)
    before = listings(field)
    other._wanted_at = time.monotonic() - 60  # the need of `other` is older than the sweep of `one`
    await one.tick()
    await other.tick()
    assert listings(field) == before + 1
    other.mark_due()
    await other.tick()
    assert listings(field) == before + 2, "a new need is a new sweep"


async def test_two_at_once_do_not_both_sweep(field: Field):
    gate, reached = asyncio.Event(), asyncio.Event()

    async def before(call: str) -> None:
        if call == "list" and gate_armed:
            reached.set()
            await gate.wait()

    gate_armed = False
    await field.station().contact()
    station = field.station(field.driver(before=before))
    await station.contact()
    gate_armed = True
    busy, (_, other) = field.sweeper(station), await contacted(field)
    sweeping = asyncio.create_task(busy.tick())
    await reached.wait()
    count = listings(field)
    await other.tick()
    assert listings(field) == count
    gate.set()
    await sweeping


async def test_whoever_saw_an_orphan_compares_once_more_by_itself(field: Field):
    """Otherwise the second sweep of this worker may be a long way off: the next one may be another's."""
    _, sweeper = await contacted(field, sweep_confirm=0)
    orphan = field.orphan()
    await sweeper.tick()
    await sweeper.tick()
    assert field.engine.of(orphan) is None
    before = listings(field)
    await sweeper.tick()
    assert listings(field) == before, "nothing is suspected any more"


async def test_a_quiet_stream_makes_no_sweeps(field: Field, until):
    """Hints that come, and a stream that lives, are no reason to compare everything."""
    station, sweeper = await contacted(field)
    sandbox_id = await field.run()
    following = asyncio.create_task(sweeper.follow_hints())

    async def listening() -> bool:
        return field.engine.listeners > 0

    await until(listening)
    await sweeper.tick()
    before = listings(field)
    field.engine.set_power(name_of(sandbox_id), Power.PAUSED)

    async def hinted() -> bool:
        return sandbox_id in await queued(field)

    await until(hinted)
    for _ in range(5):
        await sweeper.tick()
    assert listings(field) == before
    assert (await queued(field))[sandbox_id] == 0, "a hint goes to the user lane"
    assert station.trusted
    field.engine.drop_streams()

    async def missed() -> bool:
        return not station.trusted

    await until(missed)
    await sweeper.tick()
    assert listings(field) == before + 1, "a broken one is"
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


# --- safety nets


async def test_a_sandbox_with_work_and_no_row_gets_one_and_a_complaint(field: Field, caplog: pytest.LogCaptureFixture):
    _, sweeper = await contacted(field, stranded_after=0)
    stopping, fine = await field.run(), await field.run()
    await field.ask(stopping, cmd.Terminate())
    pending = await field.create()
    await field.sql("DELETE FROM reconcile_queue")
    assert (await sweeper.sweep()).stranded == 2
    assert "which is a bug" in caplog.text
    assert set(await queued(field)) == {stopping, pending}
    assert fine not in await queued(field)
    await field.sql("DELETE FROM reconcile_queue")
    sweeper = field.sweeper(field.station(), stranded_after=30)
    assert (await sweeper.sweep()).stranded == 0, "a fresh one is given time"


async def test_a_sandbox_that_failed_before_it_was_placed_wants_no_work(field: Field):
    """Nothing of it is anywhere, so nothing will ever be removed: it must not be called a bug in each sweep."""
    failed = await field.create()  # no engine is registered yet
    assert (await field.sandbox(failed)).object_id is None
    await field.ask(failed, cmd.EndTransition(Limits(pending_s=0)))
    assert await field.phase(failed) is Phase.FAILED
    await field.sql("DELETE FROM reconcile_queue")
    _, sweeper = await contacted(field, stranded_after=0)
    assert (await sweeper.sweep()).stranded == 0
    assert await queued(field) == {}


async def test_deadlines_long_past_are_counted_and_complained_about(field: Field, caplog: pytest.LogCaptureFixture):
    _, sweeper = await contacted(field)
    await field.run(timeout_s=60)
    assert (await sweeper.sweep()).overdue == 0
    await field.sql("UPDATE deadlines SET fires_at = fires_at - interval '1 hour'")
    assert (await sweeper.sweep()).overdue == 1
    assert "deadlines should have fired" in caplog.text
    await field.sql("UPDATE deadlines SET fires_at = fires_at + interval '1 hour'")


async def test_sandboxes_of_an_engine_that_nobody_serves_are_reported(field: Field, caplog: pytest.LogCaptureFixture):
    """The engine was given another name in the settings."""
    # So long that the test itself does not take it.
    patient = msgspec.structs.replace(QUICK, dark_after=30)
    await field.station().contact()
    await field.run()
    station = Station(
        driver=FakeDriver(FakeEngine(), field.installation, name="renamed"),
        engines=field.engines,
        connections=field.database,
        policy=patient,
        meta=WORKER,
    )
    await station.contact()
    sweeper = field.sweeper(station, patient)
    assert (await sweeper.sweep()).unserved == 0
    await field.sql("UPDATE engines SET last_seen_at = last_seen_at - interval '1 minute' WHERE name = 'fake'")
    assert (await sweeper.sweep()).unserved == 1
    assert "1 open sandboxes are on engine fake, which no worker reaches" in caplog.text


# --- what is worth an observation


def known(observed: RuntimeState, *, desired: Desired = Desired.RUNNING, queued: bool = False) -> Known:
    return Known(UUID(int=1), UUID(int=1), desired, observed, "r1", queued)


@pytest.mark.parametrize("observed", RuntimeState)
@pytest.mark.parametrize("power", [None, *Power])
def test_what_is_worth_an_observation(observed: RuntimeState, power: Power | None):
    main = Part("main", "r1", "sandbox-1")
    seen = None if power is None else Observed(UUID(int=1), (main,), power)
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
        assert contradicts(known(observed), msgspec.structs.replace(seen, parts=(Part("main", "r2", "sandbox-1"),)))
        assert contradicts(known(observed), msgspec.structs.replace(seen, parts=()))
    if seen is not None and observed in (RuntimeState.NONE, RuntimeState.CREATED):
        assert not contradicts(known(observed, queued=True), seen), "somebody is at it"
