"""Lists: filters, both kinds of paging, exact totals while the world moves, and what PostgreSQL does for a page."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
import uuid_utils.compat
from msgspec.structs import replace
from sqlalchemy import func, select

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.events import Requested
from app.domain.sandbox.observed import Exit, Power
from app.domain.sandbox.spec import SandboxSpec
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import events, sandboxes
from app.views import totals
from app.views.listing import MAX_COUNTED, Cursor, Listing, Wanted, page_statement, shape_of
from tests.api.conftest import create, observe
from tests.support.sql import connected

BEYOND = base64.urlsafe_b64encode(b"\x7f" * 32).decode().rstrip("=")
"""A cursor of the right length whose time no calendar has."""
LATE = Cursor(datetime(2100, 1, 1, tzinfo=UTC), UUID("6f1c2a5e-0b7d-4c39-9a57-d1e0c4b8a263"), 1)
BY_TIME = "sandboxes_tenant_created_at_id_idx"
META = Meta(Actor(ActorKind.API_KEY, "t", "t"), "0")


async def ids(http: httpx.AsyncClient, query: str) -> list[str]:
    answer = await http.get(f"/v1/sandboxes?{query}")
    assert answer.status_code == 200, answer.text
    page = answer.json()
    assert page["pagination"]["totalItems"] == len(page["items"]), "everything is on one page in these tests"
    return [item["id"] for item in page["items"]]


async def test_the_shape_of_a_page(http: httpx.AsyncClient):
    empty = (await http.get("/v1/sandboxes")).json()
    assert empty == {
        "items": [],
        "pagination": {"page": 1, "pageSize": 20, "totalItems": 0, "totalPages": 0, "hasNextPage": False},
    }
    made = [(await create(http))["id"] for _ in range(5)]
    page = (await http.get("/v1/sandboxes?page=2&pageSize=2")).json()
    assert [item["id"] for item in page["items"]] == [made[2], made[1]]
    assert page["pagination"] == {"page": 2, "pageSize": 2, "totalItems": 5, "totalPages": 3, "hasNextPage": True}
    last = (await http.get("/v1/sandboxes?page=3&pageSize=2")).json()
    assert last["pagination"]["hasNextPage"] is False
    assert "nextCursor" not in last
    one = (await http.get(f"/v1/sandboxes/{made[2]}")).json()
    assert page["items"][0] == one


@pytest.mark.parametrize("page", [4, 10**6, 2**53])
async def test_a_page_beyond_the_end_is_empty(http: httpx.AsyncClient, page: int):
    await create(http)
    beyond = (await http.get("/v1/sandboxes", params={"page": page})).json()
    assert beyond["items"] == []
    assert beyond["pagination"] == {
        "page": page,
        "pageSize": 20,
        "totalItems": 1,
        "totalPages": 1,
        "hasNextPage": False,
    }


async def test_states(http: httpx.AsyncClient, service: Service):
    pending, running, failed, gone = [(await create(http))["id"] for _ in range(4)]
    await observe(service, running)
    await observe(service, failed, Power.EXITED, Exit(1))
    await http.delete(f"/v1/sandboxes/{gone}")
    assert await ids(http, "") == [failed, running, pending]
    assert await ids(http, "state=Running") == [running]
    assert await ids(http, "state=running&state=PENDING") == [running, pending]
    assert await ids(http, "state=Failed&state=Failed") == [failed]
    assert await ids(http, "state=") == []
    assert await ids(http, "state=Unknown") == []
    assert await ids(http, "state=Unknown&state=Running") == [running]
    assert await ids(http, "state=Running,Pending") == []
    assert await ids(http, "state=Stopping") == []
    assert await ids(http, "state=Stopping&includeTerminal=true") == [gone]
    assert await ids(http, "includeTerminal=true") == [gone, failed, running, pending]
    assert await ids(http, "includeTerminal=false") == [failed, running, pending]


async def test_metadata(http: httpx.AsyncClient):
    one = (await create(http, metadata={"team": "a", "x": "1", "e": ""}))["id"]
    two = (await create(http, metadata={"team": "a", "x.y/z": "2"}))["id"]
    await create(http)

    def asked(text: str) -> str:
        return f"metadata={quote(text, safe='')}"

    assert await ids(http, asked("team=a")) == [two, one]
    assert await ids(http, asked("team=a&x=1")) == [one]
    assert await ids(http, asked("team=A")) == []
    assert await ids(http, asked("e=")) == [one]
    assert await ids(http, asked("x=9&x=1")) == [one]
    assert await ids(http, asked(f"{quote('x.y/z', safe='')}=2")) == [two]
    assert await ids(http, asked(quote("team") + "=" + quote("a & b"))) == []
    assert len(await ids(http, "metadata=")) == 3
    assert await ids(http, f"{asked('team=a')}&state=pending&state=running") == [two, one]
    assert await ids(http, f"{asked('team=a')}&state=running") == []


@pytest.mark.parametrize(
    "text", ["team", "a=b&", "&", "a=b&&c=d", "a=%FF", "a=%00", "%ED%A0%80=x", "&".join(["a=b"] * 300)]
)
async def test_a_malformed_metadata_filter(http: httpx.AsyncClient, text: str):
    answer = await http.get("/v1/sandboxes", params={"metadata": text})
    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_METADATA_FORMAT")


@pytest.mark.parametrize(
    "query",
    [
        "page=0", "page=-1", "page=x", "page=", "page=1.0", "page=" + "9" * 5000, f"page={2**53 + 1}", "page=1&page=2",
        "pageSize=0", "pageSize=201", "pageSize=%F0", "limit=201", "limit=0", "limit=5&pageSize=5",
        "cursor=", "cursor=x", f"cursor={BEYOND}", "cursor=!!!!", "cursor=%C3%A9", "includeTerminal=maybe",
        f"cursor={LATE}&page=2",
        "&".join(["state=x"] * 1001),
    ],
)  # fmt: skip
async def test_malformed_queries_are_422(http: httpx.AsyncClient, query: str):
    answer = await http.get(f"/v1/sandboxes?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "GENERAL::VALIDATION_ERROR"), answer.text


async def test_a_cursor_skips_and_repeats_nothing_while_rows_come_and_go(http: httpx.AsyncClient):
    made = [(await create(http))["id"] for _ in range(10)]
    page = (await http.get("/v1/sandboxes?limit=4")).json()
    by_number = page["items"]
    seen = [item["id"] for item in page["items"]]
    for _ in range(3):
        await create(http)
    await http.delete(f"/v1/sandboxes/{made[-1]}")
    naive = (await http.get("/v1/sandboxes?pageSize=4&page=2")).json()["items"]
    assert {item["id"] for item in naive} & {item["id"] for item in by_number}, "page numbers repeat rows here"
    number = 1
    while "nextCursor" in page:
        assert page["pagination"]["hasNextPage"] is True
        page = (await http.get("/v1/sandboxes", params={"cursor": page["nextCursor"], "limit": 4})).json()
        number += 1
        assert page["pagination"]["page"] == number
        assert page["pagination"]["totalItems"] == 12
        seen += [item["id"] for item in page["items"]]
    assert page["pagination"]["hasNextPage"] is False
    assert seen == made[::-1]


async def test_a_cursor_keeps_filters(http: httpx.AsyncClient):
    made = [(await create(http, metadata={"n": str(n % 2)}))["id"] for n in range(6)]
    first = (await http.get("/v1/sandboxes?metadata=n%3D1&pageSize=2&includeTerminal=1&state=pending")).json()
    rest = await http.get("/v1/sandboxes?metadata=n%3D1&limit=2&state=pending", params={"cursor": first["nextCursor"]})
    assert rest.status_code == 200
    seen = [item["id"] for item in first["items"]]
    assert seen == [made[5], made[3]]


# Totals


async def begin(service: Service) -> UUID:
    sandbox_id = uuid_utils.compat.uuid7()
    await service.create(sandbox_id, "default", Requested(SandboxSpec("x", ("sleep", "1")), "f"), None, META)
    return sandbox_id


async def many(service: Service, count: int) -> None:
    """So many more, ten at a time."""
    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await begin(service)

    await asyncio.gather(*[some() for _ in range(10)])


async def counted(database: Database, *, ended: bool) -> int:
    count = select(func.count()).select_from(sandboxes)
    rows = await database.fetch(Statement(count if ended else count.where(sandboxes.c.ended_at.is_(None))))
    return rows[0][0]


async def test_totals_are_exact_after_every_step(service: Service, database: Database):
    chance = random.Random(1)
    listings = [Listing(database), Listing(database)]
    alive: list[UUID] = []
    for _ in range(400):
        if alive and chance.random() < 0.45:
            await service.execute(alive.pop(chance.randrange(len(alive))), ANY_TENANT, cmd.Terminate(), META)
        else:
            alive.append(await begin(service))
        listing = chance.choice(listings)
        shown = await listing.page(Wanted("default"), size=5)
        assert shown.total == len(alive) == await counted(database, ended=False)
        every = await listing.page(Wanted("default", include_terminal=True), size=5)
        assert every.total == await counted(database, ended=True)
        assert not shown.is_lower_bound
    written = (await database.fetch(_highest()))[0][0]
    assert written > totals.MOVE_AFTER_EVENTS + 50
    for listing in listings:
        assert (await listing.totals.base()).position > totals.MOVE_AFTER_EVENTS - 50, "the bases have moved on"
        assert listing.totals.derived == 1, "and rows were counted once only"
    assert (await listings[0].page(Wanted("stranger"), size=5)).total == 0


async def test_totals_are_exact_among_concurrent_changes(service: Service, database: Database):
    """Every total was true at the moment of its page: each page's total equals the count in a snapshot that sees the
    same newest row, which a list of everything on one page shows by itself."""
    listing = Listing(database)
    done = asyncio.Event()
    chance = random.Random(2)

    async def change() -> None:
        mine: list[UUID] = []
        for _ in range(60):
            mine.append(await begin(service))
            if chance.random() < 0.7:
                await service.execute(mine.pop(), ANY_TENANT, cmd.Terminate(), META)

    async def watch() -> int:
        seen = 0
        while not done.is_set():
            page = await listing.page(Wanted("default"), size=200)
            assert page.total == len(page.sandboxes), "total and rows are of one snapshot"
            seen += 1
            if seen % 5 == 0:  # many more moves of the base than its own bound would bring
                await listing.totals.advance()
        return seen

    watchers = [asyncio.create_task(watch()) for _ in range(3)]
    await asyncio.gather(*[change() for _ in range(5)])
    done.set()
    assert sum(await asyncio.gather(*watchers)) > 20
    page = await listing.page(Wanted("default"), size=200)
    assert page.total == await counted(database, ended=False)


COPY = """
WITH copied AS (
    INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta, recorded_at)
    SELECT $1::uuid, kind, tenant, version, type, schema,
           CASE type WHEN 'sandbox.placed' THEN data || jsonb_build_object('object_id', $1::uuid::text) ELSE data END,
           meta, now()
    FROM (SELECT * FROM events WHERE stream_id = $2::uuid ORDER BY version) AS original
    RETURNING position
), due AS (
    INSERT INTO deadlines
    SELECT (jsonb_populate_record(d, jsonb_build_object('stream_id', $1::uuid, 'fires_at', now() + interval '1 hour'))).*
    FROM deadlines d WHERE stream_id = $2::uuid
)
INSERT INTO sandboxes
SELECT (jsonb_populate_record(s, jsonb_build_object(
    'id', $1::uuid, 'object_id', $1::uuid, 'created_at', now(), 'changed_at', now(),
    'position', (SELECT max(position) FROM copied), 'since_position', 0))).*
FROM sandboxes s WHERE id = $2::uuid
"""
"""What a create writes, in the caller's transaction."""


async def test_an_unsettled_position_is_no_base(service: Service, database: Database, dsn: str):
    """A writer that has drawn its position and commits later: a base beyond it would lose its event for ever."""
    listing = Listing(database)
    first = await begin(service)
    assert (await listing.page(Wanted("default"), size=1)).total == 1
    async with connected(dsn) as writer:
        slow = writer.transaction()
        await slow.start()
        await writer.execute(COPY, uuid4(), first)
        for _ in range(3):
            await begin(service)
        highest = (await database.fetch(_highest()))[0][0]
        base = await listing.totals.advance()
        assert base.position < highest, "the horizon stands before the open writer, not at the last position"
        assert (await listing.page(Wanted("default"), size=1)).total == 4
        naive = Listing(database)
        witness = await service.log.witness(highest)
        naive.totals._base = totals.Base(highest, base.identity, witness, {"default": totals.Count(4, 4)})
        assert (await naive.page(Wanted("default"), size=1)).total == 4
        await slow.commit()
    assert (await listing.page(Wanted("default"), size=1)).total == 5
    await listing.totals.advance()
    assert (await listing.page(Wanted("default"), size=1)).total == 5
    wrong = (await naive.page(Wanted("default"), size=1)).total
    assert wrong == 4, "a base at the last position, taken while the writer was open, is wrong and stays wrong"


def _highest() -> Any:
    return Statement(select(func.max(events.c.position)))


async def test_when_the_base_cannot_follow_rows_are_counted(service: Service, database: Database, dsn: str):
    """A writer that hangs holds the horizon back, and with it every base."""
    listing = Listing(database)
    first = await begin(service)
    await listing.page(Wanted("default"), size=1)
    before = (await listing.totals.base()).position
    async with connected(dsn) as writer:
        slow = writer.transaction()
        await slow.start()
        await writer.execute(COPY, uuid4(), first)
        await many(service, totals.MAX_EVENTS // 2 + 50)
        page = await listing.page(Wanted("default"), size=1)
        assert page.total == await counted(database, ended=False) == totals.MAX_EVENTS // 2 + 51
        assert (await listing.totals.base()).position <= before + 2, "no base is near enough to sum from"
        every = await listing.page(Wanted("default", include_terminal=True), size=1)
        assert every.total == await counted(database, ended=True)
        await slow.rollback()


async def test_a_database_that_went_back_is_counted_anew(service: Service, database: Database):
    """A restore or a failover: the log ends before the base, or it is another timeline or cluster."""
    await begin(service)
    for changes in ({"last_position": 10**9}, {"timeline": 10**6}, {"system": 1}):
        listing = Listing(database)
        real = await listing.totals.base()
        position = changes.get("last_position", real.position)
        identity = replace(real.identity, **changes)
        listing.totals._base = totals.Base(position, identity, real.witness, {"default": totals.Count(77, 77)})
        listing.totals._checked_at = float("-inf")
        assert (await listing.page(Wanted("default"), size=1)).total == 1, changes
        assert listing.totals.derived == 2


async def test_many_who_ask_first_make_one_base(service: Service, database: Database):
    """A10: rows are counted once for all callers that come meanwhile, of any tenant."""
    await begin(service)
    listing = Listing(database)
    tenants = ["default", "default", "other"] * 7
    pages = await asyncio.gather(*[listing.page(Wanted(tenant), size=1) for tenant in tenants])
    assert [page.total for page in pages] == [1, 1, 0] * 7
    assert listing.totals.derived == 1


# Counts of filtered lists


@pytest.fixture
async def counted_far(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """As many rows as are counted, half of them ended. They go before the check for drift: they have no events."""
    async with connected(dsn, owner=True) as owner:
        await owner.execute(BULK.format(schema="sandledger", rows=MAX_COUNTED))
        try:
            yield owner
        finally:
            await owner.execute("DELETE FROM sandboxes WHERE key_id = 'bulk'")


async def test_filtered_lists_are_counted_up_to_ten_thousand(http: httpx.AsyncClient, counted_far: asyncpg.Connection):
    asked = "/v1/sandboxes?includeTerminal=true&metadata=kind%3Dbulk&pageSize=200"
    exact = (await http.get(asked)).json()["pagination"]
    assert exact == {"page": 1, "pageSize": 200, "totalItems": 10_000, "totalPages": 50, "hasNextPage": True}
    await counted_far.execute(BULK.format(schema="sandledger", rows=1))
    page = await http.get(asked)
    assert page.json()["pagination"] == exact | {"totalIsLowerBound": True}
    visible = (await http.get(asked.replace("includeTerminal=true&", ""))).json()["pagination"]
    assert (visible["totalItems"], "totalIsLowerBound" in visible) == (5000, False)
    phases = (await http.get("/v1/sandboxes?includeTerminal=true&state=pending&state=running")).json()["pagination"]
    assert (phases["totalItems"], phases["totalIsLowerBound"]) == (10_000, True)


async def test_a_page_too_far_names_the_cursor(http: httpx.AsyncClient, counted_far: asyncpg.Connection):
    await counted_far.execute(BULK.format(schema="sandledger", rows=1))
    asked = "/v1/sandboxes?includeTerminal=true&metadata=kind%3Dbulk&pageSize=200"
    near = (await http.get(f"{asked}&page=51")).json()
    assert (len(near["items"]), near["pagination"]["hasNextPage"]) == (1, False), "there is more than was counted"
    assert (await http.get(f"{asked}&page=501")).json()["items"] == [], "100,000 rows before it are allowed"
    far = await http.get(f"{asked}&page=502")
    assert (far.status_code, far.json()["code"]) == (422, "GENERAL::VALIDATION_ERROR")
    assert far.json()["detail"][0]["loc"] == ["query", "page"]
    assert "cursor" in far.json()["message"].lower()
    beyond = await http.get("/v1/sandboxes?pageSize=200&page=502&metadata=kind%3Dnone")
    assert (beyond.status_code, beyond.json()["items"]) == (200, []), "the list is known to end before"
    after = (await http.get(asked)).json()
    for _ in range(3):
        after = (await http.get(asked.replace("pageSize", "limit"), params={"cursor": after["nextCursor"]})).json()
    assert after["pagination"]["page"] == 4


# Plans

BULK = """INSERT INTO {schema}.sandboxes (id, tenant, version, position, schema, phase, desired, observed, spec, metadata,
  epoch, place, generation, run, key_id, key_name, fingerprint, created_at, changed_at, ended_at, end_cause, ended_by,
  since_position)
SELECT gen_random_uuid(), 'default', 2, 2, 1, CASE WHEN g % 100 = 0 THEN 'Running' ELSE 'Pending' END, 'running', 'none',
  '{{"image": "x", "entrypoint": ["y"]}}', jsonb_build_object('n', g::text, 'kind', 'bulk'), 0, '', 0, 0, 'bulk', 'k', 'f',
  now() - g * interval '1 second', now(), CASE WHEN g % 2 = 1 THEN now() END,
  CASE WHEN g % 2 = 1 THEN 'expired' END, CASE WHEN g % 2 = 1 THEN 'timer t' END, 1
FROM generate_series(1, {rows}) g"""


@pytest.fixture
async def ten_thousand(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """Half of 10,000 rows have ended. In a schema of its own, since rows without events would be drift."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "bulk, sandledger, public"})
    await connection.execute(
        "CREATE SCHEMA bulk; CREATE TABLE bulk.sandboxes (LIKE sandledger.sandboxes INCLUDING ALL);"
        f"{BULK.format(schema='bulk', rows=10_000)}; ANALYZE bulk.sandboxes"
    )
    yield connection
    await connection.execute("DROP SCHEMA bulk CASCADE")
    await connection.close()


@pytest.mark.parametrize(
    ("wanted", "offset", "after", "index", "modes"),
    [
        (Wanted("default"), 0, None, BY_TIME, ("generic", "custom")),
        (Wanted("default", include_terminal=True), 0, None, BY_TIME, ("generic", "custom")),
        (Wanted("default"), 0, LATE, BY_TIME, ("generic", "custom")),
        (Wanted("default"), 40, None, BY_TIME, ("custom",)),
        (Wanted("default", ("Running",)), 0, None, "sandboxes_tenant_phase_created_at_id_idx", ("custom",)),
        (Wanted("default", None, {"n": "8"}), 0, None, "sandboxes_tenant_metadata_idx", ("custom",)),
    ],
)
async def test_a_page_is_an_index_scan(
    ten_thousand: asyncpg.Connection,
    wanted: Wanted,
    offset: int,
    after: Cursor | None,
    index: str,
    modes: tuple[str, ...],
):
    values = {"tenant": "default", "size": 21, "offset": offset, "base": 0}
    values |= {"phase": "Running", "metadata": '{"n": "8"}'}
    if after is not None:
        values |= {"created_at": after.created_at, "id": after.id}
    statement = page_statement(shape_of(wanted, offset, after))
    for mode in modes:
        await ten_thousand.execute(f"SET plan_cache_mode = force_{mode}_plan")
        lines = await ten_thousand.fetch(
            f"EXPLAIN {statement.sql.replace('sandledger.', '')}", *statement.arguments(values)
        )
        plan = "\n".join(line[0] for line in lines)
        assert index in plan, plan
        assert "Seq Scan on sandboxes" not in plan, plan
        if index != "sandboxes_tenant_metadata_idx":
            assert "created_at DESC" not in plan, f"sorted:\n{plan}"
