"""Lists at scale: the plan of every statement, and what it touches; counts up to their bound; pages up to theirs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import pytest

from app.store.database.pool import Database
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.store import HISTORY, EventLog
from app.views.listing import MAX_COUNTED, MAX_OFFSET, Cursor, Listing, TooFar, Wanted, page_statement, shape_of
from tests.conftest import on_database
from tests.support.sql import META, connected

ROWS, LIVE = 24_000, 2_000
FILL = f"""
INSERT INTO sandboxes (id, tenant, version, position, schema, phase, desired, observed, spec, metadata, engine, epoch,
                       place, object_id, generation, run, key_id, key_name, fingerprint, created_at, changed_at,
                       ended_at, end_cause, ended_by, closed_at, since_position)
SELECT md5(n::text)::uuid, CASE n % 12 WHEN 11 THEN 'other' ELSE 'default' END, 5, n, 1,
       CASE WHEN n % {ROWS // LIVE} > 0 THEN 'Terminated' WHEN n % 96 = 0 THEN 'Failed' ELSE 'Running' END,
       'running', 'running', '{{"image": "busybox", "entrypoint": ["sleep"]}}',
       jsonb_build_object('team', 't' || n % 500, 'all', 'yes'), 'default', 1, '', md5(n::text)::uuid, 1, 1, 'k', 'k',
       'f', at, at, CASE WHEN n % {ROWS // LIVE} > 0 THEN at END, 'user_delete', 'api_key k',
       CASE WHEN n % {ROWS // LIVE} > 0 THEN at END, 0
FROM (SELECT n, timestamptz '2026-01-01' + n * interval '1 minute' AS at FROM generate_series(1, $1::int) n) AS numbers
"""


@pytest.fixture(scope="module")
def filled(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """Most have ended."""

    async def prepare(statement: str, *arguments: Any) -> None:
        async with connected(postgres.dsn, owner=True) as owner:
            await owner.execute(statement, *arguments)

    async def fill() -> None:
        async with connected(on_database(postgres.dsn, "t_lists"), owner=True) as owner:
            await owner.execute(FILL.replace("$1::int", str(ROWS)))
            await owner.execute("VACUUM ANALYZE sandboxes")

    asyncio.run(prepare(f"CREATE DATABASE t_lists TEMPLATE {template}"))
    try:
        asyncio.run(fill())
        yield on_database(postgres.dsn, "t_lists")
    finally:
        asyncio.run(prepare("DROP DATABASE IF EXISTS t_lists WITH (FORCE)"))


@pytest.fixture
async def listing(filled: str) -> AsyncIterator[Listing]:
    database = Database(filled)
    yield Listing(database)
    await database.close()


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for child in plan.get("Plans", []) for node in nodes(child))]


def literal(value: object) -> str:
    match value:
        case list():
            return "ARRAY[" + ",".join(map(literal, value)) + "]::text[]"
        case int():
            return str(value)
        case _:
            return "'" + str(value).replace("'", "''") + "'"


async def explained(connection: Any, sql: str, arguments: list[object]) -> list[dict[str, Any]]:
    """What it does, on these values."""
    await connection.execute(f"PREPARE one AS {sql}")
    try:
        given = ", ".join(map(literal, arguments))
        text = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE one ({given})")
    finally:
        await connection.execute("DEALLOCATE one")
    return nodes(json.loads(text)[0]["Plan"])


LISTS: dict[str, tuple[Wanted, set[str]]] = {
    "all": (Wanted("default"), {"sandboxes_listing"}),
    "all, ended too": (Wanted("default", include_terminal=True), {"sandboxes_all"}),
    "one state": (Wanted("default", ("Failed",)), {"sandboxes_by_phase"}),
    "one state, ended too": (Wanted("default", ("Failed",), include_terminal=True), {"sandboxes_all_by_phase"}),
    "no such state, ended too": (Wanted("default", ("Paused",), include_terminal=True), {"sandboxes_all_by_phase"}),
    "some states, ended too": (
        Wanted("default", ("Failed", "Paused"), include_terminal=True),
        {"sandboxes_all_by_phase", "sandboxes_all"},
    ),
    "no such states, ended too": (
        Wanted("default", ("Pausing", "Paused"), include_terminal=True),
        {"sandboxes_all_by_phase"},
    ),
    "metadata": (Wanted("default", metadata={"team": "t24"}), {"sandboxes_metadata", "sandboxes_listing"}),
    "metadata, ended too": (
        Wanted("default", metadata={"team": "t24"}, include_terminal=True),
        {"sandboxes_metadata"},
    ),
    "both, ended too": (
        Wanted("default", ("Failed",), {"team": "t96"}, include_terminal=True),
        {"sandboxes_metadata", "sandboxes_all_by_phase"},
    ),
}


@pytest.mark.parametrize("name", LISTS)
async def test_a_list_touches_little_however_many_have_ended(filled: str, name: str):
    wanted, indexes = LISTS[name]
    statement = page_statement(shape_of(wanted, 0, None))
    values = wanted_values(wanted)
    async with connected(filled, owner=True) as owner:
        pages = await owner.fetchval("SELECT relpages FROM pg_class WHERE relname = 'sandboxes'")
        found = await explained(owner, statement.sql, statement.arguments(values))
        scans = [node for node in found if node.get("Relation Name") == "sandboxes"]
        assert scans
        assert {node["Node Type"] for node in scans} & {"Seq Scan"} == set(), "the whole table"
        used = {node["Index Name"] for node in found if "Index Name" in node and "events" not in node["Index Name"]}
        assert used <= indexes, used
        touched = found[0]["Shared Hit Blocks"] + found[0]["Shared Read Blocks"]
        assert touched < pages / 3, (touched, pages)


def wanted_values(wanted: Wanted) -> dict[str, Any]:
    values: dict[str, Any] = {"tenant": wanted.tenant, "size": 21, "offset": 0, "base": 0}
    if wanted.phases:
        values |= {"phase": wanted.phases[0], "phases": list(wanted.phases)}
    if wanted.metadata:
        values["metadata"] = json.dumps(wanted.metadata)
    return values


@pytest.mark.parametrize("drop", ["sandboxes_all_by_phase", "sandboxes_metadata"])
async def test_without_its_index_a_filtered_list_reads_the_table(filled: str, drop: str):
    """As it was: an index of the visible ones only is of no use to a list that shows the others too."""
    wanted = LISTS["no such state, ended too" if "phase" in drop else "metadata, ended too"][0]
    statement = page_statement(shape_of(wanted, 0, None))
    async with connected(filled, owner=True) as owner:
        pages = await owner.fetchval("SELECT relpages FROM pg_class WHERE relname = 'sandboxes'")
        transaction = owner.transaction()
        await transaction.start()
        await owner.execute(f"DROP INDEX {drop}")
        found = await explained(owner, statement.sql, statement.arguments(wanted_values(wanted)))
        touched = found[0]["Shared Hit Blocks"] + found[0]["Shared Read Blocks"]
        assert touched >= pages / 3, (touched, pages)
        await transaction.rollback()


async def test_filtered_totals_are_exact_up_to_their_bound_and_a_lower_bound_beyond(filled: str, listing: Listing):
    async with connected(filled) as connection:
        count = "SELECT count(*) FROM sandboxes WHERE tenant = 'default'"
        failed = await connection.fetchval(f"{count} AND phase = 'Failed'")
        everything = await connection.fetchval(count)
        visible = await connection.fetchval(f"{count} AND ended_at IS NULL")
    page = await listing.page(Wanted("default", ("Failed",), include_terminal=True), size=20)
    assert (page.total, page.is_lower_bound) == (failed, False)
    for beyond in (
        Wanted("default", ("Terminated",), include_terminal=True),
        Wanted("default", metadata={"all": "yes"}, include_terminal=True),
    ):
        page = await listing.page(beyond, size=20)
        assert (page.total, page.is_lower_bound) == (MAX_COUNTED, True)
        assert len(page.sandboxes) == 20
        assert page.next is not None
    page = await listing.page(Wanted("default", include_terminal=True), size=20)
    assert (page.total, page.is_lower_bound) == (everything, False), "unfiltered totals are always exact"
    assert everything > MAX_COUNTED
    page = await listing.page(Wanted("default"), size=20)
    assert (page.total, page.is_lower_bound) == (visible, False)


async def test_exactly_as_many_as_are_counted_is_no_lower_bound(filled: str, listing: Listing):
    """One row more or less makes the difference."""
    async with connected(filled, owner=True) as owner:
        mark = "UPDATE sandboxes SET metadata = metadata || $1::jsonb, version = version + 1 WHERE id = ANY($2::uuid[])"
        ids = [row[0] for row in await owner.fetch("SELECT id FROM sandboxes WHERE tenant = 'default' ORDER BY id")]
        await owner.execute(mark, '{"marked": "1"}', ids[:MAX_COUNTED])
        wanted = Wanted("default", metadata={"marked": "1"}, include_terminal=True)
        page = await listing.page(wanted, size=1)
        assert (page.total, page.is_lower_bound) == (MAX_COUNTED, False)
        await owner.execute(mark, '{"marked": "1"}', ids[MAX_COUNTED : MAX_COUNTED + 1])
        page = await listing.page(wanted, size=1)
        assert (page.total, page.is_lower_bound) == (MAX_COUNTED, True)


async def test_a_page_number_that_is_too_far_is_refused_and_one_beyond_the_end_is_empty(listing: Listing):
    page = await listing.page(Wanted("default", include_terminal=True), size=20, offset=MAX_OFFSET + 1)
    assert (page.sandboxes, page.next) == ((), None)
    assert page.total > MAX_COUNTED
    with pytest.raises(TooFar, match="nextCursor"):  # nobody counted whether there are so many
        await listing.page(Wanted("default", ("Terminated",), include_terminal=True), size=20, offset=MAX_OFFSET + 1)


async def test_a_cursor_reaches_what_a_page_number_does_not(listing: Listing):
    seen: list[UUID] = []
    after: Cursor | None = None
    wanted = Wanted("default", ("Terminated",), include_terminal=True)
    for _ in range(60):
        page = await listing.page(wanted, size=200, after=after)
        seen += [sandbox.id for sandbox in page.sandboxes]
        after = page.next
        assert after is not None
    assert len(seen) == len(set(seen)) == 12_000 > MAX_COUNTED


# Histories touch only the partitions from the stream's first event on

SIZE = 25_000_000
EVENTS = (
    "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
    f"SELECT $1::uuid, 'sandbox', 'default', n, 'sandbox.paused', 1, '{{}}', '{META}' "
    "FROM generate_series($2::int, $3::int) n"
)


async def test_a_history_probes_no_partition_from_before_the_stream(bare_dsn: str, bare_log: EventLog):
    stream = UUID(int=7)
    async with connected(bare_dsn, owner=True) as owner:
        for part in range(6):
            await owner.fetchval("SELECT setval('events_position', $1)", part * SIZE + 1)
            await owner.fetchval("SELECT log_ensure_partitions()")
        since = 4 * SIZE + 10
        await owner.fetchval("SELECT setval('events_position', $1)", since)
        await owner.execute(EVENTS, stream, 1, 5)
        await owner.fetchval("SELECT setval('events_position', $1)", 5 * SIZE + 10)
        await owner.execute(EVENTS, stream, 6, 9)
        for known, needed in ((since, {4, 5, 6, 7}), (0, set(range(8)))):
            for mode in ("force_custom_plan", "force_generic_plan"):
                await owner.execute(f"SET plan_cache_mode = {mode}")
                given = HISTORY.arguments(
                    {"stream_id": stream, "tenant": "default", "after": 0, "since": known, "limit": 1000}
                )
                found = await explained(owner, HISTORY.sql, given)
                touched = {
                    int(node["Relation Name"][-6:])
                    for node in found
                    if "Relation Name" in node and node.get("Actual Loops", 0)
                }
                assert touched == needed, (mode, touched)
    events = await bare_log.history(stream, "default", since=since)
    assert [event.version for event in events] == list(range(1, 10))


async def test_the_number_of_partitions_ahead_says_when_it_is_time(bare_dsn: str, bare_log: EventLog):
    assert await bare_log.partitions_ahead() == 2
    async with connected(bare_dsn, owner=True) as owner:
        await owner.fetchval("SELECT setval('events_position', $1)", SIZE + 1)
        assert await bare_log.partitions_ahead() == 1
        await owner.fetchval("SELECT setval('events_position', $1)", 2 * SIZE + 1)
        assert await bare_log.partitions_ahead() == 0
        await bare_log.ensure_partitions()
        assert await bare_log.partitions_ahead() == 2
        # An archived partition is not one that lies ahead, and one that is gone is not missing.
        await owner.execute("ALTER TABLE events DETACH PARTITION events_p000000")
        assert await bare_log.partitions_ahead() == 2
