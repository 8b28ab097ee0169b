"""The announced horizon, against a real PostgreSQL: nothing missed, nothing twice, streams in order.

Beside the reader that keeps the protocol runs one that only remembers its last position. It must miss events in the
same run, or the run has proved nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import asyncpg

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.store import EventLog, StoredEvent
from tests.support.sql import INSERT_EVENT, META, connected, insert_event
from tests.support.stream import META as ACTOR
from tests.support.stream import TENANT, requested

WRITERS = 24
ROUNDS = 80
STREAMS = 40
"""More than writers, so that some wait for each other's head rows and some do not."""
MOST_RUNS = 3
EARLY = (
    "INSERT INTO refusals (tenant, command, status, code, message, meta) "
    f"VALUES ('default', 'test', 400, 'X', 'early xid', '{META}')"
)
KILLED = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""How asyncpg says that a backend was terminated, depending on where it was."""


@dataclass
class Storm:
    """What the writers of one run share."""

    dsn: str
    streams: list[UUID]
    chance: random.Random
    pids: set[int] = field(default_factory=set)
    killed: int = 0
    rolled_back: int = 0


class Abandoned(Exception):
    """A writer changed its mind."""


async def one_transaction(storm: Storm, connection: asyncpg.Connection) -> None:
    """Head, events, with time passing wherever it can: before and after positions are drawn."""
    chance = storm.chance
    async with connection.transaction():
        if chance.random() < 0.5:
            await connection.execute(EARLY)
        count = chance.randint(1, 3)
        stream = chance.choice(storm.streams)
        before = await connection.fetchval("SELECT version FROM sandboxes WHERE id = $1 FOR UPDATE", stream)
        position = None
        for number in range(before + 1, before + count + 1):
            await asyncio.sleep(chance.random() * 0.004)
            position = await connection.fetchval(INSERT_EVENT, stream, number)
        await connection.execute(
            "UPDATE sandboxes SET version = version + $2, position = $3 WHERE id = $1", stream, count, position
        )
        await asyncio.sleep(chance.random() * 0.008)
        if chance.random() < 0.05:
            storm.rolled_back += 1
            raise Abandoned


async def writer(storm: Storm) -> None:
    rounds = ROUNDS
    while rounds:
        async with connected(storm.dsn) as connection:
            pid = connection.get_server_pid()
            storm.pids.add(pid)
            try:
                while rounds:
                    rounds -= 1
                    with suppress(Abandoned):
                        await one_transaction(storm, connection)
            except KILLED:
                storm.killed += 1
            finally:
                storm.pids.discard(pid)


async def killer(storm: Storm) -> None:
    """Terminates a writer now and then, wherever it is in its transaction."""
    async with connected(storm.dsn, owner=True) as connection:
        while True:
            await asyncio.sleep(0.05)
            if storm.pids:
                pid = storm.chance.choice(sorted(storm.pids))
                await connection.fetchval("SELECT pg_terminate_backend($1)", pid)


async def service_writer(service: Service) -> None:
    """The real append, amid the others."""
    for _ in range(ROUNDS):
        made = await service.create(uuid4(), TENANT, requested(), None, ACTOR)
        await service.execute(made.sandbox.id, ANY_TENANT, cmd.PatchMetadata({"a": "b"}), ACTOR)


async def tail(log: EventLog, done: asyncio.Event, chance: random.Random) -> list[StoredEvent]:
    """By the protocol, in pages of every size."""
    found: list[StoredEvent] = []
    position = 0
    while True:
        last_look = done.is_set()
        events, position = await log.read_after(position, limit=chance.randint(1, 60))
        found += events
        if last_look and not events and position >= await log.horizon():
            return found
        await asyncio.sleep(0)


async def naive_tail(dsn: str, done: asyncio.Event) -> list[int]:
    """What everybody writes first."""
    found: list[int] = []
    async with connected(dsn) as connection:
        while True:
            last_look = done.is_set()
            after = found[-1] if found else 0
            rows = await connection.fetch("SELECT position FROM events WHERE position > $1 ORDER BY position", after)
            found += [row[0] for row in rows]
            if last_look and not rows:
                return found


async def storm_run(dsn: str, service: Service, log: EventLog, seed: int) -> tuple[int, int, Storm]:
    """One run: (committed, missed by the naive reader). The reader of the protocol is judged here."""
    streams = [(await service.create(uuid4(), TENANT, requested(), None, ACTOR)).sandbox.id for _ in range(STREAMS)]
    storm = Storm(dsn, streams, random.Random(seed))
    done = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tailed = tasks.create_task(tail(log, done, storm.chance))
        naive = tasks.create_task(naive_tail(dsn, done))
        killing = tasks.create_task(killer(storm))
        async with asyncio.TaskGroup() as writers:
            for _ in range(WRITERS):
                writers.create_task(writer(storm))
            writers.create_task(service_writer(service))
        killing.cancel()
        done.set()
    async with connected(dsn) as connection:
        rows = await connection.fetch("SELECT position, stream_id, version FROM events ORDER BY position")
    committed = [row[0] for row in rows]
    seen = [event.position for event in tailed.result()]
    assert [p for p, times in Counter(seen).items() if times > 1] == [], "seen twice"
    assert sorted(set(committed) - set(seen)) == [], "missed"
    assert seen == committed
    versions: dict[UUID, int] = {}
    for event in tailed.result():
        assert event.version == versions.get(event.stream_id, 0) + 1, "a stream out of order"
        versions[event.stream_id] = event.version
    return len(committed), len(set(committed) - set(naive.result())), storm


async def test_a_tailing_reader_sees_each_committed_event_once_where_a_naive_one_misses_some(
    dsn: str, database: Database, service: Service
):
    log = EventLog(database)
    for seed in range(MOST_RUNS):
        committed, missed, storm = await storm_run(dsn, service, log, seed)
        print(f"{committed} events, {storm.killed} killed, {storm.rolled_back} rolled back, naive missed {missed}")
        assert storm.killed > 0
        assert storm.rolled_back > 0
        assert committed > WRITERS * ROUNDS / 2
        if missed:
            return
    raise AssertionError(f"the naive reader missed nothing in {MOST_RUNS} runs: this test proves nothing")


async def test_an_open_transaction_holds_the_horizon_below_what_it_wrote(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn) as slow, connected(bare_dsn) as quick:
        first = await insert_event(quick)
        transaction = slow.transaction()
        await transaction.start()
        hidden = await insert_event(slow)
        later = await insert_event(quick)
        assert first < hidden < later

        events, position = await bare_log.read_after(0)
        assert [event.position for event in events] == [first]
        assert first <= position < hidden
        await insert_event(slow)
        assert (await bare_log.read_after(position))[0] == [], "a second insert must not lift its own announcement"

        await transaction.commit()
        events, position = await bare_log.read_after(position)
        assert [event.position for event in events] == [hidden, later, later + 1]
        assert await bare_log.read_after(position) == ([], position)


async def test_the_horizon_moves_on_after_rollback_and_kill(bare_dsn: str, bare_log: EventLog, until):
    async with connected(bare_dsn) as slow, connected(bare_dsn, owner=True) as owner:
        transaction = slow.transaction()
        await transaction.start()
        lost = await insert_event(slow)
        await transaction.rollback()
        assert await bare_log.horizon() == lost

        await slow.transaction().start()
        lost = await insert_event(slow)
        assert await bare_log.horizon() < lost
        await owner.fetchval("SELECT pg_terminate_backend($1)", slow.get_server_pid())

        async def moved() -> bool:
            return await bare_log.horizon() >= lost

        await until(moved)
        assert (await bare_log.read_after(0))[0] == []


async def test_an_announcement_in_another_database_holds_nobody_back(
    bare_dsn: str, bare_log: EventLog, dsn: str, service: Service
):
    async with connected(bare_dsn) as other, other.transaction():
        await insert_event(other)
        made = await service.create(uuid4(), TENANT, requested(), None, ACTOR)
        assert (await service.log.read_after(0))[0][-1].position == made.position


async def test_the_very_first_event_is_seen(bare_dsn: str, bare_log: EventLog):
    events, position = await bare_log.read_after(0)
    assert events == []
    async with connected(bare_dsn) as connection:
        first = await insert_event(connection)
        assert [event.position for event in (await bare_log.read_after(position))[0]] == [first]


async def test_without_the_burnt_value_the_very_first_event_would_be_missed(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn, owner=True) as owner, connected(bare_dsn) as connection:
        await owner.execute("ALTER SEQUENCE events_position RESTART")  # as if never burnt
        _, position = await bare_log.read_after(0)
        first = await insert_event(connection)
        assert (first, position) == (1, 1)
        assert (await bare_log.read_after(position))[0] == []


async def test_positions_are_handed_out_one_at_a_time(bare_dsn: str):
    async with connected(bare_dsn) as connection:
        row = await connection.fetchrow(
            "SELECT seqcache, seqincrement, seqcycle FROM pg_sequence WHERE seqrelid = 'events_position'::regclass"
        )
        assert tuple(row) == (1, 1, False)


async def test_a_reader_far_behind_pages_through_everything(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn) as connection:
        written = [await insert_event(connection) for _ in range(25)]
    found: list[int] = []
    position = 0
    while True:
        events, position = await bare_log.read_after(position, limit=10)
        if not events:
            break
        found += [event.position for event in events]
    assert found == written
    assert position == await bare_log.horizon()


async def test_horizon_and_rows_may_not_share_a_snapshot(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn) as reader, connected(bare_dsn) as writer:
        async with reader.transaction(isolation="repeatable_read"):
            await reader.fetchval("SELECT count(*) FROM events")
            position = await insert_event(writer)
            assert await reader.fetchval("SELECT log_horizon()") >= position
            assert await reader.fetchval("SELECT count(*) FROM events WHERE position <= $1", position) == 0
        assert (await bare_log.read_after(0))[0][0].position == position
