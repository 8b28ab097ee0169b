"""What comes and goes with an append, in the same statement: work, deadline, secrets, and one reading of the clock."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.observed import Exit, Power
from app.domain.sandbox.spec import Platform, SandboxSpec
from app.domain.sandbox.state import Phase
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Outcome, Service
from app.store.vault.seal import Sealer, Secrets
from tests.support.sql import connected
from tests.support.stream import META as ACTOR
from tests.support.stream import TENANT, about, requested, seen


class Traces:
    """The rows beside one head."""

    def __init__(self, dsn: str, sandbox_id: UUID) -> None:
        self._dsn = dsn
        self._id = sandbox_id

    async def row(self, table: str) -> dict[str, Any] | None:
        key = "id" if table == "sandboxes" else "stream_id"
        async with connected(self._dsn) as connection:
            row = await connection.fetchrow(f"SELECT * FROM {table} WHERE {key} = $1", self._id)
            return None if row is None else dict(row)

    async def write(self, statement: str) -> None:
        async with connected(self._dsn) as connection:
            await connection.execute(statement, self._id)

    async def deadlines(self) -> dict[str, dict[str, Any]]:
        """By name."""
        async with connected(self._dsn) as connection:
            rows = await connection.fetch("SELECT * FROM deadlines WHERE stream_id = $1", self._id)
            return {row["name"]: dict(row) for row in rows}

    async def present(self) -> tuple[bool, set[str], bool]:
        """(queue, names of deadlines, sealed values)."""
        queue, sealed = [await self.row(table) is not None for table in ("reconcile_queue", "sealed_values")]
        return queue, set(await self.deadlines()), sealed


async def create(service: Service, sealer: Sealer | None = None, timeout_s: int | None = 600) -> Outcome:
    sandbox_id = uuid4()
    sealed = sealer and sealer.seal(sandbox_id, Secrets(env={"TOKEN": "hunter2"}))
    return await service.create(sandbox_id, TENANT, requested(timeout_s=timeout_s), sealed, ACTOR)


async def test_a_create_brings_work_deadline_and_secrets(dsn: str, service: Service, sealer: Sealer):
    outcome = await create(service, sealer)
    sandbox = outcome.sandbox
    traces = Traces(dsn, sandbox.id)
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert (queue["tenant"], queue["engine"], queue["revision"], queue["attempts"]) == ("default", "default", 1, 0)
    assert queue["kind"] == "sandbox"
    assert (queue["due_at"], queue["cause"], queue["lease_owner"]) == (sandbox.created_at, outcome.position, None)
    due = await traces.deadlines()
    assert sandbox.expires_at == sandbox.created_at + timedelta(seconds=600)
    assert due["expiry"]["fires_at"] == due["expiry"]["next_run_time"] == sandbox.expires_at
    transition = sandbox.created_at + timedelta(seconds=Limits().pending_s)
    assert due["transition"]["fires_at"] == due["transition"]["next_run_time"] == transition
    for row in due.values():
        assert (row["kind"], row["tenant"], row["cause"]) == ("sandbox", "default", outcome.position)
    secrets = await traces.row("sealed_values")
    assert secrets is not None
    assert (secrets["tenant"], secrets["sealed_at"]) == ("default", sandbox.created_at)
    head = await traces.row("sandboxes")
    assert head is not None
    assert outcome.position is not None
    assert head["since_position"] < outcome.position


async def test_no_deadline_no_job_and_no_values_no_secrets(dsn: str, service: Service):
    outcome = await create(service, timeout_s=None)
    assert outcome.sandbox.expires_at is None
    assert await Traces(dsn, outcome.sandbox.id).present() == (True, {"transition"}, False)


async def test_a_renewal_moves_the_job_even_one_that_a_scheduler_has_claimed(dsn: str, service: Service):
    sandbox = (await create(service)).sandbox
    traces = Traces(dsn, sandbox.id)
    await traces.write(
        "UPDATE deadlines SET next_run_time = next_run_time + interval '30 s', attempts = 3 WHERE stream_id = $1"
    )
    for shift in (3600, -3000):
        later = sandbox.created_at + timedelta(seconds=3600 + shift)
        outcome = await service.execute(sandbox.id, ANY_TENANT, cmd.Renew(later), ACTOR)
        due = await traces.deadlines()
        expiry = due["expiry"]
        assert expiry["fires_at"] == expiry["next_run_time"] == later == outcome.sandbox.expires_at
        assert (expiry["attempts"], expiry["cause"]) == (0, outcome.position)
        assert due["transition"]["attempts"] == 3, "a renewal moves no other deadline"
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert queue["revision"] == 1, "a renewal asks the engine for nothing"


async def test_wishes_touch_the_queue_and_facts_do_not(dsn: str, service: Service):
    sandbox = (await create(service)).sandbox
    traces = Traces(dsn, sandbox.id)
    wishes: list[tuple[cmd.Command, int]] = [
        (cmd.RecordSeen(seen(Power.RUNNING)), 1),
        (cmd.PatchMetadata({"a": "b"}), 1),
        (cmd.Pause(), 2),
        (cmd.RecordSeen(seen(Power.PAUSED)), 2),
        (cmd.Resume(), 3),
        (cmd.RecordRetry("set_power", "E", "m", 1), 3),
        (cmd.Terminate(), 4),
    ]
    for command, revision in wishes:
        await service.execute(sandbox.id, ANY_TENANT, about(sandbox.id, command), ACTOR)
        queue = await traces.row("reconcile_queue")
        assert queue is not None
        assert queue["revision"] == revision, command


async def test_a_touch_forgets_backoff_but_not_a_running_claim(dsn: str, service: Service):
    sandbox = (await create(service)).sandbox
    await service.execute(sandbox.id, ANY_TENANT, about(sandbox.id, cmd.RecordSeen(seen(Power.RUNNING))), ACTOR)
    traces = Traces(dsn, sandbox.id)
    await traces.write(
        "UPDATE reconcile_queue SET attempts = 7, first_failed_at = now(), due_at = now() + interval '5 min', "
        "priority = 1, lease_until = now() - interval '1 s', lease_owner = gen_random_uuid() WHERE stream_id = $1"
    )
    paused = await service.execute(sandbox.id, ANY_TENANT, cmd.Pause(), ACTOR)
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert (queue["attempts"], queue["first_failed_at"], queue["priority"]) == (0, None, 0)
    assert queue["due_at"] == paused.sandbox.changed_at, "due at once: the lease has run out"

    await traces.write(
        "UPDATE reconcile_queue SET lease_until = now() + interval '1 min', due_at = now() + interval '1 min' "
        "WHERE stream_id = $1"
    )
    held = await traces.row("reconcile_queue")
    await service.execute(sandbox.id, ANY_TENANT, cmd.Terminate(), ACTOR)
    queue = await traces.row("reconcile_queue")
    assert queue is not None
    assert held is not None
    assert (queue["due_at"], queue["lease_owner"]) == (held["due_at"], held["lease_owner"])
    assert queue["revision"] == held["revision"] + 1, "the claim's owner sees the rise"


async def test_a_wish_brings_a_completed_queue_row_back(dsn: str, service: Service):
    sandbox = (await create(service)).sandbox
    traces = Traces(dsn, sandbox.id)
    await traces.write("DELETE FROM reconcile_queue WHERE stream_id = $1")
    await service.execute(sandbox.id, ANY_TENANT, about(sandbox.id, cmd.RecordSeen(seen(Power.RUNNING))), ACTOR)
    assert (await traces.present())[0] is False
    await service.execute(sandbox.id, ANY_TENANT, cmd.Terminate(), ACTOR)
    assert (await traces.present())[0] is True


async def test_an_end_takes_deadline_and_secrets_and_leaves_work(dsn: str, service: Service, sealer: Sealer):
    sandbox = (await create(service, sealer)).sandbox
    traces = Traces(dsn, sandbox.id)
    assert await traces.present() == (True, {"expiry", "transition"}, True)
    ended = await service.execute(sandbox.id, ANY_TENANT, cmd.Terminate(), ACTOR)
    assert await traces.present() == (True, {"transition"}, False)
    stopping = (await traces.deadlines())["transition"]["fires_at"]
    assert stopping == ended.sandbox.changed_at + timedelta(seconds=Limits().stopping_s)
    await service.execute(sandbox.id, ANY_TENANT, cmd.RecordRemoved(), ACTOR)
    assert await traces.present() == (True, set(), False)


async def test_expiry_takes_deadline_and_secrets_and_leaves_work(
    dsn: str, service: Service, sealer: Sealer, until: Any
):
    sandbox = (await create(service, sealer)).sandbox
    soon = sandbox.created_at + timedelta(milliseconds=600)
    await service.execute(sandbox.id, ANY_TENANT, cmd.Renew(soon), ACTOR)

    async def expired() -> bool:
        return bool((await service.execute(sandbox.id, ANY_TENANT, cmd.Expire(), ACTOR)).events)

    await until(expired)
    loaded = await service.view.load(sandbox.id, ANY_TENANT)
    assert loaded is not None
    assert loaded[0].ending is not None
    assert loaded[0].ending.cause == ev.EndCause.EXPIRED_WHILE_PENDING
    assert loaded[0].ending.at >= soon
    assert await Traces(dsn, sandbox.id).present() == (True, {"transition"}, False)


async def test_a_failure_takes_the_secrets_and_keeps_the_deadline(dsn: str, service: Service, sealer: Sealer):
    sandbox = (await create(service, sealer)).sandbox
    await service.execute(sandbox.id, ANY_TENANT, cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "none"), ACTOR)
    assert await Traces(dsn, sandbox.id).present() == (True, {"expiry"}, False)


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
        cmd.RecordFailure("ensure", "E", "m"),
        cmd.RecordRemoved(),
        cmd.Terminate(),
    ],
}


@pytest.mark.parametrize("way", WAYS)
async def test_all_times_of_one_append_are_one_reading_of_the_databases_clock(dsn: str, service: Service, way: str):
    outcome = await create(service)
    sandbox = outcome.sandbox
    traces = Traces(dsn, sandbox.id)
    phase = sandbox.phase
    for command in [None, *WAYS[way]]:
        if command is not None:
            outcome = await service.execute(sandbox.id, ANY_TENANT, about(sandbox.id, command), ACTOR)
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
        loaded = await service.view.load(sandbox.id, ANY_TENANT)
        assert loaded is not None
        assert loaded[0] == outcome.sandbox, "the answer is the head"
    assert outcome.sandbox.closed_at is not None
    assert phase is Phase.TERMINATED


async def test_several_events_of_one_append_share_their_time_and_stand_in_order(dsn: str, service: Service):
    sandbox = (await create(service)).sandbox
    look = seen(Power.EXITED, end=Exit(0), started_at=sandbox.created_at)
    await service.execute(sandbox.id, ANY_TENANT, about(sandbox.id, cmd.RecordSeen(look)), ACTOR)
    facts = await service.history(sandbox.id, "default")
    assert [ev.REGISTRY.name_of(fact.event) for fact in facts] == [
        "sandbox.requested",
        "sandbox.placed",
        "sandbox.runtime_created",
        "sandbox.started",
        "sandbox.ready",
        "sandbox.runtime_exited",
    ]
    assert [fact.version for fact in facts] == [1, 2, 3, 4, 5, 6]
    positions = [fact.position for fact in facts]
    assert positions == sorted(set(positions))
    assert len({fact.at for fact in facts[:2]}) == len({fact.at for fact in facts[2:]}) == 1
    assert facts[2].at > facts[1].at


async def test_who_and_why_stand_beside_every_event(service: Service):
    meta = Meta(Actor(ActorKind.OPERATOR, "id\u2028", "späť \U0001f600"), "1.0", "request", 7, "2001:db8::1", "a" * 64)
    made = await service.create(uuid4(), TENANT, requested(), None, meta)
    facts = await service.history(made.sandbox.id, "default")
    assert [fact.meta for fact in facts] == [meta, meta]
    assert facts[-1].position == made.position


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
    )
    event = ev.Requested(spec, "f" * 64, {"a": ""}, 86_400 * 36_500, cpu_nanos=500_000_000, memory_bytes=2**50)
    made = await service.create(uuid4(), TENANT, event, None, ACTOR)
    assert (await service.history(made.sandbox.id, "default"))[0].event == event
    loaded = await service.view.load(made.sandbox.id, ANY_TENANT)
    assert loaded is not None
    assert loaded[0] == made.sandbox
    assert msgspec.to_builtins(loaded[0].spec) == msgspec.to_builtins(spec)
