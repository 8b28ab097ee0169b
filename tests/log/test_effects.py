"""What comes and goes with an append, in the same statement: work, deadline, secrets, and one reading of the clock."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Exit, Power
from app.domain.sandbox.spec import Platform, SandboxSpec
from app.domain.sandbox.state import Phase
from app.service.sandboxes import Outcome, Service
from app.store.vault.seal import Sealer, Secrets
from tests.support.sql import connected
from tests.support.stream import META as ACTOR
from tests.support.stream import requested, seen


class Traces:
    """The rows beside one head."""

    def __init__(self, dsn: str, sandbox_id: UUID) -> None:
        self._dsn = dsn
        self._id = sandbox_id

    async def row(self, table: str) -> dict[str, Any] | None:
        key = "id" if table == "sandboxes" else "sandbox_id"
        async with connected(self._dsn) as connection:
            row = await connection.fetchrow(f"SELECT * FROM {table} WHERE {key} = $1", self._id)
            return None if row is None else dict(row)

    async def write(self, statement: str) -> None:
        async with connected(self._dsn) as connection:
            await connection.execute(statement, self._id)

    async def present(self) -> tuple[bool, bool, bool]:
        """(queue, expiry, secrets)."""
        tables = ("reconcile_queue", "expiry_jobs", "sandbox_secrets")
        queue, expiry, secrets = [await self.row(table) is not None for table in tables]
        return queue, expiry, secrets


async def create(service: Service, sealer: Sealer | None = None, timeout_s: int | None = 600) -> Outcome:
    sandbox_id = uuid4()
    sealed = sealer and sealer.seal(sandbox_id, Secrets(env={"TOKEN": "hunter2"}))
    return await service.create(sandbox_id, requested(timeout_s=timeout_s), sealed, ACTOR)


async def test_a_create_brings_work_deadline_and_secrets(dsn: str, service: Service, sealer: Sealer):
    outcome = await create(service, sealer)
    box = outcome.sandbox
    traces = Traces(dsn, box.id)
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert (queue["tenant"], queue["driver"], queue["generation"], queue["attempts"]) == ("default", "fake", 1, 0)
    assert (queue["due_at"], queue["cause"], queue["lease_owner"]) == (box.created_at, outcome.position, None)
    expiry = await traces.row("expiry_jobs")
    assert expiry is not None
    assert box.expires_at == box.created_at + timedelta(seconds=600)
    assert expiry["expires_at"] == expiry["next_run_time"] == box.expires_at
    assert expiry["cause"] == outcome.position
    secrets = await traces.row("sandbox_secrets")
    assert secrets is not None
    assert (secrets["tenant"], secrets["sealed_at"]) == ("default", box.created_at)
    head = await traces.row("sandboxes")
    assert head is not None
    assert outcome.position is not None
    assert head["since_position"] < outcome.position


async def test_no_deadline_no_job_and_no_values_no_secrets(dsn: str, service: Service):
    outcome = await create(service, timeout_s=None)
    assert outcome.sandbox.expires_at is None
    assert await Traces(dsn, outcome.sandbox.id).present() == (True, False, False)


async def test_a_renewal_moves_the_job_even_one_that_a_scheduler_has_claimed(dsn: str, service: Service):
    box = (await create(service)).sandbox
    traces = Traces(dsn, box.id)
    await traces.write(
        "UPDATE expiry_jobs SET next_run_time = next_run_time + interval '30 s', attempts = 3 WHERE sandbox_id = $1"
    )
    for shift in (3600, -3000):
        later = box.created_at + timedelta(seconds=3600 + shift)
        outcome = await service.execute(box.id, cmd.Renew(later), ACTOR)
        expiry = await traces.row("expiry_jobs")
        assert expiry is not None
        assert expiry["expires_at"] == expiry["next_run_time"] == later == outcome.sandbox.expires_at
        assert (expiry["attempts"], expiry["cause"]) == (0, outcome.position)
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert queue["generation"] == 1, "a renewal asks the engine for nothing"


async def test_wishes_touch_the_queue_and_facts_do_not(dsn: str, service: Service):
    box = (await create(service)).sandbox
    traces = Traces(dsn, box.id)
    wishes: list[tuple[cmd.Command, int]] = [
        (cmd.RecordSeen(seen(Power.RUNNING)), 1),
        (cmd.PatchMetadata({"a": "b"}), 1),
        (cmd.Pause(), 2),
        (cmd.RecordSeen(seen(Power.PAUSED)), 2),
        (cmd.Resume(), 3),
        (cmd.RecordRetry("set_power", "E", "m", 1), 3),
        (cmd.Terminate(), 4),
    ]
    for command, generation in wishes:
        await service.execute(box.id, command, ACTOR)
        queue = await traces.row("reconcile_queue")
        assert queue is not None
        assert queue["generation"] == generation, command


async def test_a_touch_forgets_backoff_but_not_a_running_claim(dsn: str, service: Service):
    box = (await create(service)).sandbox
    await service.execute(box.id, cmd.RecordSeen(seen(Power.RUNNING)), ACTOR)
    traces = Traces(dsn, box.id)
    await traces.write(
        "UPDATE reconcile_queue SET attempts = 7, first_failed_at = now(), due_at = now() + interval '5 min', "
        "priority = 1, lease_until = now() - interval '1 s', lease_owner = gen_random_uuid() WHERE sandbox_id = $1"
    )
    paused = await service.execute(box.id, cmd.Pause(), ACTOR)
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert (queue["attempts"], queue["first_failed_at"], queue["priority"]) == (0, None, 0)
    assert queue["due_at"] == paused.sandbox.changed_at, "due at once: the lease has run out"

    await traces.write(
        "UPDATE reconcile_queue SET lease_until = now() + interval '1 min', due_at = now() + interval '1 min' "
        "WHERE sandbox_id = $1"
    )
    held = await traces.row("reconcile_queue")
    await service.execute(box.id, cmd.Terminate(), ACTOR)
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert held is not None
    assert (queue["due_at"], queue["lease_owner"]) == (held["due_at"], held["lease_owner"])
    assert queue["generation"] == held["generation"] + 1, "the claim's owner sees the rise"


async def test_a_wish_brings_a_completed_queue_row_back(dsn: str, service: Service):
    box = (await create(service)).sandbox
    traces = Traces(dsn, box.id)
    await traces.write("DELETE FROM reconcile_queue WHERE sandbox_id = $1")
    await service.execute(box.id, cmd.RecordSeen(seen(Power.RUNNING)), ACTOR)
    assert (await traces.present())[0] is False
    await service.execute(box.id, cmd.Terminate(), ACTOR)
    assert (await traces.present())[0] is True


async def test_an_end_takes_deadline_and_secrets_and_leaves_work(dsn: str, service: Service, sealer: Sealer):
    box = (await create(service, sealer)).sandbox
    traces = Traces(dsn, box.id)
    assert await traces.present() == (True, True, True)
    await service.execute(box.id, cmd.Terminate(), ACTOR)
    assert await traces.present() == (True, False, False)


async def test_expiry_takes_deadline_and_secrets_and_leaves_work(
    dsn: str, service: Service, sealer: Sealer, until: Any
):
    box = (await create(service, sealer)).sandbox
    soon = box.created_at + timedelta(milliseconds=600)
    await service.execute(box.id, cmd.Renew(soon), ACTOR)

    async def expired() -> bool:
        return bool((await service.execute(box.id, cmd.Expire(), ACTOR)).events)

    await until(expired)
    loaded = await service.view.load(box.id)
    assert loaded is not None
    assert loaded[0].ending is not None
    assert loaded[0].ending.cause is ev.EndCause.EXPIRED_WHILE_PENDING
    assert loaded[0].ending.at >= soon
    assert await Traces(dsn, box.id).present() == (True, False, False)


async def test_a_failure_takes_the_secrets_and_keeps_the_deadline(dsn: str, service: Service, sealer: Sealer):
    box = (await create(service, sealer)).sandbox
    await service.execute(box.id, cmd.RecordFailure("IMAGE_NOT_FOUND", "none"), ACTOR)
    assert await Traces(dsn, box.id).present() == (True, True, False)


WAYS: dict[str, list[cmd.Command]] = {
    "deleted": [
        cmd.RecordSeen(seen(Power.RUNNING)),
        cmd.PatchMetadata({"a": "b"}),
        cmd.Pause(),
        cmd.RecordSeen(seen(Power.PAUSED)),
        cmd.Resume(),
        cmd.RecordSeen(seen(Power.RUNNING)),
        cmd.RecordSeen(seen(Power.EXITED, end=Exit(3, message="späť"))),
        cmd.Terminate(),
        cmd.RecordRemoved(),
    ],
    "failed": [
        cmd.RecordRetry("ensure", "E", "m", 1),
        cmd.RecordFailure("E", "m"),
        cmd.RecordRemoved(),
        cmd.Terminate(),
    ],
}


@pytest.mark.parametrize("way", WAYS)
async def test_all_times_of_one_append_are_one_reading_of_the_databases_clock(dsn: str, service: Service, way: str):
    outcome = await create(service)
    box = outcome.sandbox
    traces = Traces(dsn, box.id)
    phase = box.phase
    for command in [None, *WAYS[way]]:
        if command is not None:
            outcome = await service.execute(box.id, command, ACTOR)
        head = await traces.row("sandboxes")
        assert head is not None
        async with connected(dsn) as connection:
            at = await connection.fetchval("SELECT recorded_at FROM events WHERE position = $1", outcome.position)
        if command is None:
            assert head["created_at"] == head["changed_at"] == at
        if outcome.sandbox.phase is not phase:
            assert head["changed_at"] == at
        if isinstance(command, cmd.Terminate):
            assert head["ended_at"] == at
        if outcome.sandbox.closed_at is not None:
            assert head["closed_at"] == at
        phase = outcome.sandbox.phase
        loaded = await service.view.load(box.id)
        assert loaded is not None
        assert loaded[0] == outcome.sandbox, "the answer is the head"
    assert outcome.sandbox.closed_at is not None
    assert phase is Phase.TERMINATED


async def test_several_events_of_one_append_share_their_time_and_stand_in_order(dsn: str, service: Service):
    box = (await create(service)).sandbox
    look = seen(Power.EXITED, end=Exit(0), started_at=box.created_at)
    await service.execute(box.id, cmd.RecordSeen(look), ACTOR)
    facts = await service.history(box.id, "default")
    assert [ev.wire_name(fact.event) for fact in facts] == [
        "sandbox.requested",
        "sandbox.runtime_created",
        "sandbox.started",
        "sandbox.runtime_exited",
    ]
    assert [fact.version for fact in facts] == [1, 2, 3, 4]
    assert facts[1].position < facts[2].position < facts[3].position
    assert facts[1].at == facts[2].at == facts[3].at > facts[0].at


async def test_who_and_why_stand_beside_every_event(service: Service):
    meta = ev.Meta(
        ev.Actor(ev.ActorKind.OPERATOR, "id\u2028", "späť \U0001f600"), "1.0", "request", 7, "2001:db8::1", "a" * 64
    )
    made = await service.create(uuid4(), requested(), None, meta)
    (fact,) = await service.history(made.sandbox.id, "default")
    assert fact.meta == meta
    assert fact.position == made.position


async def test_the_whole_request_reads_back(service: Service):
    spec = SandboxSpec(
        "registry.example/tools/späť:1",
        ("sh", "-c", "echo \"\\u0000 '$1' \U0001f600\""),
        {"cpu": "500m"},
        {"memory": "1Gi"},
        {"TOKEN": "0" * 64},
        registry_auth=True,
        platform=Platform("linux", "arm64"),
        extensions={"opensandbox.extensions.x": "{}"},
        timeout_s=86_400 * 36_500,
    )
    event = ev.Requested("default", "fake", spec, "f" * 64, {"a": ""})
    made = await service.create(uuid4(), event, None, ACTOR)
    assert (await service.history(made.sandbox.id, "default"))[0].event == event
    loaded = await service.view.load(made.sandbox.id)
    assert loaded is not None
    assert loaded[0] == made.sandbox
    assert msgspec.to_builtins(loaded[0].spec) == msgspec.to_builtins(spec)
