"""What happens when a step does not work."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from uuid import UUID

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.observed import Power
from app.domain.sandbox.plan import Ensure, Remove, SetPower
from app.domain.sandbox.state import Phase
from app.errors import RuntimeRejected, RuntimeUnavailable, StoreUnavailable
from app.runtime.faults import AttemptFailed, ImagePullFailed
from app.work.policy import WorkPolicy
from app.work.reconcile.troubles import Trouble, backoff, describe, is_reported
from tests.work.stage import ADOPTED, BEGUN, Gate, Raiser, Stage

PULL = ImagePullFailed("REGISTRY_RATE_LIMITED", "too many requests")


async def turns(stage: Stage, worker, sandbox_id, number: int) -> None:
    """So many runs with their pulls, whatever wait stands between them."""
    for _ in range(number):
        await stage.make_due(sandbox_id)
        assert await stage.turn(worker)
        await stage.land(worker)


def retries(facts: list[ev.Recorded]) -> list[ev.ReconcileFailed]:
    return [fact.event for fact in facts if isinstance(fact.event, ev.ReconcileFailed)]


def test_back_off_is_full_jitter_up_to_a_limit_that_doubles():
    policy = WorkPolicy()
    for attempt, most in ((1, 1), (2, 2), (5, 16), (9, 256), (10, 300), (10_000, 300)):
        waits = [backoff(Ensure(), attempt, policy) for _ in range(300)]
        assert 0 <= min(waits) < most * 0.2
        assert most * 0.8 < max(waits) <= most
    assert max(backoff(Remove(), 50, WorkPolicy(removal_retry_max=5)) for _ in range(50)) <= 5


def test_an_event_when_the_reason_changes_and_at_1_3_and_10():
    assert [attempt for attempt in range(1, 40) if is_reported("X", attempt, "X")] == [1, 3, 10]
    assert is_reported("X", 5, "Y")
    assert not is_reported("X", 5, "RUNTIME_UNAVAILABLE"), "the engine was away in between"


def test_what_we_did_not_raise_is_not_quoted():
    assert describe(Ensure(), PULL) == Trouble("ensure", "REGISTRY_RATE_LIMITED", "too many requests")
    assert describe(SetPower(Power.PAUSED), RuntimeRejected("NO_FREEZER", "x")).reason == "NO_FREEZER"
    unexpected = describe(Ensure(), ValueError("TOKEN=s3cret"))
    assert unexpected.reason == "INTERNAL_ERROR"
    assert "ValueError" in unexpected.message
    assert "s3cret" not in unexpected.message


async def test_an_engine_that_is_not_there_counts_nothing_fails_nothing_and_is_told_nowhere(stage: Stage):
    sandbox_id = await stage.create()
    worker = stage.worker()
    await worker.station.contact()
    stage.engine.down = True
    for _ in range(15):
        await stage.make_due(sandbox_id)
        (claim,) = (await worker.queue.claim(1, lease=30, tenant_slots=1)).claims
        await stage.run(worker, claim)
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["first_failed_at"], row["last_reason"]) == (0, None, "RUNTIME_UNAVAILABLE")
    assert "down" in row["last_error"]
    assert await stage.told(sandbox_id) == ["requested", "placed"]
    assert worker.station.open
    stage.engine.down = False
    await worker.station.contact()
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_a_worker_waits_for_the_engine_and_goes_on_by_itself(stage: Stage, until):
    worker = stage.worker()
    running = await stage.running(worker)
    stage.engine.down = True
    await worker.station.contact()
    async with stage.working(worker):
        fresh = [await stage.create() for _ in range(5)]
        await stage.ask(running, cmd.Terminate())
        asked = stage.engine.calls["version"]

        async def asked_again() -> bool:
            return worker.station.open and stage.engine.calls["version"] > asked + 3

        await until(asked_again)
        assert stage.engine.calls["create"] == 1, "nothing is claimed while the engine is away"
        stage.engine.down = False
        await until(stage.is_phase(Phase.RUNNING, *fresh))
        await until(stage.is_phase(Phase.TERMINATED, running))
    for sandbox_id in fresh:
        assert await stage.told(sandbox_id) == BEGUN


async def test_an_engine_that_answers_500_to_one_call_stops_nobody_else(stage: Stage, until):
    """Pulls fail as the engine's trouble, but it says who it is: the station stays open, no count, longer waits."""
    broken = Raiser(lambda: RuntimeUnavailable("500"), "pull")
    stage.pull("big")
    worker = stage.worker(stage.driver(before=broken))
    async with stage.working(worker):
        waiting = await stage.create(image="big")

        async def tried() -> bool:
            return broken.raised >= 4

        await until(tried)
        other = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, other))
        assert not worker.station.open
        assert set(await stage.told(waiting)) == {"requested", "placed", "waiting", "reconcile_failed"}
        broken.armed = False
        await until(stage.is_phase(Phase.RUNNING, waiting))


@pytest.mark.parametrize("call", ["pull", "create"])
async def test_counted_failures_are_told_thinly_and_forgotten_with_success(stage: Stage, call: str):
    trouble = Raiser(lambda: PULL, call)
    stage.pull("big")
    sandbox_id = await stage.create(image="big")
    worker = stage.worker(stage.driver(before=trouble))
    await turns(stage, worker, sandbox_id, 12)
    told = retries(await stage.history(sandbox_id))
    assert [event.attempt for event in told] == [1, 3, 10]
    assert {event.reason for event in told} == {"REGISTRY_RATE_LIMITED"}
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["last_reason"], row["last_error"]) == (12, PULL.reason, PULL.message)
    trouble.error = lambda: AttemptFailed("REGISTRY_UNREACHABLE", "no such host")
    await turns(stage, worker, sandbox_id, 1)
    last = retries(await stage.history(sandbox_id))[-1]
    step = {"pull": "fetch", "create": "ensure"}[call]
    assert (last.reason, last.attempt, last.step) == ("REGISTRY_UNREACHABLE", 13, step)
    trouble.armed = False
    await turns(stage, worker, sandbox_id, 1)
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert await stage.row(sandbox_id) is None


async def test_a_flapping_engine_between_failures_makes_no_events(stage: Stage):
    pull = Raiser(lambda: PULL, "pull")
    stage.pull("big")
    sandbox_id = await stage.create(image="big")
    worker = stage.worker(stage.driver(before=pull))
    for number in range(8):
        pull.error = (lambda: PULL) if number % 2 == 0 else (lambda: RuntimeUnavailable("500"))
        await turns(stage, worker, sandbox_id, 1)
    assert [event.attempt for event in retries(await stage.history(sandbox_id))] == [1, 3]


async def test_no_number_of_failures_ends_a_sandbox_but_its_deadline_does_and_says_why(stage: Stage):
    trouble = Raiser(lambda: AttemptFailed("START_FAILED", "no space left"), "create")
    sandbox_id = await stage.create()
    worker = stage.worker(stage.driver(before=trouble))
    await turns(stage, worker, sandbox_id, 25)
    await stage.sql("UPDATE reconcile_queue SET first_failed_at = first_failed_at - interval '30 days'")
    await turns(stage, worker, sandbox_id, 1)
    assert await stage.phase(sandbox_id) is Phase.PENDING
    await end_transition(stage, sandbox_id)
    sandbox = await stage.sandbox(sandbox_id)
    assert sandbox.failure is not None
    assert sandbox.failure.reason == "PROVISIONING_TIMEOUT"
    assert "START_FAILED (no space left)" in sandbox.failure.message
    await stage.settle(worker)
    assert (await stage.told(sandbox_id))[-2:] == ["failed", "runtime_removed"]
    assert await stage.row(sandbox_id) is None


async def test_a_create_that_always_answers_500_ends_by_its_deadline(stage: Stage):
    """The engine is well, so nothing is counted; the sandbox must not be Pending for ever."""
    trouble = Raiser(lambda: RuntimeUnavailable("500: no space left on device"), "create")
    sandbox_id = await stage.create()
    worker = stage.worker(stage.driver(before=trouble))
    await turns(stage, worker, sandbox_id, 12)
    assert (await stage.row(sandbox_id))["attempts"] == 0
    await end_transition(stage, sandbox_id)
    failure = (await stage.sandbox(sandbox_id)).failure
    assert failure is not None
    assert (failure.step, failure.reason) == ("ensure", "PROVISIONING_TIMEOUT")
    assert "RUNTIME_UNAVAILABLE (500: no space left on device)" in failure.message


async def end_transition(stage: Stage, sandbox_id: UUID) -> None:
    """As the scheduler does it when the deadline has passed."""
    row = await stage.row(sandbox_id)
    now = Limits(0, 0, 0, 0)
    await stage.ask(sandbox_id, cmd.EndTransition(now, row["last_reason"], row["last_error"]))


@pytest.mark.parametrize("verb", ["pause", "unpause"])
async def test_a_pause_or_resume_that_the_engine_refuses_for_good_costs_nothing_but_itself(stage: Stage, verb: str):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    if verb == "unpause":
        await stage.ask(sandbox_id, cmd.Pause())
        await stage.settle(worker)
    before = await stage.phase(sandbox_id)
    stage.engine.refusals[verb] = RuntimeRejected("PAUSE_UNSUPPORTED", "no freezer here")
    await stage.ask(sandbox_id, cmd.Pause() if verb == "pause" else cmd.Resume())
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is before
    last = (await stage.history(sandbox_id))[-1].event
    assert isinstance(last, ev.PauseFailed | ev.ResumeFailed)
    assert (last.reason, last.message) == ("PAUSE_UNSUPPORTED", "no freezer here")
    assert await stage.row(sandbox_id) is None
    stage.engine.refusals.clear()
    await stage.ask(sandbox_id, cmd.Pause() if verb == "pause" else cmd.Resume())
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is not before


@pytest.mark.parametrize("verb", ["pause", "unpause"])
async def test_one_that_does_not_work_now_is_repeated_until_its_deadline(stage: Stage, verb: str):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    if verb == "unpause":
        await stage.ask(sandbox_id, cmd.Pause())
        await stage.settle(worker)
    before = await stage.phase(sandbox_id)
    stage.engine.refusals[verb] = AttemptFailed("CGROUP_BUSY", "device or resource busy")
    await stage.ask(sandbox_id, cmd.Pause() if verb == "pause" else cmd.Resume())
    await turns(stage, worker, sandbox_id, 30)
    assert (await stage.row(sandbox_id))["attempts"] == 30
    assert stage.container(sandbox_id) is not None
    await end_transition(stage, sandbox_id)
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is before
    last = (await stage.history(sandbox_id))[-1].event
    assert isinstance(last, ev.PauseFailed | ev.ResumeFailed)
    assert "CGROUP_BUSY (device or resource busy)" in last.message
    assert await stage.row(sandbox_id) is None


async def test_a_look_that_fails_kills_nothing(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    blind = stage.worker(stage.driver(before=Raiser(lambda: KeyError("x"), "inspect")))
    await blind.queue.enqueue([sandbox_id])
    await turns(stage, blind, sandbox_id, 3)
    await stage.sql("UPDATE reconcile_queue SET first_failed_at = first_failed_at - interval '1 day', attempts = 100")
    await turns(stage, blind, sandbox_id, 3)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert stage.container(sandbox_id) is not None
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert await stage.row(sandbox_id) is None


async def test_what_a_newer_version_wrote_is_left_alone(stage: Stage, caplog):
    sandbox_id = await stage.create()
    await stage.sql("ALTER TABLE sandboxes DISABLE TRIGGER check_phase")
    await stage.sql("UPDATE sandboxes SET schema = 99")
    worker = stage.worker()
    with caplog.at_level(logging.WARNING):
        await turns(stage, worker, sandbox_id, 4)
    assert sum("newer version" in record.message for record in caplog.records) == 1
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["last_reason"], row["lease_owner"]) == (0, None, None)
    assert await stage.sql("SELECT 1 FROM reconcile_queue WHERE due_at <= clock_timestamp()"), "for the newer workers"
    assert stage.engine.calls["create"] == 0
    await stage.sql("UPDATE sandboxes SET schema = 1")
    await stage.make_due(sandbox_id)
    await stage.settle(stage.worker())
    assert await stage.told(sandbox_id) == BEGUN


@pytest.mark.parametrize("fails", ["remove", "inspect"])
async def test_a_removal_never_gives_up_and_says_so_each_time(stage: Stage, fails: str, caplog):
    sandbox_id = await stage.running(stage.worker())
    await stage.ask(sandbox_id, cmd.Terminate())
    stuck = Raiser(lambda: AttemptFailed("DEVICE_BUSY", "the volume is busy"), fails)
    worker = stage.worker(stage.driver(before=stuck), removal_retry_max=7)
    with caplog.at_level(logging.WARNING):
        await turns(stage, worker, sandbox_id, 3)
        await stage.sql("UPDATE reconcile_queue SET first_failed_at = first_failed_at - interval '30 days'")
        await turns(stage, worker, sandbox_id, 20)
    assert sum("removal of sandbox" in record.message for record in caplog.records) == 23
    row = await stage.row(sandbox_id)
    assert row["attempts"] == 23
    assert await stage.sql("SELECT 1 FROM reconcile_queue WHERE due_at < clock_timestamp() + interval '7 s'")
    sandbox = await stage.sandbox(sandbox_id)
    assert (sandbox.phase, sandbox.failure) == (Phase.STOPPING, None)
    assert [event.attempt for event in retries(await stage.history(sandbox_id))] == [1, 3, 10]
    stuck.armed = False
    await turns(stage, worker, sandbox_id, 1)
    assert await stage.phase(sandbox_id) is Phase.TERMINATED
    assert stage.container(sandbox_id) is None


async def test_a_database_that_goes_away_under_a_run_is_no_attempt(stage: Stage, until):
    """Nothing can be said, so nothing is; the lease brings it back and what was made is adopted."""
    sandbox_id = await stage.create()
    gate = Gate("inspect")
    worker = stage.worker(stage.driver(before=gate))
    claim = (await worker.queue.claim(1, lease=30, tenant_slots=1)).claims[0]
    run = asyncio.create_task(stage.run(worker, claim))
    await gate.reached.wait()
    async with stage.locked("sandboxes"):
        gate.open.set()
        await stage.blocked()  # the record is under way
        await stage.cut_connections()
        await run
    assert (await stage.row(sandbox_id))["lease_owner"] == claim.owner
    assert (await stage.row(sandbox_id))["attempts"] == 0

    async def goes_on() -> bool:
        await stage.make_overdue(sandbox_id)
        with suppress(StoreUnavailable):  # the pool meets its dead connections one by one
            await stage.settle(stage.worker())
            return await stage.phase(sandbox_id) is Phase.RUNNING
        return False

    await until(goes_on)
    assert await stage.told(sandbox_id) == ADOPTED
    assert stage.engine.calls["start"] == 1
