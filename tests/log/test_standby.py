"""A standby replays commits in order but shows neither announcements nor the sequence as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.errors import StoreUnavailable
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from app.views.listing import Listing, Wanted
from app.views.totals import IDENTITY_SECONDS
from tests.conftest import INSTALLATION, SIGHTING, STATION
from tests.support.sql import connected, insert_event
from tests.support.standby import Pair, pair
from tests.support.stream import META, TENANT, requested

NAIVE = """
CREATE FUNCTION naive_horizon() RETURNS bigint LANGUAGE sql VOLATILE AS $$
    SELECT least(
        (SELECT last_value FROM events_position),
        (SELECT min(((classid::bigint & 65535) << 32) | objid::bigint) FROM pg_locks
          WHERE locktype = 'advisory' AND objsubid = 1 AND (classid::bigint >> 16) = 21324))
$$
"""
"""As it was: it does not ask where it runs."""
READ = "SELECT position FROM events WHERE position > $1 AND position <= $2 ORDER BY position"


@pytest.fixture
def servers() -> Iterator[Pair]:
    with pair() as made:
        yield made


async def test_a_standby_names_no_horizon_and_a_reader_that_names_one_loses_events(servers: Pair):
    async with (
        connected(servers.primary.dsn, owner=True) as owner,
        connected(servers.primary.dsn) as slow,
        connected(servers.primary.dsn) as quick,
    ):
        await owner.execute(NAIVE)
        transaction = slow.transaction()
        await transaction.start()
        hidden = await insert_event(slow)
        shown = await insert_event(quick)
        assert hidden < shown
        await servers.replayed()
        async with connected(servers.standby_dsn, owner=True) as standby:
            horizon = await standby.fetchval("SELECT naive_horizon()")
            assert horizon >= shown, "neither the writer's announcement nor its position is known here"
            assert [row[0] for row in await standby.fetch(READ, 0, horizon)] == [shown]
            await transaction.commit()
            await servers.replayed()
            assert [row[0] for row in await standby.fetch(READ, 0, horizon)] == [hidden, shown]
            assert await standby.fetch(READ, horizon, horizon + 100) == [], (
                "the reader went on; it never sees the first"
            )

    database = Database(servers.standby_dsn)
    try:
        log = EventLog(database)
        with pytest.raises(StoreUnavailable):
            await log.read_after(0)
        with pytest.raises(StoreUnavailable):
            await log.horizon()
        # One stream is read by version, which needs no horizon.
        async with connected(servers.standby_dsn) as standby:
            stream = await standby.fetchval("SELECT stream_id FROM events WHERE position = $1", hidden)
        assert [event.position for event in await log.history(stream, TENANT)] == [hidden]
    finally:
        await database.close()


async def test_totals_are_derived_again_after_a_failover_to_a_standby_that_was_behind(servers: Pair):
    database = Database(servers.dsn)
    try:
        signal = Signal(database)
        service = Service(database, signal)
        await Engines(database, signal, INSTALLATION, service.engines).register(SIGHTING, STATION)
        listing = Listing(database, EventLog(database, remember=0))

        async def created(count: int) -> None:
            for _ in range(count):
                await service.create(uuid4(), TENANT, requested(), None, META)

        async def shown() -> tuple[int, int]:
            page = await listing.page(Wanted(TENANT), size=200)
            return page.total, len(page.sandboxes)

        await created(11)
        await servers.replayed()
        await servers.cut_off()
        await created(20)
        assert await shown() == (31, 31)
        base = await listing.totals.advance()
        before = await service.log.identity()
        assert await shown() == (31, 31)

        await servers.fail_over()
        after = await EventLog(database).identity()
        assert after.timeline > before.timeline
        assert base.of(TENANT).visible == 31, "this base stays wrong for ever"
        # Writing goes on until the log is longer than it was, so that its length alone tells nothing.
        service.engines.forget()
        await created(30)
        assert (await EventLog(database).identity()).last_position > before.last_position
        async with asyncio.timeout(30 * IDENTITY_SECONDS):
            while listing.totals.derived == 1:  # the identity is compared once in a while
                await shown()
        assert await shown() == (41, 41)
        loaded = (await listing.page(Wanted(TENANT), size=1)).sandboxes[0]
        await service.execute(loaded.id, ANY_TENANT, cmd.Terminate(), META)
        assert await shown() == (40, 40)
    finally:
        await database.close()
