"""What happens when a step does not work."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from uuid import uuid4

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Power
from app.domain.sandbox.plan import Ensure, Observe, Remove, SetPower
from app.domain.sandbox.state import Phase
from app.errors import RuntimeRejected, RuntimeUnavailable, StoreUnavailable
from app.runtime.faults import AttemptFailed, ImagePullFailed
from app.work.policy import WorkPolicy
from app.work.reconcile.troubles import Breaker, Trouble, backoff, describe, is_hopeless, is_told
from tests.work.stage import Gate, Raiser, Stage

PULL = ImagePullFailed("REGISTRY_RATE_LIMITED", "too many requests")


async def turns(stage: Stage, worker, sandbox_id, number: int) -> None:
    """So many runs, whatever wait stands between them."""
    for _ in range(number):
        await stage.make_due(sandbox_id)
        assert await stage.turn(worker)


def retries(facts: list[ev.Recorded]) -> list[ev.ReconcileFailed]:
    return [fact.event for fact in facts if isinstance(fact.event, ev.ReconcileFailed)]


def test_back_off_is_full_jitter_up_to_a_limit_that_doubles():
    policy = WorkPolicy()
    for attempt, most in ((1, 1), (2, 2), (5, 16), (9, 256), (10, 300), (10_000, 300)):
        waits = [backoff(Ensure(), attempt, policy) for _ in range(300)]
        assert 0 <= min(waits) < most * 0.2
        assert most * 0.8 < max(waits) <= most
    assert max(backoff(Remove(), 50, WorkPolicy(removal_retry_max=5)) for _ in range(50)) <= 5


def test_an_event_when_the_code_changes_and_at_1_3_and_10():
    same = Trouble("ensure", "X", "")
    told = [attempt for attempt in range(1, 40) if is_told(same, attempt, "X")]
    assert told == [1, 3, 10]
    assert is_told(same, 5, "Y")


def test_hopeless_needs_attempts_and_time_and_something_that_may_be_given_up():
    policy = WorkPolicy()
    for step in (Ensure(), SetPower(Power.PAUSED)):
        assert is_hopeless(step, 10, 900, policy)
        assert not is_hopeless(step, 9, 9000, policy)
        assert not is_hopeless(step, 90, 899, policy)
    assert not is_hopeless(Remove(), 10_000, 1e9, policy)
    assert not is_hopeless(Observe(), 10_000, 1e9, policy)


def test_what_we_did_not_raise_is_not_quoted():
    assert describe(Ensure(), PULL) == Trouble("ensure", "REGISTRY_RATE_LIMITED", "too many requests")
    assert describe(SetPower(Power.PAUSED), RuntimeRejected("NO_FREEZER", "x")).code == "NO_FREEZER"
    unexpected = describe(Ensure(), ValueError("TOKEN=s3cret"))
    assert unexpected.code == "INTERNAL_ERROR"
    assert "ValueError" in unexpected.message
    assert "s3cret" not in unexpected.message


async def test_an_engine_that_is_not_there_counts_nothing_fails_nothing_and_is_told_nowhere(stage: Stage):
    sandbox_id = await stage.create()
    worker = stage.worker()
    stage.engine.down = True
    await turns(stage, worker, sandbox_id, 15)
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["first_failed_at"], row["last_reason"]) == (0, None, None)
    assert row["last_error"].startswith("RUNTIME_UNAVAILABLE")
    assert await stage.told(sandbox_id) == ["requested"]
    assert worker.station.open
    stage.engine.down = False
    await worker.station.recover()
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_a_worker_waits_for_the_engine_and_goes_on_by_itself(stage: Stage, until):
    worker = stage.worker()
    running = await stage.running(worker)
    stage.engine.down = True
    async with stage.working(worker):
        fresh = [await stage.create() for _ in range(5)]
        await stage.ask(running, cmd.Terminate())
        asked = stage.engine.calls["version"]

        async def asked_again() -> bool:
            return worker.station.open and stage.engine.calls["version"] > asked + 3

        await until(asked_again)
        creates = stage.engine.calls["create"]
        await until(asked_again)
        assert stage.engine.calls["create"] == creates, "nothing is claimed while the breaker is open"
        stage.engine.down = False
        await until(stage.is_phase(Phase.RUNNING, *fresh))
        await until(stage.is_phase(Phase.TERMINATED, running))
    for sandbox_id in fresh:
        assert await stage.told(sandbox_id) == ["requested", "runtime_created", "started"]


async def test_an_engine_that_answers_500_to_one_call_stops_nobody_else(stage: Stage, until):
    """Creates fail as the engine's trouble, but it says who it is: no breaker, no count, longer waits."""
    broken = Raiser(lambda: RuntimeUnavailable("500"), "pull")
    stage.engine.to_pull.add("big")
    worker = stage.worker(stage.driver(before=broken))
    async with stage.working(worker):
        waiting = await stage.create(image="big")

        async def tried() -> bool:
            return broken.raised >= 4

        await until(tried)
        other = await stage.create()
        await until(stage.is_phase(Phase.RUNNING, other))
        assert not worker.station.open
        assert set(await stage.told(waiting)) == {"requested", "reconcile_failed"}
        broken.armed = False
        await until(stage.is_phase(Phase.RUNNING, waiting))


async def test_waits_for_the_engine_grow_and_end_with_success(stage: Stage):
    breaker = Breaker(stage.driver(), WorkPolicy(breaker_base=1, breaker_max=30))
    sandbox_id = uuid4()
    waits = [await breaker.suspect(sandbox_id) for _ in range(8)]
    assert all(2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits[:5]))
    assert all(15 <= wait <= 30 for wait in waits[5:])
    breaker.well(sandbox_id)
    assert await breaker.suspect(sandbox_id) <= 1
    assert not breaker.open


async def test_the_breaker_asks_no_more_than_its_waits_allow(stage: Stage):
    stage.engine.down = True
    breaker = Breaker(stage.driver(), WorkPolicy(breaker_base=1000, breaker_max=2000))
    for _ in range(5):
        assert await breaker.suspect(uuid4()) <= 1000
        await breaker.recover()
    assert stage.engine.calls["version"] == 1
    assert breaker.open
    assert 0 < breaker.wait <= 1000


async def test_counted_failures_are_told_thinly_and_forgotten_with_success(stage: Stage):
    pull = Raiser(lambda: PULL, "pull")
    stage.engine.to_pull.add("big")
    sandbox_id = await stage.create(image="big")
    worker = stage.worker(stage.driver(before=pull), poison_attempts=1000)
    await turns(stage, worker, sandbox_id, 12)
    told = retries(await stage.history(sandbox_id))
    assert [event.attempt for event in told] == [1, 3, 10]
    assert {event.code for event in told} == {"REGISTRY_RATE_LIMITED"}
    assert (await stage.row(sandbox_id))["attempts"] == 12
    pull.error = lambda: AttemptFailed("REGISTRY_UNREACHABLE", "no such host")
    await turns(stage, worker, sandbox_id, 1)
    last = retries(await stage.history(sandbox_id))[-1]
    assert (last.code, last.attempt, last.step) == ("REGISTRY_UNREACHABLE", 13, "ensure")
    pull.armed = False
    await turns(stage, worker, sandbox_id, 1)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert await stage.row(sandbox_id) is None


async def test_a_flapping_engine_between_failures_makes_no_events(stage: Stage):
    pull = Raiser(lambda: PULL, "pull")
    stage.engine.to_pull.add("big")
    sandbox_id = await stage.create(image="big")
    worker = stage.worker(stage.driver(before=pull), poison_attempts=1000)
    for number in range(8):
        pull.error = (lambda: PULL) if number % 2 == 0 else (lambda: RuntimeUnavailable("500"))
        await turns(stage, worker, sandbox_id, 1)
    assert [event.attempt for event in retries(await stage.history(sandbox_id))] == [1, 3]


async def test_a_sandbox_is_given_up_after_attempts_and_time(stage: Stage):
    pull = Raiser(lambda: PULL, "pull")
    stage.engine.to_pull.add("big")
    sandbox_id = await stage.create(image="big")
    worker = stage.worker(stage.driver(before=pull))
    await turns(stage, worker, sandbox_id, 12)
    assert await stage.phase(sandbox_id) is Phase.PENDING, "attempts alone are not enough"
    await stage.sql("UPDATE reconcile_queue SET first_failed_at = first_failed_at - interval '15 minutes'")
    await turns(stage, worker, sandbox_id, 1)
    sandbox = await stage.sandbox(sandbox_id)
    assert sandbox.failure is not None
    assert sandbox.failure.reason == "RECONCILE_EXHAUSTED"
    assert "13 attempts" in sandbox.failure.message
    assert "REGISTRY_RATE_LIMITED: too many requests" in sandbox.failure.message
    assert (await stage.told(sandbox_id))[-2:] == ["failed", "runtime_removed"]
    assert await stage.row(sandbox_id) is None


async def test_time_alone_gives_nothing_up(stage: Stage):
    stage.engine.to_pull.add("big")
    sandbox_id = await stage.create(image="big")
    worker = stage.worker(stage.driver(before=Raiser(lambda: PULL, "pull")))
    await turns(stage, worker, sandbox_id, 1)
    await stage.sql("UPDATE reconcile_queue SET first_failed_at = first_failed_at - interval '1 day'")
    await turns(stage, worker, sandbox_id, 8)
    assert await stage.phase(sandbox_id) is Phase.PENDING
    await turns(stage, worker, sandbox_id, 1)
    assert await stage.phase(sandbox_id) is Phase.FAILED


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
    assert await stage.told(sandbox_id) == ["requested", "runtime_adopted", "started"]
    assert stage.engine.calls["start"] == 1
