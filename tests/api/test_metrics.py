"""Reports of SDKs: counted, and bounded in rows, connections and size."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import httpx
import pytest

from app.api.app import create_app
from app.api.auth import Principal
from app.api.metrics import sdk_in
from app.domain.stream import Actor, ActorKind
from app.store.database.pool import Database
from app.store.metrics import MAX_SDKS, ClientMetrics, Report, purge
from tests.api.conftest import MakeContext, client
from tests.conftest import as_server

PYTHON = {"User-Agent": "OpenSandbox-Python-SDK/1.1.1"}
EVENT = {"eventType": "sandbox.create", "createDurationMs": 12, "success": True}


async def rows(dsn: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(dsn)
    try:
        found = await connection.fetch(
            "SELECT tenant, event, sdk, success, count, duration_ms_sum FROM sandledger.client_metrics"
            " WHERE day = (now() AT TIME ZONE 'UTC')::date ORDER BY sdk, success"
        )
    finally:
        await connection.close()
    return [tuple(row) for row in found]


async def report(http: httpx.AsyncClient, headers: dict[str, str] = PYTHON, **changes: Any) -> int:
    return (await http.post("/v1/metrics/events", json=EVENT | changes, headers=headers)).status_code


async def test_reports_are_counted(http: httpx.AsyncClient, dsn: str):
    for ms in (100, 200):
        assert await report(http, createDurationMs=ms) == 204
    assert await report(http, success=False) == 204
    assert await report(http, {"User-Agent": "curl/8"}) == 204
    assert await report(http, {"User-Agent": "OpenSandbox-JS-SDK/0.3.0 node"}) == 204
    assert await rows(dsn) == [
        ("default", "sandbox.create", "js/0.3.0", True, 1, 12),
        ("default", "sandbox.create", "python/1.1.1", False, 1, 12),
        ("default", "sandbox.create", "python/1.1.1", True, 2, 300),
        ("default", "sandbox.create", "unknown", True, 1, 12),
    ]


async def test_what_is_refused_is_not_counted(http: httpx.AsyncClient, dsn: str):
    for change in ({"eventType": "canary"}, {"createDurationMs": -1}, {"success": "yes"}):
        assert await report(http, **change) == 422
    assert await rows(dsn) == []


async def test_a_duration_that_cannot_be(http: httpx.AsyncClient, dsn: str):
    assert await report(http, createDurationMs=10**30) == 204
    assert await report(http, createDurationMs=1) == 204
    assert (await rows(dsn))[0][-2:] == (2, 86_400_001)


async def test_each_tenant_has_its_own(make_context: MakeContext, dsn: str):
    app = create_app(make_context(authenticate=lambda key: Principal(key, Actor(ActorKind.API_KEY, key, key))))
    for tenant in ("acme", "other"):
        async with client(app, **{"open-sandbox-api-key": tenant}) as http:
            assert await report(http) == 204
    assert sorted(row[0] for row in await rows(dsn)) == ["acme", "other"]


async def test_made_up_names_make_no_more_rows(http: httpx.AsyncClient, dsn: str):
    for number in range(MAX_SDKS + 20):
        await report(http, {"User-Agent": f"OpenSandbox-Python-SDK/{number}"})
    found = await rows(dsn)
    assert len(found) == MAX_SDKS + 1
    assert [row[4] for row in found if row[2] == "other"] == [20]


async def test_made_up_names_take_none_from_other_tenants_or_processes(dsn: str):
    """The naive way, a bound in each process for all tenants, has one caller turn all others into `other`."""
    database = Database(as_server(dsn))
    try:
        for process in range(3):
            metrics = ClientMetrics()  # as after a restart
            made_up = [Report("acme", "sandbox.create", f"x/{process}-{n}", success=True) for n in range(MAX_SDKS)]
            await asyncio.gather(*(metrics.count(database, each, 1) for each in made_up))
            await metrics.count(database, Report("other", "sandbox.create", "python/1", success=True), 1)
    finally:
        await database.close()
    found = await rows(dsn)
    mine = {row[2]: row[4] for row in found if row[0] == "acme"}
    assert (len(mine), mine["other"], sum(mine.values())) == (MAX_SDKS + 1, 2 * MAX_SDKS, 3 * MAX_SDKS)
    assert [row[2:5] for row in found if row[0] == "other"] == [("python/1", True, 3)]


async def test_old_counts_go(dsn: str):
    database = Database(as_server(dsn))
    try:
        await ClientMetrics().count(database, Report("acme", "sandbox.create", "python/1", success=True), 1)
        connection = await asyncpg.connect(dsn)
        await connection.execute(
            "INSERT INTO sandledger.client_metrics SELECT tenant, day - age, event, sdk, success, 1, 1"
            " FROM sandledger.client_metrics, generate_series(1, 1400) AS age"
        )
        assert await purge(database, 100) == 1300
        assert await connection.fetchval("SELECT count(*) FROM sandledger.client_metrics") == 101
        await connection.close()
    finally:
        await database.close()


@pytest.mark.parametrize(
    ("header", "sdk"),
    [
        ("OpenSandbox-Python-SDK/1.1.1", "python/1.1.1"),
        ("OpenSandbox-Kotlin-SDK/1.0.0-rc1+5", "kotlin/1.0.0-rc1+5"),
        ("OpenSandbox-Python-SDK/1.1.1 (linux)", "python/1.1.1"),
        ("OpenSandbox-Python-SDK/", "unknown"),
        ("OpenSandbox-Python-SDK/" + "9" * 31, "unknown"),
        ("x OpenSandbox-Python-SDK/1", "unknown"),
        ("", "unknown"),
    ],
)
def test_names_of_sdks(header: str, sdk: str):
    assert sdk_in(header) == sdk


async def test_many_at_once_take_one_connection(dsn: str):
    """The naive way, a statement for each, has them all wait for one row, and holds a connection for each."""
    database = Database(as_server(dsn), max_size=2, pool_timeout=5)
    metrics, one = ClientMetrics(), Report("default", "sandbox.create", "python/1", success=True)
    held = await asyncpg.connect(dsn)
    try:
        await metrics.count(database, one, 1)
        async with held.transaction():
            await held.execute("SELECT 1 FROM sandledger.client_metrics FOR UPDATE")
            waiting = [asyncio.create_task(metrics.count(database, one, 1)) for _ in range(50)]
            async with asyncio.timeout(10):
                while not await held.fetch("SELECT 1 FROM pg_locks WHERE NOT granted"):
                    await asyncio.sleep(0.01)
            async with database.connection():
                """The other connection is free."""
        await asyncio.gather(*waiting)
    finally:
        await held.close()
        await database.close()
    assert (await rows(dsn))[0][-2:] == (51, 51)


async def test_two_processes_count_together(dsn: str):
    databases = [Database(as_server(dsn)) for _ in range(2)]
    reports = [Report("default", "sandbox.create", f"python/{n}", success=bool(n % 2)) for n in range(4)]
    try:
        both = [(ClientMetrics(), database) for database in databases]
        await asyncio.gather(*(each.count(on, one, 2) for each, on in both for one in reports for _ in range(50)))
    finally:
        for database in databases:
            await database.close()
    assert [row[-2:] for row in await rows(dsn)] == [(100, 200)] * 4


async def test_what_could_not_be_written_is_written_with_the_next(dsn: str):
    database = Database(as_server(dsn), max_size=1, pool_timeout=0.05)
    metrics, one = ClientMetrics(), Report("default", "sandbox.create", "python/1", success=True)
    try:
        async with database.connection():
            with pytest.raises(Exception, match=r"in use|busy|connection"):
                await metrics.count(database, one, 5)
        await metrics.count(database, one, 5)
    finally:
        await database.close()
    assert (await rows(dsn))[0][-2:] == (2, 10)
