"""Totals without counting: exact at every moment, counted once a process, and derived again only for another log."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import uuid4

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.embedded.account import account_for, programs_for
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from app.views.listing import MAX_COUNTED, Listing, Wanted
from app.views.totals import MAX_EVENTS, MOVE_AFTER_EVENTS
from tests.log.test_lists import FILL
from tests.support.sql import META as TEXT_META
from tests.support.sql import connected, insert_event
from tests.support.stream import META, TENANT, requested

CALLS = "SELECT calls FROM pg_stat_user_functions WHERE funcname = 'log_horizon'"


@pytest.fixture
async def listing(database: Database) -> Listing:
    """Asks for the horizon each time, so that a base stands where the test has brought the log."""
    return Listing(database, EventLog(database, remember=0))


async def created(service: Service, count: int, tenant: str = TENANT) -> None:
    for _ in range(count):
        await service.create(uuid4(), tenant, requested(), None, META)


async def shown(listing: Listing, tenant: str = TENANT, *, terminal: bool = False) -> tuple[int, int]:
    page = await listing.page(Wanted(tenant, include_terminal=terminal), size=200)
    return page.total, len(page.sandboxes)


async def test_twenty_first_lists_count_once(service: Service, listing: Listing):
    await created(service, 5)
    await created(service, 2, "other")
    found = await asyncio.gather(*(shown(listing, ("default", "other")[number % 2]) for number in range(20)))
    assert found == [(5, 5), (2, 2)] * 10
    assert listing.totals.derived == 1, "one flight, one base for all tenants"


async def test_totals_follow_every_change_beyond_the_base_and_after_it_moved(service: Service, listing: Listing):
    await created(service, 3)
    assert await shown(listing) == (3, 3)
    await created(service, 2)
    await created(service, 1, "other")
    page = await listing.page(Wanted(TENANT), size=200)
    for sandbox in page.sandboxes[:2]:
        await service.execute(sandbox.id, ANY_TENANT, cmd.Terminate(), META)
        await service.execute(sandbox.id, ANY_TENANT, cmd.RecordRemoved(), META)
    for _ in range(2):
        assert await shown(listing) == (3, 3)
        assert await shown(listing, terminal=True) == (5, 5)
        assert await shown(listing, "other") == (1, 1)
        assert await shown(listing, "nobody") == (0, 0)
        before = listing.totals.derived
        base = await listing.totals.advance()
        assert base.of(TENANT).visible == 3
        assert listing.totals.derived == before


async def test_a_horizon_that_falls_is_no_restore(dsn: str, service: Service, listing: Listing):
    """A writer that announces late brings the horizon below its last answer. Nothing was lost; nothing is counted."""
    await created(service, 4)
    async with connected(dsn) as early:
        assert await shown(listing) == (4, 4)
        await listing.totals.advance()
        high = await service.log.horizon(fresh=True)
        await early.execute("BEGIN")
        await early.execute("SELECT pg_advisory_xact_lock_shared((21324::bigint << 48) | ($1)::bigint)", 2)
        assert await service.log.horizon(fresh=True) < high
        assert await shown(listing) == (4, 4)
        await listing.totals.advance()
        assert await shown(listing) == (4, 4)
        await early.execute("ROLLBACK")
    assert listing.totals.derived == 1


async def test_one_base_serves_many_tenants(dsn: str, service: Service, listing: Listing):
    tenants = [f"t{number}" for number in range(12)]
    for tenant in tenants:
        await created(service, 1, tenant)
    assert await asyncio.gather(*(shown(listing, tenant) for tenant in tenants)) == [(1, 1)] * 12
    await created(service, 1, tenants[0])
    bases = await asyncio.gather(*(listing.totals.advance() for _ in tenants))
    assert len({base.position for base in bases}) == 1
    assert await shown(listing, tenants[0]) == (2, 2)
    assert listing.totals.derived == 1


async def test_a_base_too_far_behind_is_moved_and_a_writer_that_hangs_makes_lists_count(bare_dsn: str):
    """Beyond the bound of counting the total is a lower bound, and says so."""
    database = Database(bare_dsn)
    try:
        listing = Listing(database, EventLog(database, remember=0))
        await shown(listing)
        async with connected(bare_dsn) as app, connected(bare_dsn) as hung:
            many = (
                "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) SELECT "
                f"gen_random_uuid(), 'sandbox', 'x', 1, 'sandbox.paused', 1, '{{}}', '{TEXT_META}' "
                "FROM generate_series(1, $1::int)"
            )
            await app.execute(many, MOVE_AFTER_EVENTS + 1)
            before = (await listing.totals.base()).position
            await shown(listing)
            moved = await listing.totals.advance()
            assert moved.position > before
            await app.execute(many, MAX_EVENTS + 1)
            assert await shown(listing) == (0, 0)
            assert (await listing.totals.base()).position > moved.position, "the list itself moved it"

            await hung.execute("BEGIN")
            await insert_event(hung)
            await app.execute(many, MAX_EVENTS + 1)
            async with connected(bare_dsn, owner=True) as owner:
                await owner.execute(FILL.replace("$1::int", "13000"))
            page = await listing.page(Wanted(TENANT, include_terminal=True), size=20)
            assert (page.total, page.is_lower_bound) == (MAX_COUNTED, True)
    finally:
        await database.close()


async def test_the_horizon_is_asked_for_once_by_many_and_remembered(bare_dsn: str):
    async with connected(bare_dsn, owner=True) as owner:
        await owner.execute(
            "ALTER DATABASE " + bare_dsn.split("/")[3].split("?", maxsplit=1)[0] + " SET track_functions = 'all'"
        )

    async def calls() -> int:
        async with connected(bare_dsn, owner=True) as owner:
            return await owner.fetchval(CALLS) or 0

    database = Database(bare_dsn, max_size=8)
    try:
        log = EventLog(database, remember=3600)
        assert len(set(await asyncio.gather(*(log.horizon() for _ in range(50))))) == 1
        for _ in range(50):
            await log.horizon()
        await asyncio.gather(*(log.horizon(fresh=True) for _ in range(50)))
    finally:
        await database.close()
    # One for the first fifty, none for the second, and for the third those that were under way when others called.
    assert 1 <= await calls() <= 3

    database = Database(bare_dsn, max_size=8)
    before = await calls()
    try:
        naive = [EventLog(database) for _ in range(50)]
        await asyncio.gather(*(log.horizon() for log in naive))
    finally:
        await database.close()
    assert await calls() == before + 50


async def test_news_are_found_while_the_horizon_is_remembered(bare_dsn: str):
    database = Database(bare_dsn)
    try:
        log = EventLog(database, remember=3600)
        _, position = await log.read_after(0)
        async with connected(bare_dsn) as writer:
            for _ in range(3):
                mine = await insert_event(writer)
                assert await log.horizon() < mine, "remembered"
                events, position = await log.read_after(position)
                assert [event.position for event in events] == [mine]
                assert position >= mine
    finally:
        await database.close()


# A dump that is restored into the same cluster has the same identity


@pytest.fixture
def dumped(postgres: EmbeddedPostgres) -> Path:
    """Where PostgreSQL's account may write."""
    return account_for(postgres.data_dir).own(postgres.data_dir.parent / f"dump-{uuid4().hex}") / "dump"


def program(postgres: EmbeddedPostgres, name: str, *argv: str | Path) -> None:
    account = account_for(postgres.data_dir)
    code, said = account.run(programs_for(account) / name, "-h", str(postgres.socket_dir), "-U", "postgres", *argv)
    assert code == 0, said


async def test_totals_are_derived_again_when_a_dump_took_the_databases_place(
    dsn: str, postgres: EmbeddedPostgres, database: Database, service: Service, listing: Listing, dumped: Path
):
    name = dsn.split("/")[3].split("?", maxsplit=1)[0]
    await created(service, 3)
    await asyncio.to_thread(program, postgres, "pg_dump", "-Fc", "-f", dumped, name)
    await created(service, 8)
    await listing.totals.base()
    await listing.totals.advance()
    assert await shown(listing) == (11, 11)
    before = await service.log.identity()
    base = await listing.totals.base()

    async with connected(postgres.dsn, owner=True) as owner:
        await owner.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await owner.execute(f"CREATE DATABASE {name}")
    await asyncio.to_thread(program, postgres, "pg_restore", "-d", name, dumped)
    dumped.unlink()
    dumped.parent.rmdir()
    fresh = Database(dsn)
    try:
        others = Service(fresh, Signal(fresh))
        await created(others, 12)
        after = await EventLog(fresh).identity()
        assert after.follows(before, base.position), "by its identity it could be the same log"
        async with asyncio.timeout(30):
            while listing.totals.derived == 1:
                await shown(listing)
        assert await shown(listing) == (15, 15)
    finally:
        await fresh.close()
