"""Runs of single claims: from head to goal."""

from __future__ import annotations

import asyncio
from datetime import UTC, timedelta

import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Waiting
from app.domain.sandbox.spec import Platform
from app.domain.sandbox.state import Phase, RuntimeState
from app.domain.stream import Actor, ActorKind
from app.domain.tenants import ANY_TENANT
from app.runtime.driver import Exit, Image, Limits, Observed, Power, Ref, RegistryAuth, Workload
from app.runtime.fake import FakeDriver, name_of
from app.service.sandboxes import StaleVersion
from app.store.queue.reconcile import Claim
from app.store.vault.seal import MasterKeys, Sealer, Secrets
from app.work.worker import Worker
from tests.work.stage import ADOPTED, BEGUN, CLIENT, ENDED, MADE, Gate, Stage
from tests.work.stage import name_of as named

ALL_OF_A_LIFE = [*BEGUN, *ENDED]


class Recorder(FakeDriver):
    """Keeps what it was told to make."""

    made: Workload

    async def ensure(self, workload: Workload) -> Observed:
        self.made = workload
        return await super().ensure(workload)


async def claim(stage: Stage) -> Claim:
    found = await stage.worker().queue.claim(1, lease=30, tenant_slots=1)
    return found.claims[0]


async def test_a_create_that_goes_well_asks_the_engine_nothing_beyond_the_create(stage: Stage):
    worker = stage.worker()
    await worker.station.contact()
    sandbox_id = await stage.create()
    before = stage.engine.calls.copy()
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert stage.engine.calls - before == {"create": 1, "start": 1, "inspect": 1, "image": 1}
    assert await stage.told(sandbox_id) == BEGUN
    assert await stage.row(sandbox_id) is None


async def test_a_whole_life(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    assert await stage.told(sandbox_id) == ALL_OF_A_LIFE
    assert stage.container(sandbox_id) is None


async def test_pause_and_resume(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    await stage.ask(sandbox_id, cmd.Pause())
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.PAUSED
    await stage.ask(sandbox_id, cmd.Resume())
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert await stage.told(sandbox_id) == [
        *BEGUN, "pause_requested", "paused", "resume_requested", "resumed",
    ]  # fmt: skip


async def test_the_workload_is_the_spec_with_its_secrets(stage: Stage):
    driver = Recorder(stage.engine, stage.installation, name=stage.engine_name)
    sandbox_id = await stage.create(
        secrets=Secrets({"TOKEN": "s3cret", "MODE": "fast"}, "me", "hunter2"),
        resource_limits={"cpu": "500m", "memory": "64Mi", "gpu": "2"},
        platform=Platform("linux", "amd64"),
    )
    position = (await stage.sandbox(sandbox_id)).position
    await stage.settle(stage.worker(driver))
    assert driver.made == Workload(
        Ref(sandbox_id),
        "default",
        Image("busybox", "linux/amd64", RegistryAuth("me", "hunter2")),
        ("sleep", "60"),
        {"TOKEN": "s3cret", "MODE": "fast"},
        Limits(500_000_000, 64 * 1024**2, 2),
        generation=1,
        position=position,
    )


async def test_all_gpus_are_no_number_of_gpus(stage: Stage):
    driver = Recorder(stage.engine, stage.installation, name=stage.engine_name)
    await stage.create(resource_limits={"gpu": "all"})
    await stage.settle(stage.worker(driver))
    assert driver.made.limits == Limits(gpus_all=True)


async def test_an_object_that_is_made_again_is_another_generation(stage: Stage):
    """It vanished before it ran, so it is not lost but made once more; its token must be another."""
    sandbox_id = await stage.create()
    stage.engine.waiting[sandbox_id] = Waiting("ensure", "POD_UNSCHEDULABLE")
    worker = stage.worker()
    await stage.turn(worker)
    stage.engine.destroy(name_of(sandbox_id))
    stage.engine.waiting.clear()
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    sandbox = await stage.sandbox(sandbox_id)
    assert (sandbox.phase, sandbox.generation) == (Phase.RUNNING, 2)


async def test_secrets_that_are_gone_fail_the_sandbox(stage: Stage):
    sandbox_id = await stage.create(secrets=Secrets({"A": "b"}))
    await stage.sql("DELETE FROM sealed_values")
    await stage.settle(stage.worker())
    failure = (await stage.sandbox(sandbox_id)).failure
    assert failure is not None
    assert failure.reason == "SECRETS_UNAVAILABLE"
    assert stage.engine.calls["create"] == 0


async def test_secrets_that_are_gone_because_it_has_ended_are_no_failure(stage: Stage):
    """The delete comes after the head was loaded, and erases what the run is about to read."""
    sandbox_id = await stage.create(secrets=Secrets({"A": "b"}))
    worker = stage.worker()
    before = await stage.sandbox(sandbox_id)
    await stage.ask(sandbox_id, cmd.Terminate())
    with pytest.raises(StaleVersion):  # what the run does next, on the head that it has
        await stage.service.record(before, cmd.RecordFailure("ensure", "SECRETS_UNAVAILABLE", ""), CLIENT)
    await stage.settle(worker)
    sandbox = await stage.sandbox(sandbox_id)
    assert (sandbox.failure, sandbox.phase) == (None, Phase.TERMINATED)


async def test_secrets_sealed_by_another_key_wait_for_the_right_worker(stage: Stage):
    sandbox_id = await stage.create(secrets=Secrets({"A": "b"}))
    right, stage.sealer = stage.sealer, Sealer(bytes(32))
    await stage.turn(stage.worker())
    assert (await stage.row(sandbox_id))["last_reason"] == "SECRETS_SEALED"
    assert await stage.phase(sandbox_id) is Phase.PENDING
    stage.sealer = right
    await stage.make_due(sandbox_id)
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_a_key_that_came_into_the_key_file_is_read_when_a_row_needs_it(stage: Stage):
    """A rotation wraps rows again before a worker has asked which master key is in use."""
    new = MasterKeys(bytes([1]) * 32)
    stage.sealer = Sealer(new)
    sandbox_id = await stage.create(secrets=Secrets({"A": "b"}))
    stage.sealer = Sealer(bytes(32), reread=lambda: new)
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_what_an_unreported_try_has_made_is_adopted(stage: Stage):
    """The worker died after the engine had acted and before it could say so."""
    sandbox_id = await stage.create()

    async def die(call: str) -> None:
        if call == "start":
            raise asyncio.CancelledError

    dying = stage.worker(stage.driver(after=die))
    lost = await claim(stage)
    await stage.run(dying, lost)
    assert stage.container(sandbox_id) is not None
    await stage.make_due(sandbox_id)
    await stage.settle(stage.worker())
    assert await stage.told(sandbox_id) == ADOPTED
    assert len(stage.engine.containers) == 1
    assert stage.engine.calls["start"] == 1


async def test_a_rejected_image_fails_the_sandbox_and_leaves_nothing(stage: Stage):
    sandbox_id = await stage.create(image="missing/one")
    await stage.settle(stage.worker())
    sandbox = await stage.sandbox(sandbox_id)
    assert sandbox.phase is Phase.FAILED
    assert sandbox.failure is not None
    assert sandbox.failure.reason == "IMAGE_NOT_FOUND"
    assert "missing/one" in sandbox.failure.message
    assert sandbox.observed is RuntimeState.REMOVED
    assert await stage.told(sandbox_id) == ["requested", "placed", "waiting", "failed", "runtime_removed"]
    assert await stage.row(sandbox_id) is None


async def test_a_strangers_container_of_that_name_is_left_alone(stage: Stage):
    sandbox_id = await stage.create()
    stage.engine.make(name_of(sandbox_id))
    await stage.settle(stage.worker())
    failure = (await stage.sandbox(sandbox_id)).failure
    assert failure is not None
    assert failure.reason == "NAME_TAKEN"
    assert stage.container(sandbox_id) is not None


async def test_an_end_of_its_own_is_the_runtimes_doing(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    stage.engine.exit(sandbox_id, 3, message="boom")
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    sandbox = await stage.sandbox(sandbox_id)
    assert sandbox.phase is Phase.FAILED
    assert sandbox.runtime is not None
    assert (sandbox.runtime.exit_code, sandbox.runtime.exit_message) == (3, "boom")
    last = (await stage.history(sandbox_id))[-1]
    assert isinstance(last.event, ev.RuntimeExited)
    assert last.meta.actor == Actor(ActorKind.RUNTIME, "default", "default")


async def test_an_end_right_after_the_start_has_an_actor_of_its_own(stage: Stage):
    sandbox_id = await stage.create(ends=Exit(0))
    await stage.settle(stage.worker())
    assert await stage.phase(sandbox_id) is Phase.TERMINATED
    facts = await stage.history(sandbox_id)
    assert [(named(fact.event), fact.meta.actor.kind) for fact in facts[2:]] == [
        ("fetched", "reconciler"),
        ("runtime_created", "reconciler"),
        ("started", "reconciler"),
        ("ready", "reconciler"),
        ("runtime_exited", "runtime"),
    ]
    assert facts[2].meta.cause == facts[1].position


async def test_a_pause_from_outside_is_recorded_and_undone(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    stage.engine.set_power(name_of(sandbox_id), Power.PAUSED)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    facts = (await stage.history(sandbox_id))[-2:]
    assert [(type(fact.event), fact.meta.actor.kind) for fact in facts] == [
        (ev.Paused, "runtime"),
        (ev.Resumed, "reconciler"),
    ]
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_what_ended_and_was_started_again_from_outside_is_removed(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    stage.engine.exit(sandbox_id, 0)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    stage.engine.set_power(name_of(sandbox_id), Power.RUNNING)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    assert stage.container(sandbox_id) is None
    assert await stage.phase(sandbox_id) is Phase.TERMINATED


async def test_absence_is_believed_after_two_looks_apart(stage: Stage):
    worker = stage.worker(missing_grace=1000)
    sandbox_id = await stage.running(worker)
    stage.engine.destroy(name_of(sandbox_id))
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    row = await stage.row(sandbox_id)
    assert row["missing_since"] is not None
    assert row["due_at"] - row["missing_since"] >= timedelta(seconds=1000)

    await worker.queue.enqueue([sandbox_id])  # news in between do not shorten it
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert (await stage.row(sandbox_id))["missing_since"] == row["missing_since"]

    await stage.sql("UPDATE reconcile_queue SET missing_since = missing_since - interval '1001 s', due_at = now()")
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.FAILED
    last = (await stage.history(sandbox_id))[-1]
    assert isinstance(last.event, ev.RuntimeLost)
    assert last.meta.actor.kind == ActorKind.RUNTIME


async def test_what_comes_back_in_between_was_never_missing(stage: Stage):
    worker = stage.worker(missing_grace=1000)
    sandbox_id = await stage.running(worker)
    hidden = stage.engine.containers.pop(name_of(sandbox_id))
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    stage.engine.containers[hidden.name] = hidden
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert await stage.row(sandbox_id) is None
    assert await stage.told(sandbox_id) == BEGUN


async def test_silence_between_two_looks_proves_nothing(stage: Stage):
    worker = stage.worker(missing_grace=1000)
    sandbox_id = await stage.running(worker)
    hidden = stage.engine.containers.pop(name_of(sandbox_id))
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    stage.engine.down = True
    await stage.make_due(sandbox_id)
    await stage.turn(worker)
    assert (await stage.row(sandbox_id))["missing_since"] is None
    stage.engine.down = False
    stage.engine.containers[hidden.name] = hidden
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_an_old_look_is_not_recorded(stage: Stage):
    """The engine is asked, and while the answer is on its way the sandbox is paused by another worker."""
    sandbox_id = await stage.running(stage.worker())
    gate = Gate("inspect")
    slow = stage.worker(stage.driver(after=gate), worker_id="slow")
    await slow.queue.enqueue([sandbox_id])
    looking = asyncio.create_task(stage.run(slow, await claim(stage)))
    await gate.reached.wait()  # it has seen "running"
    await stage.ask(sandbox_id, cmd.Pause())
    await stage.make_overdue(sandbox_id)  # its lease is over without its knowing
    await stage.settle(stage.worker(worker_id="other"))
    assert await stage.phase(sandbox_id) is Phase.PAUSED
    before = await stage.told(sandbox_id)
    gate.open.set()
    await looking
    assert await stage.told(sandbox_id) == before
    assert await stage.phase(sandbox_id) is Phase.PAUSED


async def test_recording_an_old_look_would_tell_a_falsehood(stage: Stage):
    """The naive way of the test above: the look is recorded whatever has happened since."""
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    look = await stage.driver().observe(Ref(sandbox_id))
    assert look is not None
    await stage.ask(sandbox_id, cmd.Pause())
    await stage.settle(worker)
    await stage.service.execute(sandbox_id, ANY_TENANT, cmd.RecordSeen(look, "observe"), CLIENT)
    assert await stage.phase(sandbox_id) is Phase.PAUSING, "it is paused, and the log says it runs"
    container = stage.container(sandbox_id)
    assert container is not None
    assert container.power is Power.PAUSED


async def test_a_change_of_mind_during_a_run_starts_it_over(stage: Stage):
    """A delete during the last call of the create: the facts of the create are refused, the object goes."""
    sandbox_id = await stage.create()
    gate = Gate("inspect")
    worker = stage.worker(stage.driver(before=gate))
    running = asyncio.create_task(stage.settle(worker))
    await gate.reached.wait()
    await stage.ask(sandbox_id, cmd.Terminate())
    gate.open.set()
    await running
    assert await stage.told(sandbox_id) == ["requested", "placed", *ENDED]
    assert stage.container(sandbox_id) is None
    causes = [fact.meta.cause for fact in await stage.history(sandbox_id)]
    asked = (await stage.history(sandbox_id))[2].position
    assert causes[3:] == [asked, asked]


async def test_a_renewal_during_a_create_does_no_harm(stage: Stage):
    sandbox_id = await stage.create(timeout_s=600)
    gate = Gate("inspect")
    running = asyncio.create_task(stage.settle(stage.worker(stage.driver(before=gate))))
    await gate.reached.wait()
    expires_at = (await stage.sandbox(sandbox_id)).expires_at
    assert expires_at is not None
    await stage.ask(sandbox_id, cmd.Renew(expires_at + timedelta(seconds=60)))
    gate.open.set()
    await running
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert len(stage.engine.containers) == 1
    assert stage.engine.calls["start"] == 1


async def test_a_run_of_a_closed_sandbox_takes_away_what_came_late(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    late = stage.engine.containers[name_of(sandbox_id)]
    await stage.ask(sandbox_id, cmd.Terminate())
    stale = (await worker.queue.claim(1, lease=30, tenant_slots=1)).claims[0]
    await stage.make_overdue(sandbox_id)
    await stage.settle(worker)
    stage.engine.containers[late.name] = late
    await stage.sql(
        "INSERT INTO reconcile_queue (stream_id, kind, tenant, engine, revision, due_at) VALUES ($1, 'sandbox', 'default', 'default', 1,"
        " clock_timestamp())",
        stale.stream_id,
    )
    await stage.settle(worker)
    assert stage.container(sandbox_id) is None
    assert await stage.told(sandbox_id) == ALL_OF_A_LIFE


async def test_two_workers_make_one_container_each(stage: Stage, until):
    workers = [stage.worker(worker_id=f"w{number}") for number in range(2)]
    async with stage.working(*workers):
        sandboxes = await asyncio.gather(*[stage.create(tenant=f"t{number % 3}") for number in range(40)])
        await until(stage.is_phase(Phase.RUNNING, *sandboxes))
        await until(stage.is_idle())
    assert len(stage.engine.containers) == 40
    assert stage.engine.calls["create"] == 40
    actors = await stage.sql("SELECT DISTINCT meta->'actor'->>'id' AS id FROM events WHERE type = 'sandbox.started'")
    assert {row["id"] for row in actors} <= {"w0", "w1"}


async def test_two_runs_of_one_sandbox_make_one_container(stage: Stage):
    """A stalled holder and its successor, create against create."""
    sandbox_id = await stage.create()
    gate = Gate("create")
    stalled = asyncio.create_task(stage.run(stage.worker(stage.driver(before=gate)), await claim(stage)))
    await gate.reached.wait()
    await stage.make_overdue(sandbox_id)
    await stage.settle(stage.worker(worker_id="other"))
    gate.open.set()
    await stalled
    assert len(stage.engine.containers) == 1
    assert stage.engine.calls["start"] == 1
    assert await stage.told(sandbox_id) == BEGUN


async def test_a_driver_that_makes_no_progress_is_counted_not_followed_for_ever(stage: Stage):
    class Idle(FakeDriver):
        async def ensure(self, workload: Workload) -> Observed:
            seen = await super().ensure(workload)
            return msgspec.structs.replace(seen, power=Power.CREATED, started_at=None)

    sandbox_id = await stage.create()
    await stage.turn(stage.worker(Idle(stage.engine, stage.installation, name=stage.engine_name)))
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["last_reason"]) == (1, "INTERNAL_ERROR")


async def test_what_no_engine_takes_says_so_and_is_placed_when_one_comes(stage: Stage):
    sandbox_id = await stage.create_unplaced()
    worker = stage.worker()
    for _ in range(3):
        await stage.make_due(sandbox_id)
        await worker_places(stage, worker)
    assert await stage.told(sandbox_id) == ["requested", "waiting"], "said once"
    sandbox = await stage.sandbox(sandbox_id)
    assert sandbox.waiting is not None
    assert (sandbox.waiting.step, sandbox.waiting.reason) == ("place", "ENGINE_UNAVAILABLE")
    assert "default is dark" in sandbox.waiting.message
    row = await stage.row(sandbox_id)
    assert (row["engine"], row["attempts"], row["lease_owner"]) == ("", 0, None)

    await stage.light_up()
    await stage.make_due(sandbox_id)
    await worker_places(stage, worker)
    row = await stage.row(sandbox_id)
    assert (row["engine"], row["lease_owner"]) == ("default", None)
    await stage.settle(worker)
    assert await stage.told(sandbox_id) == ["requested", "waiting", "placed", *MADE]
    assert await stage.row(sandbox_id) is None


async def worker_places(stage: Stage, worker: Worker) -> None:
    """A round in which the station has not asked its engine."""
    for claim in (await worker.queue.claim(9, lease=30, tenant_slots=9)).claims:
        await stage.run(worker, claim)


async def test_a_delete_before_any_engine_took_it_asks_no_engine(stage: Stage):
    sandbox_id = await stage.create_unplaced()
    await stage.ask(sandbox_id, cmd.Terminate())
    await worker_places(stage, stage.worker())
    assert await stage.told(sandbox_id) == ["requested", "termination_requested", "terminated"]
    assert await stage.row(sandbox_id) is None
    assert not stage.engine.calls


async def test_absence_on_another_engine_is_no_absence(stage: Stage):
    """A stale address is enough for another engine to answer, and to say that nothing is there."""
    worker = stage.worker(missing_grace=0)
    running, ended = await stage.running(worker), await stage.running(worker)
    await stage.ask(ended, cmd.Terminate())
    kept = dict(stage.engine.containers)
    mark = stage.engine.marks[stage.installation]
    claims = await worker.queue.claim(1, lease=30, tenant_slots=9)
    stage.engine.become_another()
    await stage.run(worker, claims.claims[0])
    for _ in range(3):
        await worker.queue.enqueue([running])
        for claim in (await worker.queue.claim(9, lease=30, tenant_slots=9)).claims:
            await stage.run(worker, claim)
    assert await stage.phase(running) is Phase.RUNNING
    assert await stage.phase(ended) is Phase.STOPPING
    stage.engine.containers, stage.engine.marks[stage.installation] = kept, mark
    await worker.station.contact()
    for sandbox_id in (running, ended):
        await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert await stage.phase(running) is Phase.RUNNING
    assert await stage.phase(ended) is Phase.TERMINATED
    assert list(stage.engine.containers) == [name_of(running)]


async def test_an_object_that_is_not_up_yet_costs_no_attempt_and_no_slot(stage: Stage):
    """As every Pod: first it waits for a node, then for its containers."""
    sandbox_id = await stage.create()
    worker = stage.worker()
    waiting = [Waiting("ensure", "POD_UNSCHEDULABLE", "0/3 nodes are available")] * 4
    for wait in [*waiting, Waiting("ensure", "CONTAINER_STARTING")]:
        stage.engine.waiting[sandbox_id] = wait
        await stage.make_due(sandbox_id)
        await stage.turn(worker)
        row = await stage.row(sandbox_id)
        assert (row["attempts"], row["lease_owner"], row["last_reason"]) == (0, None, None)
        assert row["due_at"] > row["due_at"].now(UTC), "it rests"
    assert (await stage.told(sandbox_id))[2:] == ["fetched", "runtime_created", "waiting", "waiting"], "when it changes"
    stage.engine.settle(sandbox_id)
    await worker.queue.enqueue_objects([sandbox_id])  # a hint
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING


async def test_a_removal_that_takes_its_time_is_waited_for_without_a_count(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    stage.engine.slow_removals = True
    await stage.ask(sandbox_id, cmd.Terminate())
    for _ in range(12):
        await stage.make_due(sandbox_id)
        await stage.turn(worker)
    row = await stage.row(sandbox_id)
    assert (row["attempts"], row["lease_owner"]) == (0, None)
    assert (await stage.told(sandbox_id))[-1] == "termination_requested"
    assert stage.engine.calls["remove"] == 1
    stage.engine.finish_removals()
    await worker.queue.enqueue_objects([sandbox_id])
    await stage.settle(worker)
    assert (await stage.told(sandbox_id))[-3:] == ENDED


async def test_a_start_from_outside_is_recorded_as_a_restart(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    stage.engine.restart(sandbox_id)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    assert (await stage.told(sandbox_id))[-2:] == ["restarted", "ready"]
    sandbox = await stage.sandbox(sandbox_id)
    assert (sandbox.phase, sandbox.run, sandbox.generation) == (Phase.RUNNING, 2, 1)
    last = (await stage.history(sandbox_id))[-2]
    assert isinstance(last.event, ev.Restarted)
    assert (last.event.by, last.meta.actor.kind) == ("outside", ActorKind.RUNTIME)
    assert await stage.row(sandbox_id) is None


async def test_the_moment_between_stop_and_start_of_a_restart_is_no_end(stage: Stage):
    """An exit that is recorded is final, and what runs after it is removed."""
    worker = stage.worker(exit_settle=1000)
    sandbox_id = await stage.running(worker)
    stage.engine.exit(sandbox_id, 137)
    await worker.queue.enqueue([sandbox_id])
    await stage.turn(worker)
    await worker.queue.enqueue([sandbox_id])  # the events of the restart
    await stage.turn(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    stage.engine.restart(sandbox_id)
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert (await stage.told(sandbox_id))[-2:] == ["restarted", "ready"]
    assert stage.container(sandbox_id) is not None


async def test_taken_for_an_end_it_costs_the_sandbox(stage: Stage):
    """The naive way of the test above."""
    worker = stage.worker(exit_settle=0)
    sandbox_id = await stage.running(worker)
    stage.engine.exit(sandbox_id, 137)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    stage.engine.restart(sandbox_id)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.FAILED
    assert stage.container(sandbox_id) is None


async def test_an_exit_that_is_old_enough_is_recorded(stage: Stage):
    worker = stage.worker(exit_settle=5)
    sandbox_id = await stage.running(worker)
    stage.engine.exit(sandbox_id, 3)
    container = stage.container(sandbox_id)
    assert container is not None
    assert container.exit is not None
    assert container.exit.at is not None
    ended = msgspec.structs.replace(container.exit, at=container.exit.at - timedelta(seconds=6))
    stage.engine.containers[container.name] = msgspec.structs.replace(container, exit=ended)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.FAILED
