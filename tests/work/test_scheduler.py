"""Deadlines: claimed, abandoned, run twice, run late; how each transition ends; and the thread that asks for them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from apscheduler.job import Job

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import EXPIRY, TRANSITION, Limits
from app.domain.sandbox.observed import Power, Ref
from app.domain.sandbox.state import Phase
from app.domain.stream import Actor, ActorKind
from app.domain.tenants import ANY_TENANT
from app.errors import Rejected, StoreUnavailable
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.deadlines.rows import CLAIM, EARLIEST, NAMES, Deadline, DeadlineRows
from app.store.log.signal import Signal
from app.work.fire import Deadlines
from app.work.scheduler import DeadlineStore
from app.work.timers import Timers
from tests.work.field import CLIENT, SEARCH_PATH, WORKER, Field

LEASE = 2.0
SHORT = Limits(pending_s=0.2, pausing_s=0.2, resuming_s=0.2, stopping_s=0.2)


@pytest.fixture
def deadlines(field: Field) -> Deadlines:
    return field.deadlines()


@pytest.fixture
async def ready(field: Field) -> Field:
    """With an engine to place sandboxes on."""
    await field.station().contact()
    return field


@asynccontextmanager
async def scheduling(*deadlines: Deadlines) -> AsyncIterator[None]:
    """One scheduler for each, as workers have."""
    every: list[Timers] = []
    for one in deadlines:
        timers = Timers(8)
        timers.add_store("deadlines", DeadlineStore(one, timers.bridge, timers.executor, LEASE))
        timers.start()
        every.append(timers)
    try:
        yield
        assert all(timers.alive for timers in every)
    finally:
        await asyncio.gather(*[timers.stop(5) for timers in every])


async def make_due(field: Field) -> None:
    await field.sql("UPDATE deadlines SET next_run_time = clock_timestamp()")


async def passed(field: Field, *sandboxes: UUID, name: str = EXPIRY) -> None:
    """Until the database says that these deadlines are over."""
    query = "SELECT 1 FROM deadlines WHERE stream_id = ANY($1) AND name = $2 AND fires_at > clock_timestamp()"
    async with asyncio.timeout(30):
        while await field.sql(query, list(sandboxes), name):
            await asyncio.sleep(0.02)


async def expirations(field: Field) -> dict[UUID, int]:
    rows = await field.sql("SELECT stream_id, count(*) AS n FROM events WHERE type = 'sandbox.expired' GROUP BY 1")
    return {UUID(int=row["stream_id"].int): row["n"] for row in rows}


async def claimed(deadlines: Deadlines, name: str) -> Deadline:
    """The one claimed row of this name."""
    (found,) = [one for one in await deadlines.rows.claim(10, LEASE) if one.name == name]
    return found


# --- expiry


async def test_the_row_comes_moves_and_goes_with_the_append(ready: Field):
    sandbox_id = await ready.run(timeout_s=600)
    sandbox = await ready.sandbox(sandbox_id)
    row = await ready.deadline(sandbox_id, EXPIRY)
    assert row["fires_at"] == row["next_run_time"] == sandbox.expires_at
    assert sandbox.expires_at is not None
    later = sandbox.expires_at + timedelta(seconds=60)
    outcome = await ready.ask(sandbox_id, cmd.Renew(later))
    row = await ready.deadline(sandbox_id, EXPIRY)
    assert (row["fires_at"], row["next_run_time"], row["cause"]) == (later, later, outcome.position)
    await ready.ask(sandbox_id, cmd.Terminate())
    assert await ready.deadline(sandbox_id, EXPIRY) is None
    assert await ready.deadline(await ready.create(), EXPIRY) is None


async def test_a_due_row_expires_and_says_why(ready: Field, deadlines: Deadlines):
    sandbox_id = await ready.run(timeout_s=1)
    assert await deadlines.rows.claim(10, LEASE) == []
    await passed(ready, sandbox_id)
    due = await claimed(deadlines, EXPIRY)
    assert await deadlines.rows.claim(10, LEASE) == [], "claimed is claimed"
    await deadlines.fire(due)
    last = await ready.last(sandbox_id)
    assert isinstance(last.event, ev.Expired)
    assert last.at >= last.event.expires_at == due.fires_at
    first = (await ready.service.history(sandbox_id, "default"))[0]
    timer = Actor(ActorKind.TIMER, "t1", EXPIRY)
    assert last.meta.actor == timer
    assert last.meta.cause is not None
    assert last.meta.cause >= first.position
    assert await ready.deadline(sandbox_id, EXPIRY) is None
    assert await ready.phase(sandbox_id) is Phase.STOPPING


async def test_a_job_that_runs_twice_expires_once(ready: Field, deadlines: Deadlines):
    sandbox_id = await ready.run(timeout_s=1)
    await passed(ready, sandbox_id)
    due = await claimed(deadlines, EXPIRY)
    await asyncio.gather(*[deadlines.fire(due) for _ in range(5)])
    assert await expirations(ready) == {sandbox_id: 1}


async def test_a_renewal_between_claim_and_job_wins(ready: Field, deadlines: Deadlines):
    """The row is claimed too early on purpose, as by a worker whose statement was slow."""
    sandbox_id = await ready.run(timeout_s=600)
    await make_due(ready)
    due = await claimed(deadlines, EXPIRY)
    later = due.fires_at + timedelta(seconds=60)
    await ready.ask(sandbox_id, cmd.Renew(later))
    await deadlines.fire(due)
    assert await ready.phase(sandbox_id) is Phase.RUNNING
    assert (await ready.deadline(sandbox_id, EXPIRY))["next_run_time"] == later


async def test_expiring_without_looking_again_would_end_a_renewed_sandbox(ready: Field, deadlines: Deadlines):
    """The naive way of the test above: whoever holds a due row ends the sandbox."""
    sandbox_id = await ready.run(timeout_s=600)
    await make_due(ready)
    due = await claimed(deadlines, EXPIRY)
    await ready.ask(sandbox_id, cmd.Renew(due.fires_at + timedelta(seconds=60)))
    await ready.service.execute(due.stream_id, ANY_TENANT, cmd.Terminate(ev.EndCause.EXPIRED), CLIENT)
    ending = (await ready.sandbox(sandbox_id)).ending
    assert ending is not None
    assert ending.at < due.fires_at, "ended before its time, after a renewal that was answered with success"


async def test_a_claim_whose_worker_was_killed_fires_again(ready: Field, deadlines: Deadlines, until):
    sandbox_id = await ready.run(timeout_s=1)
    await passed(ready, sandbox_id)
    assert len(await deadlines.rows.claim(10, LEASE)) == 1  # kill -9 here
    async with scheduling(ready.deadlines()):
        await until(lambda: _is(ready, sandbox_id, Phase.STOPPING))
    assert await expirations(ready) == {sandbox_id: 1}


async def test_a_claim_that_takes_the_row_away_would_lose_it(ready: Field, deadlines: Deadlines):
    """The naive way of the test above, which is also what a `date` job does."""
    sandbox_id = await ready.run(timeout_s=1)
    await passed(ready, sandbox_id)
    kept = await ready.deadline(sandbox_id, EXPIRY)
    await ready.sql("DELETE FROM deadlines WHERE next_run_time <= clock_timestamp()")  # kill -9 here
    await make_due(ready)
    assert await deadlines.rows.claim(10, LEASE) == []
    assert await ready.phase(sandbox_id) is Phase.RUNNING
    await _restore(ready, kept)


async def _restore(field: Field, row) -> None:
    """The suite compares deadlines with states at the end."""
    await field.sql(
        "INSERT INTO deadlines (stream_id, name, kind, tenant, fires_at, next_run_time) VALUES ($1, $2, $3, $4, $5, $5)",
        *[row[name] for name in ("stream_id", "name", "kind", "tenant", "fires_at")],
    )


async def test_deadlines_that_passed_while_nobody_was_there(ready: Field, until):
    sandboxes = [await ready.run(timeout_s=1) for _ in range(20)]
    await passed(ready, *sandboxes)
    async with scheduling(ready.deadlines()):
        await until(lambda: _are(ready, sandboxes, Phase.STOPPING))
    assert await expirations(ready) == dict.fromkeys(sandboxes, 1)


async def test_two_schedulers_fire_each_once(ready: Field, until):
    """More than two batches, due at one moment."""
    sandboxes = await asyncio.gather(*[ready.create(timeout_s=1) for _ in range(450)])
    await passed(ready, *sandboxes)
    async with scheduling(ready.deadlines(), ready.deadlines()):
        await until(lambda: _are(ready, sandboxes, Phase.STOPPING))
    assert await expirations(ready) == dict.fromkeys(sandboxes, 1)
    assert not await ready.sql("SELECT 1 FROM deadlines WHERE name = 'expiry'")


async def _is(field: Field, sandbox_id: UUID, phase: Phase) -> bool:
    return await field.phase(sandbox_id) is phase


async def _are(field: Field, sandboxes: list[UUID], phase: Phase) -> bool:
    rows = await field.sql("SELECT 1 FROM sandboxes WHERE id = ANY($1) AND phase = $2", sandboxes, phase.value)
    return len(rows) == len(sandboxes)


# --- rows that should not be there, and jobs that fail


async def test_a_row_of_no_stream_is_deleted(ready: Field, deadlines: Deadlines):
    nobody = uuid4()
    await _insert(ready, nobody, EXPIRY)
    await deadlines.fire(await claimed(deadlines, EXPIRY))
    assert await ready.deadline(nobody, EXPIRY) is None


async def _insert(field: Field, stream_id: UUID, name: str, kind: str = "sandbox") -> None:
    await field.sql(
        "INSERT INTO deadlines (stream_id, name, kind, tenant, fires_at, next_run_time) VALUES "
        "($1, $2, $3, 'default', clock_timestamp(), clock_timestamp())",
        *(stream_id, name, kind),
    )


@pytest.mark.parametrize("name", [EXPIRY, TRANSITION])
async def test_a_row_that_the_state_does_not_want_is_deleted(ready: Field, deadlines: Deadlines, name: str):
    sandbox_id = await ready.run()
    await _insert(ready, sandbox_id, name)
    await deadlines.fire(await claimed(deadlines, name))
    assert await ready.deadline(sandbox_id, name) is None
    assert await ready.phase(sandbox_id) is Phase.RUNNING


async def test_a_row_of_a_newer_version_is_left_to_it(ready: Field, deadlines: Deadlines, until):
    stream_id = uuid4()
    await _insert(ready, stream_id, "idle", "pool")
    assert await deadlines.rows.claim(10, 30) == []
    assert await deadlines.rows.earliest() is None, "nobody here wakes for it"
    row = await ready.deadline(stream_id, "idle")
    assert row["attempts"] == 0, "a worker of the newer version finds it due"
    (due,) = await DeadlineRows(ready.database, ["idle"]).claim(10, 30)
    await deadlines.fire(due)
    row = await ready.deadline(stream_id, "idle")
    assert row["next_run_time"] == due.leased_until, "whoever got it all the same lets it rest for the lease"
    await ready.sql("DELETE FROM deadlines WHERE stream_id = $1", stream_id)


async def test_a_row_that_fires_too_early_moves_to_the_time_of_the_state(ready: Field, deadlines: Deadlines):
    """The operator has made the limits longer since. Neither lost nor spinning."""
    early = Service(ready.database, ready.signal, SHORT)
    sandbox_id = await ready.create(service=early)
    await passed(ready, sandbox_id, name=TRANSITION)
    due = await claimed(deadlines, TRANSITION)
    await deadlines.fire(due)
    assert await ready.phase(sandbox_id) is Phase.PENDING
    row = await ready.deadline(sandbox_id, TRANSITION)
    expected = (await ready.sandbox(sandbox_id)).changed_at + timedelta(seconds=Limits().pending_s)
    assert row["fires_at"] == row["next_run_time"] == expected


async def test_a_row_that_stays_as_it_was_would_spin(ready: Field, deadlines: Deadlines):
    """The naive way of the test above: hand the row back as it is."""
    early = Service(ready.database, ready.signal, SHORT)
    sandbox_id = await ready.create(service=early)
    await passed(ready, sandbox_id, name=TRANSITION)
    for _ in range(3):
        due = await claimed(deadlines, TRANSITION)
        assert (await ready.service.execute(sandbox_id, ANY_TENANT, cmd.EndTransition(Limits()), WORKER)).events == ()
        await deadlines.rows.hand_back(due, 0)


async def test_a_job_that_fails_is_handed_back_unless_it_was_renewed(ready: Field):
    class Away(Service):
        """Its database is away."""

        async def execute(self, *_: object, **__: object):
            raise StoreUnavailable("away")

    rows = DeadlineRows(ready.database)
    failing = Deadlines(rows, Away(ready.database, ready.signal), Limits(), timer_id="t1", app_version="test")
    sandbox_id = await ready.run(timeout_s=600)
    await make_due(ready)
    due = await claimed(failing, EXPIRY)
    await failing.fire(due)
    assert (await ready.deadline(sandbox_id, EXPIRY))["next_run_time"] < due.leased_until
    await make_due(ready)
    due = await claimed(failing, EXPIRY)
    later = due.fires_at + timedelta(seconds=60)
    await ready.ask(sandbox_id, cmd.Renew(later))
    await failing.fire(due)
    assert (await ready.deadline(sandbox_id, EXPIRY))["next_run_time"] == later


# --- transitions


async def test_a_create_that_never_works_fails_with_the_last_reason(ready: Field, until):
    short = ready.deadlines(SHORT)
    sandbox_id = await ready.create(service=short._service)
    await ready.sql(
        "UPDATE reconcile_queue SET attempts = 7, last_reason = 'RUNTIME_UNAVAILABLE', last_error = 'create: 500'"
    )
    async with scheduling(short):
        await until(lambda: _is(ready, sandbox_id, Phase.FAILED))
    failed = (await ready.last(sandbox_id)).event
    assert isinstance(failed, ev.Failed)
    assert failed.reason == "PROVISIONING_TIMEOUT"
    assert "RUNTIME_UNAVAILABLE (create: 500)" in failed.message
    assert await ready.deadline(sandbox_id, TRANSITION) is None
    assert (await ready.last(sandbox_id)).meta.actor == Actor(ActorKind.TIMER, "t1", TRANSITION)
    assert await ready.sql("SELECT 1 FROM reconcile_queue WHERE stream_id = $1", sandbox_id), "to be removed"


async def test_a_pull_that_never_ends_fails_and_names_what_it_waited_for(ready: Field, until):
    short = ready.deadlines(SHORT)
    sandbox_id = await ready.create(service=short._service)
    await short._service.execute(
        sandbox_id, ANY_TENANT, cmd.RecordWaiting("fetch", "IMAGE_PULLING", "1 of 3 layers"), WORKER
    )
    async with scheduling(short):
        await until(lambda: _is(ready, sandbox_id, Phase.FAILED))
    failed = (await ready.last(sandbox_id)).event
    assert isinstance(failed, ev.Failed)
    assert (failed.step, failed.reason) == ("fetch", "PROVISIONING_TIMEOUT")
    assert "IMAGE_PULLING" in failed.message


async def test_a_sandbox_that_no_engine_takes_fails_too(field: Field, until):
    short = field.deadlines(SHORT)
    sandbox_id = await field.create(service=short._service)
    assert (await field.sandbox(sandbox_id)).engine is None
    async with scheduling(short):
        await until(lambda: _is(field, sandbox_id, Phase.FAILED))


async def test_a_pause_that_is_refused_ends_in_running(ready: Field, until):
    """Counting attempts, the sandbox was destroyed because it could not be paused."""
    short = ready.deadlines(SHORT)
    sandbox_id = await ready.run()
    await ready.ask(sandbox_id, cmd.Pause(), short._service)
    assert await ready.phase(sandbox_id) is Phase.PAUSING
    async with scheduling(short):
        await until(lambda: _is(ready, sandbox_id, Phase.RUNNING))
    event = (await ready.last(sandbox_id)).event
    assert isinstance(event, ev.PauseFailed)
    assert event.reason == "PAUSE_TIMEOUT"
    assert ready.engine.of(sandbox_id) is not None
    assert await ready.deadline(sandbox_id, TRANSITION) is None


async def test_a_resume_that_does_not_work_stays_paused(ready: Field, until):
    short = ready.deadlines(SHORT)
    sandbox_id = await ready.run()
    await ready.ask(sandbox_id, cmd.Pause())
    paused = await ready.driver().set_power(Ref(sandbox_id), Power.PAUSED)
    assert paused is not None
    await ready.service.record(await ready.sandbox(sandbox_id), cmd.RecordSeen(paused, "set_power"), WORKER)
    assert await ready.phase(sandbox_id) is Phase.PAUSED
    assert await ready.deadline(sandbox_id, TRANSITION) is None, "the pause is over"
    await ready.ask(sandbox_id, cmd.Resume(), short._service)
    async with scheduling(short):
        await until(lambda: _is(ready, sandbox_id, Phase.PAUSED))
    event = (await ready.last(sandbox_id)).event
    assert isinstance(event, ev.ResumeFailed)
    assert event.reason == "RESUME_TIMEOUT"
    assert ready.engine.of(sandbox_id) is not None


async def test_a_removal_that_never_works_is_reported_again_and_again(ready: Field, until):
    limits = Limits(stopping_s=0.1, overdue_max_s=0.3)
    short = ready.deadlines(limits)
    sandbox_id = await ready.run()
    await ready.ask(sandbox_id, cmd.Terminate(), short._service)
    async with scheduling(short):

        async def reported() -> bool:
            return (await ready.told(sandbox_id)).count("overdue") >= 3

        await until(reported)
    assert await ready.phase(sandbox_id) is Phase.STOPPING, "it is never given up"
    history = await ready.service.history(sandbox_id, "default")
    times = [one.event.times for one in history if isinstance(one.event, ev.Overdue)]
    assert times == sorted(set(times)), "each report once"
    assert await ready.deadline(sandbox_id, TRANSITION) is not None
    await ready.service.record(await ready.sandbox(sandbox_id), cmd.RecordRemoved(), WORKER)
    assert await ready.deadline(sandbox_id, TRANSITION) is None, "until it is closed"


async def test_a_transition_that_ended_before_its_deadline_is_not_touched(ready: Field, deadlines: Deadlines):
    """The row was claimed, then the pause worked."""
    sandbox_id = await ready.run()
    await ready.ask(sandbox_id, cmd.Pause())
    await make_due(ready)
    due = await claimed(deadlines, TRANSITION)
    paused = await ready.driver().set_power(Ref(sandbox_id), Power.PAUSED)
    assert paused is not None
    await ready.service.record(await ready.sandbox(sandbox_id), cmd.RecordSeen(paused, "set_power"), WORKER)
    await deadlines.fire(due)
    assert await ready.phase(sandbox_id) is Phase.PAUSED
    assert (await ready.told(sandbox_id))[-1] == "paused"
    assert await ready.deadline(sandbox_id, TRANSITION) is None


async def test_downtime_over_a_transition_deadline(ready: Field, until):
    """Nobody was there when it passed; the engine has refused all along."""
    short = ready.deadlines(SHORT)
    pausing, pending = await ready.run(), await ready.create(service=short._service)
    await ready.ask(pausing, cmd.Pause(), short._service)
    await passed(ready, pausing, pending, name=TRANSITION)
    async with scheduling(short, ready.deadlines(SHORT)):
        await until(lambda: _is(ready, pausing, Phase.RUNNING))
        await until(lambda: _is(ready, pending, Phase.FAILED))
    assert (await ready.told(pausing)).count("pause_failed") == 1
    assert (await ready.told(pending)).count("failed") == 1


# --- the thread


class Thread:
    """The place of APScheduler's thread: asks a store from outside of the loop."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.timers = Timers(4)
        self.store = DeadlineStore(deadlines, self.timers.bridge, self.timers.executor, LEASE)
        self.timers.add_store("deadlines", self.store)
        self.store.start(self.timers._scheduler, "deadlines")

    async def ask(self, question, *arguments):
        return await asyncio.to_thread(getattr(self.store, question), *arguments)


def _id(sandbox_id: UUID, name: str = TRANSITION) -> str:
    return f"{sandbox_id}/{name}"


async def test_the_local_clock_does_not_count(ready: Field, deadlines: Deadlines):
    """What the database calls due is run now, be the local clock an hour behind or ahead."""
    thread = Thread(deadlines)
    sandbox_id = await ready.create()
    for hours in (-1, 0, 1):
        await make_due(ready)
        now = datetime.now(UTC) + timedelta(hours=hours)
        (job,) = await thread.ask("get_due_jobs", now)
        assert isinstance(job, Job)
        assert job.id == _id(sandbox_id)
        assert job._get_run_times(now) == [now]
        assert job.trigger.get_next_fire_time(now, now) > now, "so APScheduler keeps it"
    assert await thread.ask("get_due_jobs", datetime.now(UTC) + timedelta(days=1)) == []


async def test_the_next_question_is_soon_and_never_long_ago(ready: Field, deadlines: Deadlines):
    thread = Thread(deadlines)

    async def wait() -> float:
        before = datetime.now(UTC)
        return ((await thread.ask("get_next_run_time")) - before).total_seconds()

    assert await wait() >= 1.0, "nothing stored: others may add rows"
    await ready.create(timeout_s=600)
    assert await wait() >= 1.0, "as far away as it may be"
    await ready.sql("UPDATE deadlines SET next_run_time = clock_timestamp() - interval '1 day'")
    assert await wait() >= 0.05, "due and not found: somebody else has it locked, so do not spin"
    assert len(await thread.ask("get_due_jobs", datetime.now(UTC))) == 2
    assert await wait() >= 0.0


class Counted:
    """Passes statements on and remembers which they were."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.sent: list[Statement] = []

    async def fetch(self, statement: Statement, **values: Any) -> Any:
        self.sent.append(statement)
        return await self._database.fetch(statement, **values)

    async def fetch_one(self, statement: Statement, **values: Any) -> Any:
        self.sent.append(statement)
        return await self._database.fetch_one(statement, **values)


async def test_an_idle_round_is_one_statement(ready: Field):
    """A worker with nothing to do asks once a second what is next, and claims only when something is due."""
    counted = Counted(ready.database)
    deadlines = ready.deadlines()
    deadlines.rows = DeadlineRows(counted)
    thread = Thread(deadlines)

    async def round_() -> list[Statement]:
        """As APScheduler's thread: what is due, then when to ask again."""
        counted.sent.clear()
        await thread.ask("get_due_jobs", datetime.now(UTC))
        await thread.ask("get_next_run_time")
        return list(counted.sent)

    assert await round_() == [EARLIEST]
    await ready.create(timeout_s=600)
    assert await round_() == [EARLIEST]
    await make_due(ready)
    assert await round_() == [EARLIEST, CLAIM, EARLIEST], "it became due while nobody expected it"
    await ready.sql("UPDATE deadlines SET next_run_time = clock_timestamp() + interval '300 ms'")
    assert await round_() == [EARLIEST]
    await make_due(ready)
    assert await round_() == [CLAIM, EARLIEST], "it was expected"


async def test_the_store_behaves_like_a_job_store(ready: Field, deadlines: Deadlines):
    thread = Thread(deadlines)
    one, other = await ready.create(timeout_s=600), await ready.create(timeout_s=300)
    job = await thread.ask("lookup_job", _id(one, EXPIRY))
    assert (job.id, job.misfire_grace_time, job.coalesce, job.max_instances) == (_id(one, EXPIRY), None, True, 1)
    assert await thread.ask("lookup_job", _id(uuid4())) is None
    assert [job.id for job in await thread.ask("get_all_jobs")] == [
        _id(other, EXPIRY),
        _id(one, EXPIRY),
        _id(one),
        _id(other),
    ]
    before = await ready.deadline(one, EXPIRY)
    await thread.ask("update_job", job)
    assert await ready.deadline(one, EXPIRY) == before
    for question, argument in (("add_job", (job,)), ("remove_all_jobs", ())):
        with pytest.raises(NotImplementedError):
            await thread.ask(question, *argument)
    kept = await ready.deadline(other, EXPIRY)
    for _ in range(2):
        await thread.ask("remove_job", _id(other, EXPIRY))
    assert await ready.deadline(other, EXPIRY) is None
    assert await ready.deadline(other, TRANSITION) is not None, "only the one that was named"
    await _restore(ready, kept)


@asynccontextmanager
async def locked(field: Field) -> AsyncIterator[None]:
    """Nobody reads or writes deadlines inside the block."""
    connection = await asyncpg.connect(field.dsn, server_settings=SEARCH_PATH)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE deadlines IN ACCESS EXCLUSIVE MODE")
            yield
    finally:
        await connection.close()


async def blocked(field: Field) -> None:
    """Until somebody waits for a lock."""
    async with asyncio.timeout(30):
        while not await field.sql("SELECT 1 FROM pg_locks WHERE NOT granted"):
            await asyncio.sleep(0.01)


async def cut_connections(field: Field) -> None:
    await field.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'sandledger' AND datname = current_database()"
    )


async def hanging(thread: Thread, ready: Field, *question: Any) -> asyncio.Task[Any]:
    """Ask what a lock holds up. A question that meets a connection which was just cut ends at once: ask again."""
    while True:
        asking = asyncio.create_task(thread.ask(*question))
        waiting = asyncio.create_task(blocked(ready))
        await asyncio.wait([asking, waiting], return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            await waiting
            return asking
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_no_question_raises_whatever_happens_to_the_database(ready: Field, deadlines: Deadlines):
    thread = Thread(deadlines)
    sandbox_id = await ready.create(timeout_s=600)
    async with locked(ready):
        asking = await hanging(thread, ready, "get_due_jobs", datetime.now(UTC))
        await cut_connections(ready)
        assert await asking == []
        asking = await hanging(thread, ready, "get_next_run_time")
        await cut_connections(ready)
        assert await asking > datetime.now(UTC)
        asking = await hanging(thread, ready, "lookup_job", _id(sandbox_id))
        thread.timers.bridge.close()
        assert await asking is None
    assert await thread.ask("get_due_jobs", datetime.now(UTC)) == [], "closed is closed"


async def test_the_scheduler_outlives_the_database(ready: Field, until):
    async with scheduling(ready.deadlines()):
        for _ in range(3):
            async with locked(ready):
                await blocked(ready)
                await cut_connections(ready)
        sandbox_id = None
        async with asyncio.timeout(30):
            while sandbox_id is None:
                with suppress(StoreUnavailable):
                    sandbox_id = await ready.create(timeout_s=1)
        await until(lambda: _is(ready, sandbox_id, Phase.STOPPING))


async def test_a_stop_waits_for_no_answer(ready: Field):
    """The thread asks the loop while the loop wants the thread to end."""
    timers = Timers(4)
    timers.add_store("deadlines", DeadlineStore(ready.deadlines(), timers.bridge, timers.executor, LEASE))
    timers.start()
    async with locked(ready):
        await blocked(ready)
        async with asyncio.timeout(30):
            await timers.stop(0)
    assert not timers.alive


async def test_a_loop_that_ends_without_a_stop_does_not_hang(ready: Field):
    """`asyncio.run` of a scheduler in a thread of its own, left by an exception."""

    def whole_process() -> None:
        async def main() -> None:
            database = Database(ready.dsn)
            service = Service(database, Signal(database))
            jobs = Deadlines(DeadlineRows(database), service, Limits(), timer_id="t", app_version="test")
            timers = Timers(4)
            timers.add_store("deadlines", DeadlineStore(jobs, timers.bridge, timers.executor, LEASE))
            timers.start()
            heard = timers.bridge.heard_at
            async with asyncio.timeout(30):
                while timers.bridge.heard_at == heard:
                    await asyncio.sleep(0.01)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            asyncio.run(main())

    await asyncio.wait_for(asyncio.to_thread(whole_process), 60)


async def test_a_thread_that_ended_or_a_job_that_hangs_is_not_alive(until):
    """Without these two a worker whose deadlines do not fire passes its health check."""
    hang, begun = asyncio.Event(), asyncio.Event()

    async def hanging() -> None:
        begun.set()
        await hang.wait()

    timers = Timers(2, stuck_after=0.05)
    timers.every(3600, hanging)
    assert not timers.alive, "not started"
    timers.start()
    assert timers.alive
    await begun.wait()

    async def dead() -> bool:
        return not timers.alive

    await until(dead)
    hang.set()

    async def well() -> bool:
        return timers.alive

    await until(well)
    await asyncio.to_thread(timers._scheduler.shutdown, wait=False)
    await until(dead)


async def test_a_job_without_a_database_says_so_in_one_line(caplog: pytest.LogCaptureFixture):
    """An outage met every loop of a worker; each printed its traceback."""
    failed = asyncio.Event()

    async def fails() -> None:
        failed.set()
        raise StoreUnavailable("the database is away")

    timers = Timers(2)
    timers.every(3600, fails)
    timers.start()
    await failed.wait()
    await timers.stop(1)
    said = [record for record in caplog.records if "the database is away" in record.getMessage()]
    assert [(record.levelname, record.exc_info) for record in said] == [("WARNING", None)]


async def test_due_rows_are_found_by_index(ready: Field):
    connection = await asyncpg.connect(ready.dsn, server_settings=SEARCH_PATH)
    try:
        await connection.execute(
            "INSERT INTO deadlines (stream_id, name, kind, tenant, fires_at, next_run_time) SELECT gen_random_uuid(),"
            " 'expiry', 'sandbox', 'default', t, t"
            " FROM (SELECT clock_timestamp() + make_interval(secs => n - 10) AS t FROM generate_series(1, 20000) n) x"
        )
        await connection.execute("ANALYZE deadlines")
        for mode in ("force_custom_plan", "force_generic_plan"):
            await connection.execute(f"SET plan_cache_mode = {mode}")
            for statement, values in (
                (CLAIM, {"limit": 200, "lease": 30.0, "names": list(NAMES)}),
                (EARLIEST, {"names": list(NAMES)}),
            ):
                rows = await connection.fetch("EXPLAIN " + statement.sql, *statement.arguments(values))
                plan = "\n".join(row[0] for row in rows)
                assert "deadlines_due" in plan
                assert "Seq Scan on deadlines" not in plan, plan
        await connection.execute("DELETE FROM deadlines")
    finally:
        await connection.close()


async def test_renewals_race_two_schedulers(ready: Field, until):
    """A 200 is never followed by an expiry before its time, and nothing lives on after it."""
    dice = random.Random(20260301)
    accepted: dict[UUID, list[datetime]] = {}
    refused = 0

    async def client(sandbox_id: UUID) -> None:
        nonlocal refused
        deadline = (await ready.sandbox(sandbox_id)).expires_at
        assert deadline is not None
        accepted[sandbox_id] = [deadline]
        for _ in range(3):
            # From well before, for a machine where a renewal takes long, to after it: some are in time and some are not.
            aim = deadline + timedelta(seconds=dice.uniform(-0.5, 0.06))
            await asyncio.sleep(max(0.0, (aim - datetime.now(UTC)).total_seconds()))
            wanted = datetime.now(UTC) + timedelta(seconds=dice.uniform(0.3, 0.6))
            try:
                sandbox = (await ready.ask(sandbox_id, cmd.Renew(wanted))).sandbox
            except Rejected:
                refused += 1
                return
            assert sandbox.expires_at is not None
            deadline = sandbox.expires_at
            accepted[sandbox_id].append(deadline)

    async with scheduling(ready.deadlines(), ready.deadlines()):
        clients = [asyncio.create_task(client(await ready.create(timeout_s=2))) for _ in range(300)]
        await asyncio.gather(*clients)

        async def all_ended() -> bool:
            return not await ready.sql("SELECT 1 FROM sandboxes WHERE ended_at IS NULL LIMIT 1")

        await until(all_ended)
    renewed = sum(len(times) - 1 for times in accepted.values())
    assert renewed > 10
    assert refused > 50, "no race was lost: the test has no power"
    for sandbox_id, times in accepted.items():
        history = await ready.service.history(sandbox_id, "default")
        ends = [one for one in history if isinstance(one.event, ev.Expired)]
        assert len(ends) == 1
        assert isinstance(ends[0].event, ev.Expired)
        assert ends[0].event.expires_at == times[-1]
        assert times[-1] <= ends[0].at < times[-1] + timedelta(seconds=5)
