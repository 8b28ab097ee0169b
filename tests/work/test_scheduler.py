"""Expiry jobs: claimed, abandoned, run twice, run late; and the thread that asks for them."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest
from apscheduler.job import Job

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase
from app.errors import Rejected, StoreUnavailable
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.work.expiry import CLAIM, EARLIEST, ExpiryJobs, ExpiryJobStore
from app.work.timers import Timers
from tests.work.stage import CLIENT, Stage

TIMER = ev.Actor(ev.ActorKind.TIMER, "t1", "expiry")


@pytest.fixture
def jobs(stage: Stage) -> ExpiryJobs:
    return ExpiryJobs(stage.database, stage.service, stage.worker().leases._policy, TIMER, "test")


async def job_row(stage: Stage, sandbox_id: UUID):
    rows = await stage.sql("SELECT * FROM expiry_jobs WHERE sandbox_id = $1", sandbox_id)
    return rows[0] if rows else None


async def pass_deadline(stage: Stage, *sandboxes: UUID) -> None:
    """Until the database says that their time is over."""
    query = "SELECT 1 FROM sandboxes WHERE id = ANY($1) AND expires_at > clock_timestamp()"
    async with asyncio.timeout(30):
        while await stage.sql(query, list(sandboxes)):
            await asyncio.sleep(0.02)


async def expirations(stage: Stage) -> dict[UUID, int]:
    rows = await stage.sql("SELECT stream_id, count(*) AS n FROM events WHERE type = 'sandbox.expired' GROUP BY 1")
    return {UUID(int=row["stream_id"].int): row["n"] for row in rows}


async def test_the_job_comes_moves_and_goes_with_the_append(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker, timeout_s=600)
    box = await stage.box(sandbox_id)
    row = await job_row(stage, sandbox_id)
    assert row["expires_at"] == row["next_run_time"] == box.expires_at
    assert box.expires_at is not None
    later = box.expires_at + timedelta(seconds=60)
    outcome = await stage.ask(sandbox_id, cmd.Renew(later))
    row = await job_row(stage, sandbox_id)
    assert (row["expires_at"], row["next_run_time"], row["cause"]) == (later, later, outcome.position)
    await stage.ask(sandbox_id, cmd.Terminate())
    assert await job_row(stage, sandbox_id) is None
    without = await stage.create()
    assert await job_row(stage, without) is None


async def test_a_due_job_expires_and_says_why(stage: Stage, jobs: ExpiryJobs):
    sandbox_id = await stage.running(stage.worker(), timeout_s=1)
    assert await jobs.claim(10) == []
    await pass_deadline(stage, sandbox_id)
    (due,) = await jobs.claim(10)
    assert await jobs.claim(10) == [], "claimed is claimed"
    await jobs.expire(due)
    last = (await stage.history(sandbox_id))[-1]
    assert isinstance(last.event, ev.Expired)
    assert last.at >= last.event.deadline == due.expires_at
    assert last.meta == ev.Meta(TIMER, "test", cause=(await stage.history(sandbox_id))[0].position)
    assert await job_row(stage, sandbox_id) is None
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.TERMINATED


async def test_a_job_that_runs_twice_expires_once(stage: Stage, jobs: ExpiryJobs):
    sandbox_id = await stage.running(stage.worker(), timeout_s=1)
    await pass_deadline(stage, sandbox_id)
    (due,) = await jobs.claim(10)
    await asyncio.gather(*[jobs.expire(due) for _ in range(5)])
    assert await expirations(stage) == {sandbox_id: 1}


async def test_a_renewal_between_claim_and_run_wins(stage: Stage, jobs: ExpiryJobs):
    """The row is claimed too early on purpose, as by a worker whose statement was slow."""
    sandbox_id = await stage.running(stage.worker(), timeout_s=600)
    await stage.sql("UPDATE expiry_jobs SET next_run_time = clock_timestamp()")
    (due,) = await jobs.claim(10)
    later = due.expires_at + timedelta(seconds=60)
    await stage.ask(sandbox_id, cmd.Renew(later))
    await jobs.expire(due)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert (await job_row(stage, sandbox_id))["next_run_time"] == later


async def test_expiring_without_looking_again_would_end_a_renewed_sandbox(stage: Stage, jobs: ExpiryJobs):
    """The naive way of the test above: whoever holds a due job ends the sandbox."""
    sandbox_id = await stage.running(stage.worker(), timeout_s=600)
    await stage.sql("UPDATE expiry_jobs SET next_run_time = clock_timestamp()")
    (due,) = await jobs.claim(10)
    await stage.ask(sandbox_id, cmd.Renew(due.expires_at + timedelta(seconds=60)))
    await stage.service.execute(due.sandbox_id, cmd.Terminate(ev.EndCause.EXPIRED), CLIENT)
    ending = (await stage.box(sandbox_id)).ending
    assert ending is not None
    assert ending.at < due.expires_at, "ended before its time, after a renewal that was answered with success"


async def test_a_claim_whose_worker_was_killed_fires_again(stage: Stage, jobs: ExpiryJobs, until):
    sandbox_id = await stage.running(stage.worker(), timeout_s=1)
    await pass_deadline(stage, sandbox_id)
    assert len(await jobs.claim(10)) == 1  # kill -9 here
    async with stage.working(stage.worker()):
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
    assert await expirations(stage) == {sandbox_id: 1}


async def test_a_claim_that_takes_the_row_away_would_lose_it(stage: Stage, jobs: ExpiryJobs):
    """The naive way of the test above, which is also what a `date` job does."""
    sandbox_id = await stage.running(stage.worker(), timeout_s=1)
    await pass_deadline(stage, sandbox_id)
    await stage.sql("DELETE FROM expiry_jobs WHERE next_run_time <= clock_timestamp()")  # kill -9 here
    await stage.sql("UPDATE expiry_jobs SET next_run_time = clock_timestamp()")
    assert await jobs.claim(10) == []
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_deadlines_that_passed_while_nobody_was_there(stage: Stage, until):
    sandboxes = [await stage.running(stage.worker(), timeout_s=1) for _ in range(20)]
    await pass_deadline(stage, *sandboxes)
    async with stage.working(stage.worker()):
        await until(stage.is_phase(Phase.TERMINATED, *sandboxes))
    assert await expirations(stage) == dict.fromkeys(sandboxes, 1)
    assert not stage.engine.containers


async def test_two_schedulers_expire_each_once(stage: Stage, until):
    """More than two batches, due at one moment."""
    workers = [stage.worker(worker_id=f"w{number}") for number in range(2)]
    sandboxes = await asyncio.gather(*[stage.create(timeout_s=1) for _ in range(450)])
    await pass_deadline(stage, *sandboxes)
    async with stage.working(*workers):

        async def all_closed() -> bool:
            return not await stage.sql("SELECT 1 FROM sandboxes WHERE closed_at IS NULL LIMIT 1")

        await until(all_closed)
    assert await expirations(stage) == dict.fromkeys(sandboxes, 1)
    assert not await stage.sql("SELECT 1 FROM expiry_jobs")
    assert not stage.engine.containers


async def test_a_job_of_no_sandbox_is_dropped(stage: Stage, jobs: ExpiryJobs):
    nobody = uuid4()
    await stage.sql("INSERT INTO expiry_jobs (sandbox_id, expires_at, next_run_time) VALUES ($1, now(), now())", nobody)
    (due,) = await jobs.claim(10)
    await jobs.expire(due)
    assert await job_row(stage, nobody) is None


async def test_a_job_of_a_sandbox_that_has_ended_is_dropped(stage: Stage, jobs: ExpiryJobs):
    sandbox_id = await stage.create()
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.sql(
        "INSERT INTO expiry_jobs (sandbox_id, expires_at, next_run_time) VALUES ($1, now(), now())", sandbox_id
    )
    (due,) = await jobs.claim(10)
    await jobs.expire(due)
    assert await job_row(stage, sandbox_id) is None


async def test_a_job_that_fails_is_handed_back_unless_it_was_renewed(stage: Stage, jobs: ExpiryJobs, monkeypatch):
    sandbox_id = await stage.create(timeout_s=600)
    await stage.sql("UPDATE expiry_jobs SET next_run_time = clock_timestamp()")
    (due,) = await jobs.claim(10)

    async def refused(*_: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(stage.service.view, "load", refused)
        await jobs.expire(due)
        soon = (await job_row(stage, sandbox_id))["next_run_time"]
        assert soon < due.leased_until
    await stage.sql("UPDATE expiry_jobs SET next_run_time = clock_timestamp()")
    (due,) = await jobs.claim(10)
    later = due.expires_at + timedelta(seconds=60)
    await stage.ask(sandbox_id, cmd.Renew(later))
    with monkeypatch.context() as patched:
        patched.setattr(stage.service.view, "load", refused)
        await jobs.expire(due)
    assert (await job_row(stage, sandbox_id))["next_run_time"] == later


class Thread:
    """The place of APScheduler's thread: asks a store from outside of the loop."""

    def __init__(self, jobs: ExpiryJobs) -> None:
        self.timers = Timers(4)
        self.store = ExpiryJobStore(jobs, self.timers.bridge, self.timers.executor, 2)
        self.timers.add_store("expiry", self.store)
        self.store.start(self.timers._scheduler, "expiry")

    async def ask(self, question, *arguments):
        return await asyncio.to_thread(getattr(self.store, question), *arguments)


async def test_the_local_clock_does_not_count(stage: Stage, jobs: ExpiryJobs):
    """What the database calls due is run now, be the local clock an hour behind or ahead."""
    thread = Thread(jobs)
    for hours in (-1, 0, 1):
        sandbox_id = await stage.create(timeout_s=600)
        await stage.sql("UPDATE expiry_jobs SET next_run_time = clock_timestamp()")
        now = datetime.now(UTC) + timedelta(hours=hours)
        (job,) = await thread.ask("get_due_jobs", now)
        assert isinstance(job, Job)
        assert job.id == str(sandbox_id)
        assert job._get_run_times(now) == [now]
        assert job.trigger.get_next_fire_time(now, now) > now, "so APScheduler keeps it"
        await stage.sql("DELETE FROM expiry_jobs")
    await stage.create(timeout_s=600)
    assert await thread.ask("get_due_jobs", datetime.now(UTC) + timedelta(days=1)) == []


async def test_the_next_look_is_soon_and_never_long_ago(stage: Stage, jobs: ExpiryJobs):
    thread = Thread(jobs)

    async def wait() -> float:
        before = datetime.now(UTC)
        return ((await thread.ask("get_next_run_time")) - before).total_seconds()

    assert await wait() >= 1.0, "nothing stored: others may add rows"
    await stage.create(timeout_s=600)
    assert await wait() >= 1.0, "as far away as it may be"
    await stage.sql("UPDATE expiry_jobs SET next_run_time = clock_timestamp() - interval '1 day'")
    assert await wait() >= 0.05, "due and not found: somebody else has it locked, so do not spin"
    assert len(await thread.ask("get_due_jobs", datetime.now(UTC))) == 1
    assert await wait() >= 0.0


async def test_the_store_behaves_like_a_job_store(stage: Stage, jobs: ExpiryJobs):
    thread = Thread(jobs)
    sandbox_id = await stage.create(timeout_s=600)
    other = await stage.create(timeout_s=300)
    job = await thread.ask("lookup_job", str(sandbox_id))
    assert (job.id, job.misfire_grace_time, job.coalesce, job.max_instances) == (str(sandbox_id), None, True, 1)
    assert await thread.ask("lookup_job", str(uuid4())) is None
    assert [job.id for job in await thread.ask("get_all_jobs")] == [str(other), str(sandbox_id)]
    before = await job_row(stage, sandbox_id)
    await thread.ask("update_job", job)
    assert await job_row(stage, sandbox_id) == before
    for question, argument in (("add_job", (job,)), ("remove_all_jobs", ())):
        with pytest.raises(NotImplementedError):
            await thread.ask(question, *argument)
    for _ in range(2):
        await thread.ask("remove_job", str(other))
    assert await job_row(stage, other) is None


async def test_no_question_raises_whatever_happens_to_the_database(stage: Stage, jobs: ExpiryJobs):
    thread = Thread(jobs)
    sandbox_id = await stage.create(timeout_s=600)
    async with stage.locked("expiry_jobs"):
        asking = asyncio.create_task(thread.ask("get_due_jobs", datetime.now(UTC)))
        await stage.blocked()
        await stage.cut_connections()
        assert await asking == []
        asking = asyncio.create_task(thread.ask("get_next_run_time"))
        await stage.blocked()
        await stage.cut_connections()
        assert await asking > datetime.now(UTC)
        asking = asyncio.create_task(thread.ask("lookup_job", str(sandbox_id)))
        await stage.blocked()
        thread.timers.bridge.close()
        assert await asking is None
    assert await thread.ask("get_due_jobs", datetime.now(UTC)) == [], "closed is closed"


async def test_the_scheduler_outlives_the_database(stage: Stage, until):
    worker = stage.worker()
    async with stage.working(worker):
        for _ in range(3):
            async with stage.locked("expiry_jobs"):
                await stage.blocked()
                await stage.cut_connections()
        sandbox_id = None
        async with asyncio.timeout(30):
            while sandbox_id is None:
                with suppress(StoreUnavailable):
                    sandbox_id = await stage.create(timeout_s=1)
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        assert worker.alive


async def test_a_stop_waits_for_no_answer(stage: Stage):
    """The thread asks the loop while the loop wants the thread to end."""
    worker = stage.worker()
    running = asyncio.create_task(worker.run())
    async with stage.locked("expiry_jobs"):
        await stage.blocked()
        await worker.stop(0)
        async with asyncio.timeout(30):
            await running


async def test_a_loop_that_ends_without_a_stop_does_not_hang(stage: Stage):
    """`asyncio.run` of a whole worker in a thread of its own, left by an exception."""

    def whole_process() -> None:
        async def main() -> None:
            database = Database(stage.dsn)
            signal = Signal(database)
            worker = Stage(stage.dsn, database, Service(database, signal), signal, stage.sealer).worker()
            working = asyncio.create_task(worker.run())
            async with asyncio.timeout(30):
                while not worker.alive:
                    await asyncio.sleep(0.01)
            assert not working.done()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            asyncio.run(main())

    await asyncio.wait_for(asyncio.to_thread(whole_process), 60)


async def test_partitions_are_kept_ahead(stage: Stage, until):
    async def made() -> bool:
        return len(await stage.sql("SELECT 1 FROM pg_inherits WHERE inhparent = 'events'::regclass")) > 3

    assert not await made()
    await stage.sql("SELECT setval('events_position', 25000001)")
    async with stage.working(stage.worker()):
        await until(made)


async def test_due_jobs_are_found_by_index(stage: Stage):
    connection = await asyncpg.connect(stage.dsn)
    try:
        await connection.execute(
            "INSERT INTO expiry_jobs (sandbox_id, expires_at, next_run_time) SELECT gen_random_uuid(), t, t"
            " FROM (SELECT clock_timestamp() + make_interval(secs => n - 10) AS t FROM generate_series(1, 20000) n) x"
        )
        await connection.execute("ANALYZE expiry_jobs")
        for mode in ("force_custom_plan", "force_generic_plan"):
            await connection.execute(f"SET plan_cache_mode = {mode}")
            for statement, values in ((CLAIM, {"limit": 200, "lease": 30.0}), (EARLIEST, {})):
                rows = await connection.fetch("EXPLAIN " + statement.sql, *statement.arguments(values))
                plan = "\n".join(row[0] for row in rows)
                assert "expiry_jobs_due" in plan
                assert "Seq Scan on expiry_jobs" not in plan
    finally:
        await connection.close()


async def test_renewals_race_two_schedulers(stage: Stage, until):
    """A 200 is never followed by an expiry before its time, and nothing lives on after it."""
    dice = random.Random(20260301)
    accepted: dict[UUID, list[datetime]] = {}
    refused = 0

    async def client(sandbox_id: UUID) -> None:
        nonlocal refused
        deadline = (await stage.box(sandbox_id)).expires_at
        assert deadline is not None
        accepted[sandbox_id] = [deadline]
        for _ in range(3):
            aim = deadline + timedelta(seconds=dice.uniform(-0.03, 0.03))
            await asyncio.sleep(max(0.0, (aim - datetime.now(UTC)).total_seconds()))
            wanted = datetime.now(UTC) + timedelta(seconds=dice.uniform(0.3, 0.6))
            try:
                box = (await stage.ask(sandbox_id, cmd.Renew(wanted))).sandbox
            except Rejected:
                refused += 1
                return
            assert box.expires_at is not None
            deadline = box.expires_at
            accepted[sandbox_id].append(deadline)

    workers = [stage.worker(worker_id=f"w{number}") for number in range(2)]
    async with stage.working(*workers):
        clients = [asyncio.create_task(client(await stage.create(timeout_s=1))) for _ in range(300)]
        await asyncio.gather(*clients)
        sandboxes = list(accepted)

        async def all_closed() -> bool:
            return not await stage.sql("SELECT 1 FROM sandboxes WHERE closed_at IS NULL LIMIT 1")

        await until(all_closed)
    renewed = sum(len(times) - 1 for times in accepted.values())
    assert renewed > 50
    assert refused > 50, "no race was lost: the test has no power"
    for sandbox_id in sandboxes:
        ends = [fact for fact in await stage.history(sandbox_id) if isinstance(fact.event, ev.Expired)]
        assert len(ends) == 1
        assert isinstance(ends[0].event, ev.Expired)
        assert ends[0].event.deadline == accepted[sandbox_id][-1]
        assert ends[0].at >= accepted[sandbox_id][-1]
        assert ends[0].at < accepted[sandbox_id][-1] + timedelta(seconds=5)
