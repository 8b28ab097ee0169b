"""Stations: identity, outages, the breaker, and what the log is told of an engine."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import msgspec
import pytest

from app.domain.engine import events as ev
from app.domain.engine.state import EngineState
from app.domain.sandbox.observed import Exit, Observed, Power
from app.domain.sandbox.state import Phase
from app.errors import RuntimeUnavailable, SettingsError
from app.runtime.fake import FakeDriver, FakeEngine
from app.work.outages import ENGINE_STOPPED, Outages
from app.work.station import State, Station
from tests.work.field import SEARCH_PATH, WORKER, Field

NOW = datetime.now(UTC)


def reached(station: Station, state: State):
    async def check() -> bool:
        return station.state is state

    return check


def told(field: Field, *names: str):
    async def check() -> bool:
        return await field.engine_told() == list(names)

    return check


# --- identity


async def test_the_first_contact_leaves_a_mark_and_registers(field: Field):
    station = field.station()
    assert station.open
    assert not station.trusted
    assert await station.confirm_identity()
    assert (station.open, station.trusted) == (False, True)
    engine = await field.known_engine()
    assert engine.mark == field.engine.marks[field.installation]
    assert await field.engine_told() == ["registered", "seen"]
    assert (await field.standing()).last_seen_at is not None
    assert await field.station().confirm_identity(), "another worker finds the same"
    assert await field.engine_told() == ["registered", "seen"]
    assert field.engine.calls["make_volume"] == 1


async def test_two_servers_at_first_contact_register_one_engine(field: Field):
    assert all(await asyncio.gather(*[field.station().contact() for _ in range(5)]))
    assert await field.engine_told() == ["registered", "seen"]


async def test_another_engine_is_not_believed_and_not_marked(field: Field, caplog: pytest.LogCaptureFixture, until):
    """A stale DOCKER_HOST: an empty engine answers. Nothing is lost, nothing is made there."""
    right = field.station()
    await right.contact()
    sandbox_id = await field.run()
    other = FakeEngine()
    station = field.station(field.driver(other))
    async with field.running(station):
        await until(told(field, "registered", "seen", "mismatch"))
        assert station.open
        assert not await station.confirm_identity()
    event = (await field.engines.history("fake"))[-1].event
    assert isinstance(event, ev.Mismatch)
    assert (event.why, event.expected, event.found) == ("MARK_ABSENT", (await field.known_engine()).mark, "none")
    assert "sandledger engines trust" in caplog.text
    assert "MARK_ABSENT" in caplog.text
    assert other.calls["make_volume"] == 0, "a mark would make it ours"
    assert other.marks == {}
    assert await field.phase(sandbox_id) is Phase.RUNNING
    assert await right.confirm_identity()
    assert (await field.engine_told())[-1] == "back"
    assert field.engine.of(sandbox_id) is not None


async def test_an_engine_with_the_mark_of_another_is_not_believed(field: Field, until):
    await field.station().contact()
    other = FakeEngine()
    other.marks[field.installation] = "f" * 32
    station = field.station(field.driver(other))
    async with field.running(station):
        await until(told(field, "registered", "seen", "mismatch"))
    event = (await field.engines.history("fake"))[-1].event
    assert isinstance(event, ev.Mismatch)
    assert (event.why, event.found) == ("MARK_OTHER", "f" * 32)


async def test_a_new_engine_id_with_the_right_mark_is_an_upgrade(field: Field):
    station = field.station()
    await station.contact()
    field.engine.engine_id = "upgraded"
    assert await station.confirm_identity()
    assert await field.engine_told() == ["registered", "seen", "seen"]


async def test_an_engine_that_is_swapped_under_the_worker_stops_it(field: Field, until):
    station = field.station()
    async with field.running(station):
        await until(reached(station, State.USABLE))
        mark = field.engine.marks[field.installation]
        field.engine.become_another()
        await until(reached(station, State.WRONG))
        await until(told(field, "registered", "seen", "mismatch"))
        field.engine.marks[field.installation] = mark
        await until(reached(station, State.USABLE))
    assert await field.engine_told() == ["registered", "seen", "mismatch", "seen", "back"] or (
        await field.engine_told()
    )[3:4] == ["back"]


async def test_a_misled_worker_and_a_right_one_do_not_contradict_each_other(field: Field, until):
    """Without the rule each would append an event at each of its contacts, for ever."""
    right, misled = field.station(dark_after=60), field.station(field.driver(FakeEngine()), dark_after=60)
    await right.contact()
    async with field.running(right, misled):
        await until(reached(misled, State.WRONG))
        calls = field.engine.calls["mark"]

        async def many() -> bool:
            return field.engine.calls["mark"] > calls + 20

        await until(many)
        assert right.trusted
        assert misled.open
    assert await field.engine_told() == ["registered", "seen"]


async def test_a_wrong_engine_seen_twice_is_not_confirmed_by_the_right_one(field: Field):
    """Two observations of another engine, which goes away just before the loss would be recorded."""
    station = field.station(missing_grace=60)
    await station.contact()
    mark = field.engine.marks.pop(field.installation)
    assert not await station.contact()
    field.engine.marks[field.installation] = mark
    assert await station.contact(), "work goes on"
    assert not await station.confirm_identity(), "and absence is not believed yet"


async def test_confirming_asks_the_engine_after_the_call(field: Field):
    """A check that began before the question says nothing about now."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def before(call: str) -> None:
        if call == "mark" and not begun.is_set():
            begun.set()
            await go.wait()

    await field.station().contact()
    station = field.station(field.driver(before=before))
    early = asyncio.create_task(station.contact())
    await begun.wait()
    late = [asyncio.create_task(station.confirm_identity()) for _ in range(5)]
    await asyncio.sleep(0)
    go.set()
    assert all(await asyncio.gather(early, *late))
    assert field.engine.calls["mark"] == 3, "one before all, one under way, one for all five"


async def test_without_a_database_nothing_is_confirmed(field: Field):
    station = field.station()
    await station.contact()
    await field.sql("ALTER TABLE engines RENAME TO away")
    try:
        with pytest.raises(Exception, match="engines"):
            await station.confirm_identity()
    finally:
        await field.sql("ALTER TABLE away RENAME TO engines")


# --- a log that went back


async def test_a_restored_database_harms_nothing_and_says_so(field: Field, caplog: pytest.LogCaptureFixture):
    await field.station().contact()
    known = await field.run()
    beyond = field.orphan(position=1_000_000)
    field.orphan(position=999_999)
    station = field.station()
    assert not await station.confirm_identity()
    assert station.open
    engine = await field.known_engine()
    assert engine.state is EngineState.MISMATCH
    assert engine.trouble.startswith("LOG_WENT_BACK")
    assert engine.trouble.endswith("position 1000000")
    assert "sandledger engines trust fake" in caplog.text
    assert not await station.contact(), "the right mark does not mend it"
    assert await field.engine_told() == ["registered", "seen", "mismatch"]
    assert field.engine.of(beyond) is not None
    assert await field.phase(known) is Phase.RUNNING


async def test_a_database_that_goes_back_under_a_running_worker_is_noticed(field: Field):
    """A restore or a failover that lost its tail: the server only sees that its connections broke."""
    station = field.station()
    await station.contact()
    await field.sql("SELECT setval('events_position', last_value + 100) FROM events_position")
    assert await station.contact()
    field.orphan(position=(await field.sql("SELECT last_value FROM events_position"))[0][0])
    assert await station.contact(), "an object that this log led to"
    await field.sql("SELECT setval('events_position', last_value - 50) FROM events_position")
    assert not await station.confirm_identity()
    assert (await field.engine_told())[-1] == "mismatch"


async def test_trust_leaves_the_lost_positions_behind(field: Field):
    station = field.station()
    await station.contact()
    orphan = field.orphan(position=60_000_000)
    sweeper = field.sweeper(station)
    with pytest.raises(RuntimeUnavailable, match="LOG_WENT_BACK"):
        await sweeper.sweep()
    assert station.open
    after = await field.engines.trust("fake", WORKER)
    assert after.state is EngineState.UP
    assert after.position > 60_000_000, "no position is given twice"
    assert await station.contact()
    await sweeper.sweep()
    assert (await sweeper.sweep()).removed == (f"sandbox-{orphan}",), "an ordinary orphan now"
    sandbox_id = await field.create()
    assert (await field.sandbox(sandbox_id)).position > after.position, "and the log goes on"


async def test_only_a_log_that_went_back_can_be_trusted(field: Field):
    with pytest.raises(SettingsError, match="no engine named fake"):
        await field.engines.trust("fake", WORKER)
    await field.station().contact()
    with pytest.raises(SettingsError, match="is up"):
        await field.engines.trust("fake", WORKER)


async def test_the_log_never_skips_backwards(field: Field):
    await field.station().contact()
    before = (await field.sql("SELECT last_value FROM events_position"))[0][0]
    assert (await field.sql("SELECT log_skip_to($1)", before - 1))[0][0] == before
    assert (await field.sql("SELECT log_skip_to($1)", before + 7))[0][0] == before + 7
    assert (await field.sql("SELECT last_value FROM events_position"))[0][0] == before + 7
    for target in (2**47, None):
        with pytest.raises(Exception, match="beyond what the log can hold"):
            await field.sql("SELECT log_skip_to($1)", target)


async def test_a_skip_waits_for_whoever_appends(field: Field):
    """Otherwise it would set the sequence back to below what was drawn since it compared."""
    await field.station().contact()
    last = (await field.sql("SELECT last_value FROM events_position"))[0][0]
    writer = await asyncpg.connect(field.dsn, server_settings=SEARCH_PATH)
    try:
        async with writer.transaction():
            await writer.execute("LOCK TABLE events IN ROW EXCLUSIVE MODE")  # as an insert does
            skipping = asyncio.create_task(field.sql("SELECT log_skip_to($1)", last + 3))
            async with asyncio.timeout(30):
                while not await writer.fetch("SELECT 1 FROM pg_locks WHERE NOT granted"):
                    await asyncio.sleep(0.01)
            await writer.execute("SELECT nextval('events_position') FROM generate_series(1, 10)")
        assert (await skipping)[0][0] == last + 10
    finally:
        await writer.close()


# --- dark and back


async def test_an_engine_that_nobody_reaches_goes_dark_once_and_comes_back(field: Field, until):
    stations = [field.station() for _ in range(3)]
    async with field.running(*stations):
        await until(reached(stations[0], State.USABLE))
        field.engine.down = True
        await until(told(field, "registered", "seen", "dark"))
        asked = field.engine.calls["version"]

        async def asked_more() -> bool:
            return field.engine.calls["version"] > asked + 20

        await until(asked_more)
        assert await field.engine_told() == ["registered", "seen", "dark"]
        dark = (await field.engines.history("fake"))[-1].event
        assert isinstance(dark, ev.Dark)
        assert "down" in dark.reason
        field.engine.down = False
        await until(told(field, "registered", "seen", "dark", "back"))
        for station in stations:
            await until(reached(station, State.USABLE))
        await until(told(field, "registered", "seen", "dark", "back"))


async def test_one_worker_that_cannot_reach_the_engine_does_not_make_it_dark(field: Field, until):
    async def cut(_call: str) -> None:
        raise RuntimeUnavailable("no route to host")

    well, cut_off = field.station(), field.station(field.driver(before=cut))
    await well.contact()
    async with field.running(well, cut_off):
        await until(reached(cut_off, State.AWAY))
        seen = field.engine.calls["mark"]

        async def many() -> bool:
            return field.engine.calls["mark"] > seen + 20

        await until(many)
    assert await field.engine_told() == ["registered", "seen"]


async def test_an_engine_that_nobody_serves_is_reported_by_the_workers_of_another(field: Field, until):
    await Station(
        driver=FakeDriver(FakeEngine(), field.installation, name="other"),
        engines=field.engines,
        connections=field.database,
        policy=field.station()._policy,
        meta=WORKER,
    ).contact()
    async with field.running(field.station()):

        async def dark() -> bool:
            return (await field.engine_told("other"))[-1] == "dark"

        await until(dark)
    assert await field.engine_told("fake") == ["registered", "seen"]


async def test_what_waited_is_due_when_the_engine_is_back(field: Field, until):
    station = field.station()
    called: list[int] = []
    station.when_usable(lambda: called.append(1))
    async with field.running(station):
        await until(reached(station, State.USABLE))
        field.engine.down = True
        await until(reached(station, State.AWAY))
        placed, held = await field.create(), await field.create()
        await field.sql("UPDATE reconcile_queue SET due_at = clock_timestamp() + interval '1 hour'")
        unplaced = uuid4()
        insert = (
            "INSERT INTO reconcile_queue (stream_id, kind, tenant, engine, revision, due_at) VALUES "
            "($1, 'sandbox', 'default', $2, 1, clock_timestamp() + interval '1 hour')"
        )
        elsewhere = uuid4()
        await field.sql(insert, unplaced, "")
        await field.sql(insert, elsewhere, "other")
        await field.sql(
            "UPDATE reconcile_queue SET lease_until = due_at, lease_owner = gen_random_uuid() WHERE stream_id = $1",
            held,
        )
        field.engine.down = False
        await until(reached(station, State.USABLE))
        await until(lambda: _due(field, placed, unplaced))
    assert not await _due(field, elsewhere)
    assert not await _due(field, held), "somebody is at it"
    assert len(called) == 2
    await field.sql("DELETE FROM reconcile_queue WHERE stream_id = ANY($1)", [unplaced, elsewhere])


async def _due(field: Field, *streams: UUID) -> bool:
    rows = await field.sql(
        "SELECT 1 FROM reconcile_queue WHERE stream_id = ANY($1) AND due_at <= clock_timestamp()", list(streams)
    )
    return len(rows) == len(streams)


# --- the breaker


async def test_an_unavailable_answer_of_a_healthy_engine_is_the_streams_own(field: Field):
    station = field.station()
    await station.contact()
    stream = uuid4()
    waits = [await station.suspect(stream, RuntimeUnavailable("500")) for _ in range(4)]
    assert not station.open
    assert station.refusals(stream) == 4
    assert waits[3] > waits[0]
    station.succeeded(stream)
    assert station.refusals(stream) == 0


async def test_silence_opens_the_breaker_and_any_success_has_the_engine_asked_at_once(field: Field, until):
    station = field.station(engine_probe=3600, engine_beat=3600)
    async with field.running(station):
        await until(reached(station, State.USABLE))
        field.engine.down = True
        await station.suspect(uuid4(), RuntimeUnavailable("refused"))
        assert station.open
        field.engine.down = False
        asked = field.engine.calls["mark"]
        station._policy = msgspec.structs.replace(station._policy, engine_probe=0.01)
        station.succeeded(uuid4())
        await until(reached(station, State.USABLE))
        assert field.engine.calls["mark"] == asked + 1


async def test_an_engine_that_hangs_is_noticed_by_the_checks_own_limit(field: Field):
    hang = asyncio.Event()

    async def before(_call: str) -> None:
        await hang.wait()

    await field.station().contact()
    station = field.station(field.driver(before=before), engine_check=0.05)
    assert not await station.contact()
    assert station.state is State.AWAY
    assert "no answer within 0.05 s" in station.trouble
    hang.set()
    assert await station.contact()


async def test_a_station_whose_loop_stands_still_is_not_alive(field: Field):
    station = field.station()
    assert station.alive
    station.alive_at -= 3600
    assert not station.alive


# --- exits during an outage


def ended(
    code: int | None,
    at: datetime | None,
    *,
    oom: bool = False,
    reason: str | None = None,
    started_at: datetime | None = None,
) -> Observed:
    return Observed(uuid4(), (), Power.EXITED, started_at=started_at, exit=Exit(code, oom, "killed", at, reason))


def reason_of(station: Station | Outages, observed: Observed) -> str | None:
    annotated = station.annotate(observed).exit
    assert annotated is not None
    return annotated.reason


async def test_exits_of_an_outage_say_so(field: Field, until):
    station = field.station()
    async with field.running(station):
        await until(reached(station, State.USABLE))
        field.engine.down = True
        await until(reached(station, State.AWAY))
        down = datetime.now(UTC)
        assert reason_of(station, ended(137, down)) == ENGINE_STOPPED, "already before the outage is over"
        field.engine.down = False
        await until(reached(station, State.USABLE))
    for code in (137, 143, 255):
        assert reason_of(station, ended(code, down)) == ENGINE_STOPPED
    found = station.annotate(ended(137, down)).exit
    assert found is not None
    assert "engine was away" in found.message
    assert reason_of(station, ended(1, down)) is None, "it ended by itself"
    assert reason_of(station, ended(137, down, oom=True)) is None
    assert reason_of(station, ended(137, down, reason="EVICTED")) == "EVICTED"
    assert reason_of(station, ended(137, None)) is None
    assert reason_of(station, ended(137, down - timedelta(minutes=1))) is None
    assert reason_of(station, ended(137, down + timedelta(minutes=1))) is None


def test_what_started_after_an_outage_was_not_ended_by_it():
    since = datetime(2026, 1, 1, tzinfo=UTC)
    until = since + timedelta(seconds=30)
    outages = Outages()
    outages.add(since, until)
    soon = until + timedelta(seconds=3)
    assert reason_of(outages, ended(137, soon, started_at=since - timedelta(hours=1))) == ENGINE_STOPPED
    assert reason_of(outages, ended(137, soon, started_at=until + timedelta(seconds=1))) is None
    # The engine's clock may be some seconds ahead.
    assert reason_of(outages, ended(137, soon, started_at=since + timedelta(seconds=4))) == ENGINE_STOPPED


async def test_a_short_restart_is_known_by_the_broken_stream(field: Field):
    """The engine was back before anybody asked it; only its event stream broke."""
    station = field.station()
    await station.contact()
    at = datetime.now(UTC)
    assert reason_of(station, ended(137, at)) is None
    station.doubt()
    assert not station.trusted
    assert await station.contact()
    assert station.trusted
    assert reason_of(station, ended(137, at)) == ENGINE_STOPPED


async def test_a_worker_that_was_restarted_meanwhile_still_knows(field: Field, until):
    first = field.station()
    async with field.running(first):
        await until(reached(first, State.USABLE))
        field.engine.down = True
        await until(told(field, "registered", "seen", "dark"))
    down = datetime.now(UTC)
    second = field.station()
    assert not await second.contact()
    assert reason_of(second, ended(137, down)) == ENGINE_STOPPED
    field.engine.down = False
    third = field.station()
    assert await third.contact(), "its own first contact, after a dark time"
    assert reason_of(third, ended(137, down)) == ENGINE_STOPPED
    fourth = field.station()
    assert await fourth.contact(), "all was over when it started"
    assert reason_of(fourth, ended(137, down)) == ENGINE_STOPPED, "the log says so"


async def test_workers_that_were_away_are_no_outage_of_the_engine(field: Field):
    await field.station().contact()
    await field.sql("UPDATE engines SET last_seen_at = clock_timestamp() - interval '1 hour'")
    station = field.station()
    assert await station.contact()
    assert reason_of(station, ended(137, NOW - timedelta(minutes=30))) is None
    assert await field.engine_told() == ["registered", "seen"]


async def test_a_database_that_was_replaced_and_knows_no_engine_is_not_trusted(
    field: Field, caplog: pytest.LogCaptureFixture
):
    station = field.station()
    assert await station.confirm_identity()
    stored = await field.sql("DELETE FROM engines RETURNING to_jsonb(engines)::text")
    assert not await station.confirm_identity()
    assert station.state is State.WRONG
    assert "the database was replaced" in station.trouble
    assert "Traceback" not in caplog.text
    await field.sql("INSERT INTO engines SELECT * FROM jsonb_populate_record(NULL::engines, $1::jsonb)", stored[0][0])
