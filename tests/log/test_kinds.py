"""One log, one appender, several aggregates: sandboxes, engines, and the acts of administrators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from app.domain.engine import events as ev
from app.domain.engine.decide import (
    MARK_OTHER,
    RecordLeftover,
    RecordSighting,
    RecordSilence,
    Sighting,
)
from app.domain.engine.state import Engine, EngineState, fold, stream_of
from app.domain.operations import REGISTRY, MasterKeyRotated
from app.domain.stream import PLATFORM_TENANT
from app.service.engines import Engines
from app.service.operations import OperationsLog
from app.service.sandboxes import Service
from app.service.streams import decoded
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from app.views.engines import EnginesView
from tests.conftest import INSTALLATION
from tests.support.sql import connected
from tests.support.stream import META, TENANT, requested

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
SIGHTING = Sighting("second", "docker", "engine-id", "mark-1", "29.0", "1.50")
SERVERS = 8


@pytest.fixture
async def servers(dsn: str) -> AsyncIterator[list[Engines]]:
    """Processes that reach one engine."""
    databases = [Database(dsn, max_size=2) for _ in range(SERVERS)]
    yield [Engines(database, Signal(database), INSTALLATION, EnginesView(database)) for database in databases]
    for database in databases:
        await database.close()


async def history(database: Database, engine_id: UUID) -> list[ev.Recorded]:
    stored = EventLog(database).whole_history(engine_id, PLATFORM_TENANT)
    return [decoded(ev.REGISTRY, one) async for one in stored]


class SlowAnswers(Database):
    """The answer of a read is on its way until somebody lets it arrive."""

    def __init__(self, dsn: str) -> None:
        super().__init__(dsn)
        self.read, self.arrives = asyncio.Event(), asyncio.Event()

    async def fetch(self, statement: Statement, **values: Any) -> Any:
        rows = await super().fetch(statement, **values)
        self.read.set()
        await self.arrives.wait()
        return rows


async def test_a_read_that_a_registration_overtook_is_not_kept(dsn: str, database: Database, signal: Signal):
    """Else a worker that has just found its engine tells sandboxes for a second that there is none."""
    slow = SlowAnswers(dsn)
    view = EnginesView(slow)
    before = asyncio.create_task(view.known())
    await slow.read.wait()
    await Engines(database, signal, INSTALLATION, EnginesView(database)).register(SIGHTING, META)
    view.forget()  # as a registration in this process does
    slow.arrives.set()
    assert [engine.name for engine in await before] == ["second"]
    assert [engine.name for engine in await view.known()] == ["second"]
    await slow.close()


async def test_servers_that_meet_an_engine_at_once_register_it_once(database: Database, servers: list[Engines]):
    found = await asyncio.gather(*(server.register(SIGHTING, META) for server in servers))
    assert len(set(map(msgspec.json.encode, found))) == 1
    assert found[0].id == stream_of(INSTALLATION, "second")
    events = [one.event for one in await history(database, found[0].id)]
    assert [type(event) for event in events] == [ev.Registered, ev.Seen]


async def test_of_two_engines_with_one_name_the_first_is_registered_and_stays_up(
    database: Database, servers: list[Engines]
):
    """One of two servers starts with a stale address, and both find no engine registered yet."""
    first = await servers[0].register(SIGHTING, META)
    second = await servers[1].register(msgspec.structs.replace(SIGHTING, mark="mark-2"), META)
    assert (second.mark, second.state) == ("mark-1", EngineState.UP)
    events = [one.event for one in await history(database, first.id)]
    assert [type(event) for event in events] == [ev.Registered, ev.Seen]


async def test_servers_that_see_one_change_record_it_once(database: Database, servers: list[Engines]):
    registered = await servers[0].register(SIGHTING, META)
    newer = RecordSighting(msgspec.structs.replace(SIGHTING, version="30.0"))
    after = await asyncio.gather(*(server.execute("second", newer, META) for server in servers))
    assert {engine.server_version for engine in after} == {"30.0"}
    assert len(await history(database, registered.id)) == 3


async def test_servers_that_record_different_things_lose_none(database: Database, servers: list[Engines]):
    registered = await servers[0].register(SIGHTING, META)
    await asyncio.gather(
        *(server.execute("second", RecordLeftover("main", f"n{n}"), META) for n, server in enumerate(servers))
    )
    names = [
        one.event.name for one in await history(database, registered.id) if isinstance(one.event, ev.LeftoverRemoved)
    ]
    assert sorted(names) == [f"n{n}" for n in range(SERVERS)]


async def test_an_engine_goes_and_comes_back(servers: list[Engines]):
    one, two = servers[:2]
    begun = await one.register(SIGHTING, META)
    dark = await one.execute("second", RecordSilence(begun.state_since, "no answer"), META)
    assert (dark.state, dark.trouble) == (EngineState.DARK, "no answer")
    assert dark.state_since > begun.state_since
    again = await two.execute("second", RecordSighting(SIGHTING), META)
    assert (again.state, again.trouble) == (EngineState.UP, "")
    stranger = msgspec.structs.replace(SIGHTING, mark="mark-2")
    wrong = await two.execute("second", RecordSighting(stranger), META)
    assert wrong.state is EngineState.MISMATCH
    assert wrong.trouble.startswith(MARK_OTHER)
    assert await two.execute("second", RecordSighting(stranger), META) == wrong, "the same again is no event"
    assert await one.load("second") == wrong


async def test_what_is_not_folded_moves_under_an_append_that_waits(dsn: str, servers: list[Engines], until: Until):
    """A worker writes `last_seen_at` without a version. The append that waited for it still finds its row."""
    begun = await servers[0].register(SIGHTING, META)
    async with connected(dsn) as worker, connected(dsn, owner=True) as watcher:
        await worker.execute("BEGIN")
        await worker.execute("UPDATE engines SET last_seen_at = clock_timestamp() WHERE id = $1", begun.id)
        waiting = asyncio.create_task(servers[1].execute("second", RecordSilence(begun.state_since, "no"), META))

        async def waits() -> bool:
            return bool(
                await watcher.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND wait_event_type = 'Lock'"
                )
            )

        await until(waits)
        await worker.execute("COMMIT")
        after = await waiting
        row = await worker.fetchrow("SELECT version, state, last_seen_at FROM engines WHERE id = $1", begun.id)
    assert after.version == begun.version + 1
    assert (row["version"], row["state"]) == (after.version, "dark")
    assert row["last_seen_at"] is not None


async def test_one_log_holds_all_kinds_in_one_order(database: Database, service: Service, servers: list[Engines]):
    made = await service.create(uuid4(), TENANT, requested(), None, META)
    engine = await servers[0].register(SIGHTING, META)
    await OperationsLog(database, INSTALLATION).record(MasterKeyRotated("a", "b", 1), META)
    events, position = await service.log.read_after(0)
    assert position == events[-1].position
    of = {event.stream_id: (event.kind, event.tenant) for event in events}
    assert of[made.sandbox.id] == ("sandbox", TENANT)
    assert of[engine.id] == ("engine", PLATFORM_TENANT)
    assert of[INSTALLATION] == ("operations", PLATFORM_TENANT)
    assert {event.type.partition(".")[0] for event in events} == {"sandbox", "engine", "operations"}
    assert all(event.type.startswith(f"{event.kind}.") for event in events)
    positions = [event.position for event in events]
    assert positions == sorted(set(positions))


async def test_administrators_at_once_all_stand_in_the_operations_stream(dsn: str, database: Database):
    databases = [Database(dsn, max_size=1) for _ in range(SERVERS)]
    try:
        states = await asyncio.gather(
            *(
                OperationsLog(one, INSTALLATION).record(MasterKeyRotated(f"old{n}", "new", n), META)
                for n, one in enumerate(databases)
            )
        )
    finally:
        for one in databases:
            await one.close()
    assert sorted(state.version for state in states) == list(range(1, SERVERS + 1))
    stored = await EventLog(database).history(INSTALLATION, PLATFORM_TENANT)
    events = [decoded(REGISTRY, one).event for one in stored]
    assert {event.old_key_id for event in events} == {f"old{n}" for n in range(SERVERS)}


async def test_more_servers_than_attempts_are_all_served(dsn: str, database: Database, servers: list[Engines]):
    """Each round one of them wins: a bound on attempts is a bound on servers."""
    begun = await servers[0].register(SIGHTING, META)
    many = [server for server in servers for _ in range(3)]
    await asyncio.gather(
        *(server.execute("second", RecordLeftover("main", f"m{n}"), META) for n, server in enumerate(many))
    )
    folded = fold(await history(database, begun.id))
    assert isinstance(folded, Engine)
    assert folded.version == begun.version + len(many)


async def test_times_of_one_stream_rise(database: Database, servers: list[Engines]):
    begun = await servers[0].register(SIGHTING, META)
    for state in range(6):
        command = RecordSighting(SIGHTING) if state % 2 else RecordSilence(begun.state_since, "no")
        await servers[state % 2].execute("second", command, META)
    times = [one.at for one in await history(database, begun.id)]
    assert all(later - earlier >= timedelta(0) for earlier, later in pairwise(times))
