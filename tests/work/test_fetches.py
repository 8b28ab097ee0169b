"""Pulls outside the slots: shared, fair, visible, and never in the way of anybody."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase
from app.domain.sandbox.status import status_of
from app.errors import RuntimeRejected
from app.runtime.faults import ImagePullFailed
from app.store.vault.seal import Secrets
from app.work.worker import Worker
from tests.work.stage import ENDED, Gate, Stage

LANDED = ["requested", "placed", "waiting", "fetched", "runtime_created", "started", "ready"]


async def pulling(stage: Stage, worker: Worker, **details) -> UUID:
    """A sandbox whose pull is under way; its claim was given back."""
    sandbox_id = await stage.create(**details)
    await stage.turn(worker)
    return sandbox_id


async def test_a_pull_holds_no_claim_and_says_how_far_it_is(stage: Stage):
    gate = asyncio.Event()
    stage.pull("big", progress=("3 of 7 layers, 41.2 of 120.0 MB",), gate=gate)
    worker = stage.worker()
    sandbox_id = await pulling(stage, worker, image="big")
    row = await stage.row(sandbox_id)
    assert (row["lease_owner"], row["attempts"]) == (None, 0)
    assert await stage.told(sandbox_id) == ["requested", "placed", "waiting"]
    while stage.engine.calls["pull"] == 0:
        await asyncio.sleep(0.001)
    await worker.fetches.beat()
    sandbox = await stage.sandbox(sandbox_id)
    status = status_of(sandbox, await stage.service.view.attempt(sandbox))
    assert status.reason == "IMAGE_PULLING"
    assert status.message == "Image big is being pulled. 3 of 7 layers, 41.2 of 120.0 MB."
    gate.set()
    await stage.settle(worker)
    assert await stage.told(sandbox_id) == LANDED
    fetched = (await stage.history(sandbox_id))[3].event
    assert isinstance(fetched, ev.Fetched)
    assert not fetched.cached
    assert stage.engine.calls["pull"] == 1
    assert await stage.row(sandbox_id) is None


async def test_one_pull_serves_all_that_want_the_image(stage: Stage):
    gate = asyncio.Event()
    stage.pull("big", gate=gate)
    worker = stage.worker()
    sandboxes = [await pulling(stage, worker, image="big", tenant=f"t{number}") for number in range(4)]
    gate.set()
    await stage.settle(worker)
    assert stage.engine.calls["pull"] == 1
    for number, sandbox_id in enumerate(sandboxes):
        assert await stage.told(sandbox_id, f"t{number}") == LANDED


async def test_other_credentials_are_another_pull(stage: Stage):
    """What one may pull says nothing about what another may."""
    stage.pull("private", gate=asyncio.Event())
    worker = stage.worker()
    for password in ("a", "b"):
        await pulling(stage, worker, image="private", secrets=Secrets({}, "me", password))
    assert len(worker.fetches._flights) == 2
    await worker.fetches.close()


@pytest.mark.parametrize("ends", ["delete", "expiry"])
async def test_what_ends_during_its_pull_is_gone_at_once_and_nobody_pulls_on(stage: Stage, ends: str, until):
    stage.pull("big", gate=asyncio.Event())
    async with stage.working(stage.worker()) as _:
        sandbox_id = await stage.create(image="big", timeout_s=1 if ends == "expiry" else None)
        if ends == "delete":
            await until(stage.is_told(sandbox_id, "waiting"))
            await stage.ask(sandbox_id, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))
        await until(stage.is_idle())
    assert (await stage.told(sandbox_id))[-2:] == ENDED[-2:]
    assert not stage.engine.containers


async def test_a_pull_that_nobody_waits_for_is_cancelled(stage: Stage):
    stage.pull("big", gate=asyncio.Event())
    worker = stage.worker()
    one, other = [await pulling(stage, worker, image="big") for _ in range(2)]
    await stage.ask(one, cmd.Terminate())
    await stage.turn(worker)
    assert worker.fetches.busy, "the other one still waits"
    await stage.ask(other, cmd.Terminate())
    await stage.turn(worker)
    assert not worker.fetches.busy


async def test_a_pull_whose_sandbox_another_worker_has_ended_is_cancelled_too(stage: Stage):
    stage.pull("big", gate=asyncio.Event())
    worker = stage.worker()
    sandbox_id = await pulling(stage, worker, image="big")
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.turn(stage.worker(worker_id="other"))
    assert worker.fetches.busy
    await worker.fetches.beat()
    assert not worker.fetches.busy


async def test_a_delete_during_a_pull_survives_a_database_hiccup(stage: Stage, until):
    """What had been noticed before the hiccup used to be forgotten after it, until the pull ended."""
    stage.pull("big", gate=asyncio.Event())
    async with stage.working(stage.worker()):
        sandbox_id = await stage.create(image="big")
        await until(stage.is_told(sandbox_id, "waiting"))
        async with stage.locked("reconcile_queue"):
            ending = asyncio.create_task(stage.ask(sandbox_id, cmd.Terminate()))
            await stage.blocked()
            await stage.cut_connections()
            await asyncio.gather(ending, return_exceptions=True)
        await stage.until_stored(lambda: stage.ask(sandbox_id, cmd.Terminate()))
        await until(stage.is_phase(Phase.TERMINATED, sandbox_id))


async def test_a_hundred_pulls_that_hang_delay_nobody(stage: Stage, until):
    worker = stage.worker(concurrency=4, spare_slots=0)
    for number in range(100):
        stage.pull(f"big/{number}", gate=asyncio.Event())
    async with stage.working(worker):
        hanging = [await stage.create(image=f"big/{number}", tenant="greedy") for number in range(100)]
        await until(stage.is_told(hanging[-1], "waiting", tenant="greedy"))
        other = await stage.create(tenant="modest")
        await until(stage.is_phase(Phase.RUNNING, other))
        await stage.ask(other, cmd.Terminate())
        await until(stage.is_phase(Phase.TERMINATED, other))
        stage.pull("small")
        pulled = await stage.create(image="small", tenant="modest")
        await until(stage.is_phase(Phase.RUNNING, pulled))


async def test_pulls_are_bounded_and_fair_among_tenants(stage: Stage):
    for name in "abcdefgh":
        stage.pull(name, gate=asyncio.Event())
    worker = stage.worker(pulls=3, tenant_pulls=2)
    for name in "abcdef":
        await pulling(stage, worker, image=name, tenant="greedy")
    flying = [image.reference for image, flight in worker.fetches._flights.items() if flight.task is not None]
    assert flying == ["a", "b"]
    late = await pulling(stage, worker, image="g", tenant="modest")
    flying = [image.reference for image, flight in worker.fetches._flights.items() if flight.task is not None]
    assert flying == ["a", "b", "g"]
    waiting = await pulling(stage, worker, image="h", tenant="third")
    await worker.fetches.beat()
    assert (await stage.row(late))["progress"] is None
    assert "3 that are under way" in (await stage.row(waiting))["progress"]
    await stage.ask(late, cmd.Terminate())
    await stage.turn(worker)
    flying = [image.reference for image, flight in worker.fetches._flights.items() if flight.task is not None]
    assert flying == ["a", "b", "h"], "the tenant with the fewest is next"
    await worker.fetches.close()


async def test_a_worker_that_dies_in_a_pull_is_followed_by_another(stage: Stage):
    stage.pull("big", gate=asyncio.Event())
    dying = stage.worker(worker_id="dying")
    sandbox_id = await pulling(stage, dying, image="big")
    for flight in list(dying.fetches._flights.values()):
        assert flight.task is not None
        flight.task.cancel()  # and never heard of again
    stage.pull("big")
    row = await stage.row(sandbox_id)
    assert row["lease_owner"] is None
    assert await stage.sql("SELECT 1 FROM reconcile_queue WHERE due_at <= clock_timestamp() + interval '10 s'")
    await stage.make_due(sandbox_id)
    await stage.settle(stage.worker(worker_id="next"))
    assert await stage.told(sandbox_id) == LANDED


async def test_rows_wait_for_as_long_as_their_pull_lives(stage: Stage):
    stage.pull("big", gate=asyncio.Event())
    worker = stage.worker(lease=1000)
    sandbox_id = await pulling(stage, worker, image="big")
    await stage.sql("UPDATE reconcile_queue SET due_at = clock_timestamp() + interval '5 s'")
    await worker.fetches.beat()
    assert await stage.sql("SELECT 1 FROM reconcile_queue WHERE due_at > clock_timestamp() + interval '900 s'")
    await worker.queue.enqueue([sandbox_id])
    await worker.fetches.beat()
    assert await stage.sql("SELECT 1 FROM reconcile_queue WHERE due_at <= clock_timestamp()"), "news are not put off"
    await worker.fetches.close()


async def test_a_stop_lets_others_have_what_waits_for_a_pull_at_once(stage: Stage, until):
    stage.pull("big", gate=asyncio.Event())
    worker = stage.worker()
    running = asyncio.create_task(worker.run())
    sandbox_id = await stage.create(image="big")
    await until(stage.is_told(sandbox_id, "waiting"))
    await until(worker_waits(stage, sandbox_id))
    await worker.stop(0)
    await running
    assert await stage.sql("SELECT 1 FROM reconcile_queue WHERE due_at <= clock_timestamp() AND lease_owner IS NULL")
    stage.pull("big")
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.RUNNING


def worker_waits(stage: Stage, sandbox_id: UUID):
    async def waits() -> bool:
        return stage.engine.calls["pull"] > 0 and (await stage.row(sandbox_id))["lease_owner"] is None

    return waits


async def test_two_workers_may_pull_one_image(stage: Stage):
    gate = asyncio.Event()
    stage.pull("big", gate=gate)
    workers = [stage.worker(worker_id=f"w{number}") for number in range(2)]
    sandbox_id = await pulling(stage, workers[0], image="big")
    await stage.make_due(sandbox_id)
    await stage.turn(workers[1])
    gate.set()
    for worker in workers:
        await stage.land(worker)
    await stage.settle(workers[0])
    assert await stage.told(sandbox_id) == LANDED
    assert len(stage.engine.containers) == 1


async def test_a_pull_that_failed_for_good_does_not_fail_what_another_worker_has_provided(stage: Stage):
    gate = asyncio.Event()
    stage.pull("big", gate=gate, fault=RuntimeRejected("IMAGE_NOT_FOUND", "manifest unknown"))
    worker = stage.worker()
    sandbox_id = await pulling(stage, worker, image="big")
    while stage.engine.calls["pull"] == 0:
        await asyncio.sleep(0.001)
    stage.engine.to_pull.clear()
    await stage.make_due(sandbox_id)
    await stage.turn(stage.worker(worker_id="other"))
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    gate.set()
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert "failed" not in await stage.told(sandbox_id)


async def test_a_pull_that_fails_for_good_fails_the_sandbox(stage: Stage):
    stage.pull("big", fault=RuntimeRejected("IMAGE_AUTH_REQUIRED", "log in first"))
    sandbox_id = await stage.create(image="big")
    await stage.settle(stage.worker())
    failure = (await stage.sandbox(sandbox_id)).failure
    assert failure is not None
    assert (failure.step, failure.reason, failure.message) == ("fetch", "IMAGE_AUTH_REQUIRED", "log in first")


async def test_while_it_is_repeated_the_status_names_the_last_failure(stage: Stage):
    stage.pull("big", fault=ImagePullFailed("REGISTRY_UNREACHABLE", "no such host"))
    worker = stage.worker()
    sandbox_id = await pulling(stage, worker, image="big")
    await stage.land(worker)
    gate = Gate("pull")
    again = stage.worker(stage.driver(before=gate))
    await stage.make_due(sandbox_id)
    await stage.turn(again)
    sandbox = await stage.sandbox(sandbox_id)
    status = status_of(sandbox, await stage.service.view.attempt(sandbox))
    assert status.reason == "IMAGE_PULLING"
    assert "REGISTRY_UNREACHABLE: no such host" in status.message
    await again.fetches.close()
