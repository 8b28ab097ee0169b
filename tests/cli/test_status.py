"""`sandledger status` says what is wrong, each kind in its words, and exits 1; and nothing when nothing is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
import uuid_utils.compat
from msgspec.structs import replace

from app.cli import status
from app.domain.engine.decide import RecordLogWentBack, RecordSighting, RecordSilence
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Observed, Part, Power
from app.domain.sandbox.spec import SandboxSpec
from app.domain.snapshot.decide import RecordCommitted, RecordReady
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.settings import Settings
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.queue.reconcile import Failed, Queue
from app.store.stations import Stations
from app.views.overview import MAX_HELD_POSITIONS, MAX_SHOWN
from tests.cli.test_commands import run
from tests.conftest import INSTALLATION, SIGHTING, STATION
from tests.support.sql import connected, insert_event

META = Meta(Actor(ActorKind.API_KEY, "k", "default"), "test")
ENGINE = SIGHTING.name


class World:
    """An installation on which nothing is wrong, and what a trouble may turn."""

    def __init__(self, dsn: str, database: Database, service: Service, engines: Engines) -> None:
        self.dsn = dsn
        self.database = database
        self.service = service
        self.engines = engines

    async def create(self, timeout_s: int | None = None) -> UUID:
        sandbox_id = uuid_utils.compat.uuid7()
        event = ev.Requested(SandboxSpec("x", ("sleep", "1")), "f", timeout_s=timeout_s)
        await self.service.create(sandbox_id, "default", event, None, META)
        return sandbox_id

    async def owner(self, *statements: str) -> None:
        async with connected(self.dsn, owner=True) as connection:
            for statement in statements:
                await connection.execute(statement)


Trouble = Callable[[World], AbstractAsyncContextManager[None]]


@pytest.fixture
async def world(dsn: str, database: Database, service: Service, signal: Signal) -> World:
    engines = Engines(database, signal, INSTALLATION, service.engines)
    await service.engines.saw(ENGINE, throttle=0)
    return World(dsn, database, service, engines)


async def told(settings: Settings, capsys: pytest.CaptureFixture[str]) -> tuple[bool, dict[str, Any], str]:
    """Whether all is well, as JSON, and as text. Both must say the same."""
    well = await status.show(settings, print, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert await status.show(settings, print, as_json=False) is well is (not found["problems"])
    text = capsys.readouterr().out
    assert text.count("problem: ") == len(found["problems"])
    assert ("nothing is wrong" in text) is well
    return well, found, text


async def test_nothing_is_wrong(world: World, settings: Settings, capsys: pytest.CaptureFixture[str]):
    await world.create()
    well, found, text = await told(settings, capsys)
    assert well, found["problems"]
    (engine,) = found["engines"]
    assert (engine["name"], engine["state"], engine["sandboxes"]) == (ENGINE, "up", 1)
    assert found["phases"] == {"Pending": 1}
    (queue,) = found["queue"]
    assert (queue["engine"], queue["rows"], queue["due"], queue["claimed"]) == (ENGINE, 1, 1, 0)
    assert [(each["name"], each["rows"], each["overdue"]) for each in found["deadlines"]] == [("transition", 1, 0)]
    assert found["log"]["partitions_ahead"] >= 1
    for part in ("Engines", "Queue", "Deadlines", ENGINE, "sandboxes: Pending 1", "partitions ahead"):
        assert part in text


@asynccontextmanager
async def dark(world: World) -> AsyncGenerator[None]:
    await world.engines.execute(
        ENGINE, RecordSilence(datetime.now(UTC), "cannot connect [/run/x.sock] \x1b[31m"), STATION
    )
    yield


@asynccontextmanager
async def another(world: World) -> AsyncGenerator[None]:
    await world.engines.execute(ENGINE, RecordSighting(replace(SIGHTING, mark="other-mark")), STATION)
    yield


@asynccontextmanager
async def went_back(world: World) -> AsyncGenerator[None]:
    await world.engines.execute(ENGINE, RecordLogWentBack(10, 5000), STATION)
    yield


@asynccontextmanager
async def nobody(world: World) -> AsyncGenerator[None]:
    await world.owner("UPDATE engines SET last_seen_at = clock_timestamp() - interval '20 seconds'")
    yield


@asynccontextmanager
async def never(world: World) -> AsyncGenerator[None]:
    await world.owner("UPDATE engines SET last_seen_at = NULL")
    yield


@asynccontextmanager
async def late(world: World) -> AsyncGenerator[None]:
    await world.create()
    await world.owner("UPDATE reconcile_queue SET due_at = clock_timestamp() - interval '40 seconds'")
    yield


@asynccontextmanager
async def overdue(world: World) -> AsyncGenerator[None]:
    """For as long as it is looked at; a deadline that differs from its state is drift."""
    await world.create(600)
    move = "UPDATE deadlines SET fires_at = fires_at {} interval '1000 seconds' WHERE name = 'expiry'"
    await world.owner(move.format("-"))
    yield
    await world.owner(move.format("+"))


@asynccontextmanager
async def stopping(world: World) -> AsyncGenerator[None]:
    sandbox_id = await world.create()
    await world.service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), META)
    yield


async def fail(world: World, reason: str, message: str) -> UUID:
    """A sandbox whose third attempt failed."""
    sandbox_id = await world.create()
    queue = Queue(world.database, ENGINE)
    (claim,) = (await queue.claim(1, lease=60, tenant_slots=9)).claims
    assert claim.stream_id == sandbox_id
    await queue.defer(claim, 60, failed=Failed(3, reason, message))
    return sandbox_id


@asynccontextmanager
async def failing(world: World) -> AsyncGenerator[None]:
    await fail(world, "START_FAILED", "no such device [/dev/kvm] \x1b[31m")
    yield


@asynccontextmanager
async def failing_among_those_of_users(world: World) -> AsyncGenerator[None]:
    """More of users than are listed, and all of them older."""
    for _ in range(MAX_SHOWN):
        await fail(world, "IMAGE_NOT_FOUND", "no such image")
    await fail(world, "START_FAILED", "no such device")
    yield


@asynccontextmanager
async def many_stopping(world: World) -> AsyncGenerator[None]:
    """More than are listed."""
    for _ in range(MAX_SHOWN + 1):
        await world.service.execute(await world.create(), ANY_TENANT, cmd.Terminate(), META)
    yield


@asynccontextmanager
async def last_partition(world: World) -> AsyncGenerator[None]:
    await world.owner(*await _spare(world))
    yield


async def _spare(world: World) -> list[str]:
    """Take away every partition above the one in use."""
    async with connected(world.dsn, owner=True) as owner:
        used = await owner.fetchval("SELECT tableoid::regclass::text FROM events ORDER BY position DESC LIMIT 1")
        rows = await owner.fetch(
            "SELECT inhrelid::regclass::text AS name FROM pg_inherits WHERE inhparent = 'sandledger.events'::regclass"
        )
    return [f"DROP TABLE {row['name']}" for row in rows if row["name"] > used]


@asynccontextmanager
async def hanging(world: World) -> AsyncGenerator[None]:
    async with connected(world.dsn) as writer:
        slow = writer.transaction()
        await slow.start()
        await insert_event(writer)
        await world.owner(
            f"SELECT nextval('sandledger.events_position') FROM generate_series(1, {MAX_HELD_POSITIONS + 5})"
        )
        yield
        await slow.rollback()


async def snapshot(world: World, *, ready: bool) -> UUID:
    """One that is Creating, or was deleted and is Deleting."""
    sandbox_id = await world.create()
    seen = Observed(sandbox_id, (Part("main", "r1", "x"),), Power.RUNNING)
    await world.service.execute(sandbox_id, ANY_TENANT, cmd.RecordSeen(seen), META)
    snapshots, snapshot_id = world.service.snapshots, uuid_utils.compat.uuid7()
    await snapshots.create(snapshot_id, "default", sandbox_id, None, META)
    if ready:
        for command in (RecordCommitted("sha256:raw", "sha256:l"), RecordReady("sha256:c", 1)):
            await snapshots.execute(snapshot_id, ANY_TENANT, command, META)
        await snapshots.delete(snapshot_id, "default", META)
    await world.owner(
        f"UPDATE reconcile_queue SET attempts = 3, last_reason = 'COMMIT_FAILED', last_error = 'no space left \x1b[31m'"
        f" WHERE stream_id = '{snapshot_id}'",
        f"DELETE FROM reconcile_queue WHERE stream_id = '{sandbox_id}'",
    )
    return snapshot_id


@asynccontextmanager
async def snapshot_failing(world: World) -> AsyncGenerator[None]:
    await snapshot(world, ready=False)
    yield


@asynccontextmanager
async def snapshot_deleting(world: World) -> AsyncGenerator[None]:
    await snapshot(world, ready=True)
    await world.owner("UPDATE reconcile_queue SET attempts = 0")
    yield


@asynccontextmanager
async def deaf(world: World) -> AsyncGenerator[None]:
    """A worker whose engine has never answered. Nothing of it is in the log."""
    said = Stations(world.database, "w9", "host-9", "other")
    await said.say("no permission for the socket \x1b[31m")
    yield
    await said.say(None)


TROUBLES: list[tuple[Trouble, str]] = [
    (dark, f"engine {ENGINE} is dark: cannot connect [/run/x.sock] "),
    (another, f"engine {ENGINE} is mismatch: MARK_OTHER"),
    (went_back, f"engine {ENGINE} is mismatch: LOG_WENT_BACK"),
    (nobody, f"no worker serves engine {ENGINE}: last seen 2"),
    (never, f"no worker serves engine {ENGINE}: last seen never"),
    (late, f"queue of engine {ENGINE}: 1 due, the oldest for 4"),
    (overdue, "1 deadlines expiry have not fired, the oldest for "),
    (stopping, "1 sandboxes are stuck or failing"),
    (failing, "1 sandboxes are stuck or failing"),
    (failing_among_those_of_users, "1 sandboxes are stuck or failing"),
    (many_stopping, f"at least {MAX_SHOWN} sandboxes are stuck or failing"),
    (last_partition, "no spare partition of the log is left"),
    (snapshot_failing, "1 snapshots are stuck or failing"),
    (snapshot_deleting, "1 snapshots are stuck or failing"),
    (deaf, "worker host-9 cannot use engine other: no permission for the socket "),
    (hanging, "the log's horizon is 1"),
]


@pytest.mark.parametrize(("trouble", "problem"), TROUBLES, ids=lambda value: getattr(value, "__name__", ""))
async def test_each_kind_of_problem_is_named(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str], trouble: Trouble, problem: str
):
    limits = replace(settings.sandledger.deadlines, stopping_seconds=0)
    impatient = replace(settings, sandledger=replace(settings.sandledger, deadlines=limits))
    async with trouble(world):
        well, found, text = await told(impatient, capsys)
    assert not well
    (said,) = found["problems"]
    assert said.startswith(problem)
    assert f"problem: {problem}" in text
    assert "\x1b" not in text, "an engine's text drives no terminal"


async def test_stuck_sandboxes_are_listed_with_why(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    async with failing(world):
        _, found, text = await told(settings, capsys)
    (line,) = found["stuck"]
    assert (line["phase"], line["attempts"], line["reason"], line["tenant"]) == (
        "Pending",
        3,
        "START_FAILED",
        "default",
    )
    assert f"{line['id']} Pending for " in text
    assert "3 attempts; START_FAILED: no such device [/dev/kvm] \\x1b[31m" in text


@pytest.mark.parametrize(
    "reason",
    [
        "IMAGE_NOT_FOUND",
        "IMAGE_AUTH_REQUIRED",
        "IMAGE_AUTH_FAILED",
        "IMAGE_PLATFORM_MISMATCH",
        "IMAGE_REFERENCE_INVALID",
        "ENTRYPOINT_NOT_FOUND",
        "ENTRYPOINT_NOT_EXECUTABLE",
        "START_REJECTED",
        "SPEC_REJECTED",
    ],
)
async def test_what_only_a_user_can_mend_is_shown_and_is_no_problem(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str], reason: str
):
    sandbox_id = await fail(world, reason, "as the user asked")
    well, found, text = await told(settings, capsys)
    assert well, found["problems"]
    (line,) = found["stuck"]
    assert (line["id"], line["reason"], line["users"]) == (str(sandbox_id), reason, True)
    assert "failing for reasons that only their users can mend" in text
    assert f"{sandbox_id} Pending for " in text


@pytest.mark.parametrize(
    "reason",
    [
        "RUNTIME_UNAVAILABLE",
        "INTERNAL_ERROR",
        "SECRETS_SEALED",
        "NAME_TAKEN",
        # What a host gives to every pull: no DNS, a full disk, a rate limit, a slow link.
        "REGISTRY_UNREACHABLE",
        "IMAGE_PULL_FAILED",
        "REGISTRY_RATE_LIMITED",
        "IMAGE_PULL_TIMEOUT",
        "MY_IMAGE_X",
        "IMAGE_NOT_FOUND_X",
        "START_REJECTED_X",
    ],
)
async def test_all_other_reasons_are_the_operators(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str], reason: str
):
    await fail(world, reason, "as it is")
    well, found, _ = await told(settings, capsys)
    assert (well, [line["users"] for line in found["stuck"]]) == (False, [False])


async def test_a_removal_that_lasts_too_long_is_the_operators_whatever_failed_before(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    sandbox_id = await fail(world, "IMAGE_NOT_FOUND", "no such image")
    await world.service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), META)
    await world.owner("UPDATE reconcile_queue SET last_reason = 'IMAGE_NOT_FOUND'")
    limits = replace(settings.sandledger.deadlines, stopping_seconds=0)
    well, found, _ = await told(replace(settings, sandledger=replace(settings.sandledger, deadlines=limits)), capsys)
    assert (well, [line["users"] for line in found["stuck"]]) == (False, [False])


async def test_a_stopping_sandbox_has_the_operators_time(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    async with stopping(world):
        well, found, _ = await told(settings, capsys)
    assert (well, found["stuck"]) == (True, [])


async def test_a_stuck_snapshot_is_listed_with_why(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    snapshot_id = await snapshot(world, ready=False)
    _, found, text = await told(settings, capsys)
    (line,) = found["stuck"]
    assert (line["kind"], line["id"], line["phase"], line["reason"]) == (
        "snapshot",
        str(snapshot_id),
        "Creating",
        "COMMIT_FAILED",
    )
    assert f"snapshot {snapshot_id} Creating for " in text
    await world.owner("UPDATE reconcile_queue SET last_reason = 'SOURCE_FREEZING'")
    well, found, _ = await told(settings, capsys)
    assert (well, found["stuck"]) == (True, []), "it takes its turn"


async def test_what_a_worker_said_is_forgotten_when_it_is_gone(
    world: World, settings: Settings, capsys: pytest.CaptureFixture[str]
):
    await Stations(world.database, "w9", "host-9", "other").say("no contact yet")
    assert not (await told(settings, capsys))[0]
    await world.owner("UPDATE stations SET said_at = said_at - interval '31 seconds'")
    assert (await told(settings, capsys))[0]
    await Stations(world.database, "w8", "host-8", "other").say(None)
    async with connected(world.dsn, owner=True) as owner:
        assert await owner.fetchval("SELECT count(*) FROM stations") == 0


async def test_no_engine_is_a_problem(dsn: str, settings: Settings, capsys: pytest.CaptureFixture[str]):
    well, found, _ = await told(settings, capsys)
    assert not well
    assert found["problems"] == ["no engine is registered: start a worker that can reach one"]


async def test_the_exit_code(world: World):
    async def code(*words: str) -> tuple[int, str]:
        done = await asyncio.to_thread(run, "status", *words, OPENSANDBOX_STORE_POSTGRESQL_DSN=world.dsn)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout

    await world.service.engines.saw(ENGINE, throttle=0)
    fine, shown = await code("--json")
    assert (fine, json.loads(shown)["problems"]) == (0, [])
    async with nobody(world):
        assert (await code("--json"))[0] == 1
        failed, shown = await code()
    assert failed == 1
    assert "problem: no worker serves engine" in shown
