"""A busy API takes away no lease, and an error of a caller is not the database's."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import func, literal, select

from app.errors import StoreBusy
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.signal import NEWS_CHANNEL
from tests.conftest import as_server
from tests.support.sql import connected

SLEEP = Statement(select(func.pg_sleep(60)))
ONE = Statement(select(literal(1)))
ASLEEP = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"


async def test_slow_statements_of_everybody_leave_the_reserved_ones_alone(dsn: str, until):
    database = Database(as_server(dsn), pool_timeout=0.1)
    slow = [asyncio.create_task(database.fetch(SLEEP)) for _ in range(10)]
    async with connected(dsn, owner=True) as owner:

        async def all_asleep() -> bool:
            return await owner.fetchval(ASLEEP) == 10

        await until(all_asleep)
        with pytest.raises(StoreBusy, match="all 10 database connections"):
            await database.fetch(ONE)
        assert len(await database.reserved.fetch(ONE)) == 1
        heard = asyncio.Event()
        async with database.listen({NEWS_CHANNEL: lambda *_: heard.set()}):
            await owner.execute(f"NOTIFY {NEWS_CHANNEL}")
            await heard.wait()
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    assert len(await database.fetch(ONE)) == 1
    await database.close()


@pytest.mark.parametrize("error", [OSError("the engine"), TimeoutError(), ConnectionResetError("the engine")])
async def test_an_error_of_the_body_is_not_called_the_databases(database: Database, error: Exception):
    with pytest.raises(type(error)) as raised:  # noqa: PT012 - the whole block is the case
        async with database.connection() as connection:
            await connection.fetch(ONE)
            raise error
    assert raised.value is error
    assert len(await database.fetch(ONE)) == 1


async def test_as_many_connections_are_open_as_are_asked_for_and_come_back(dsn: str, until):
    database = Database(as_server(dsn), min_size=3)
    mine = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sandledger'"
    await database.fetch(ONE)
    async with connected(dsn, owner=True) as owner:

        async def three() -> bool:
            return await owner.fetchval(f"SELECT count(*) {mine} AND usename = 'sandledger_server'") == 3

        await until(three)
        await owner.execute(f"SELECT pg_terminate_backend(pid, 5000) {mine} AND usename = 'sandledger_server'")
        await until(three)
    await database.close()
