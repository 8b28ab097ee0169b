"""The pool: the right role on every connection, and one word for every way in which PostgreSQL can be away."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import Text, Uuid, bindparam, cast, delete, func, literal_column, select

from app.errors import SettingsError, StoreBusy, StoreUnavailable
from app.store.database.dsn import address
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import events
from tests.conftest import on_database
from tests.support.sql import connected

PID = Statement(select(func.pg_backend_pid()))
SLEEP = Statement(select(func.pg_sleep(60)))
ROLE = Statement(
    select(
        literal_column("current_user"),
        func.current_setting("idle_in_transaction_session_timeout"),
        func.current_setting("TimeZone"),
    )
)
NOTE = Statement(select(func.set_config("test.note", bindparam("note", type_=Text), False)))


async def kill(dsn: str, *pids: int) -> None:
    async with connected(dsn, owner=True) as owner:
        for pid in pids:
            await owner.execute("SELECT pg_terminate_backend($1, 5000)", pid)


async def test_every_connection_is_the_applications(database: Database):
    rows = await asyncio.gather(*(database.fetch_one(ROLE) for _ in range(20)))
    login = database.login
    assert login is not None
    assert login.role.startswith("sandledger_app_")
    assert {tuple(row) for row in rows if row is not None} == {(login.role, "5s", "UTC")}
    assert None not in rows


async def test_connections_that_died_while_idle_are_replaced_before_anybody_notices(
    dsn: str, database: Database, until
):
    """Else every pooled connection would cost one request after a restart of PostgreSQL."""
    async with AsyncExitStack() as stack:
        pooled = [await stack.enter_async_context(database.connection()) for _ in range(10)]
        drivers: list[Any] = [connection._driver._con for connection in pooled]
    await kill(dsn, *(driver.get_server_pid() for driver in drivers))

    async def all_known_dead() -> bool:
        return all(driver.is_closed() for driver in drivers)

    await until(all_known_dead)
    rows = await asyncio.gather(*(database.fetch_one(PID) for _ in range(20)))
    assert None not in rows


async def test_a_kill_during_a_statement_is_unavailability_and_the_next_statement_works(
    dsn: str, database: Database, until
):
    async with connected(dsn, owner=True) as owner:
        sleeping = asyncio.create_task(database.fetch(SLEEP))
        asleep = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"

        async def fell_asleep() -> bool:
            return bool(await owner.fetchval(f"SELECT count(*) {asleep}"))

        await until(fell_asleep)
        await owner.execute(f"SELECT pg_terminate_backend(pid) {asleep}")
        with pytest.raises(StoreUnavailable):
            await sleeping
    assert await database.fetch_one(PID) is not None


async def test_a_cancelled_statement_does_not_run_on(dsn: str, database: Database, until):
    async with connected(dsn, owner=True) as owner:
        count = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'"
        sleeping = asyncio.create_task(database.fetch(SLEEP))

        async def sleepers(wanted: int) -> bool:
            return await owner.fetchval(count) == wanted

        await until(lambda: sleepers(1))
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        await until(lambda: sleepers(0))
    assert await database.fetch_one(PID) is not None


async def test_a_mistake_of_ours_is_not_called_unavailability(database: Database):
    with pytest.raises(asyncpg.PostgresError):
        await database.fetch(Statement(select(cast(bindparam("x", type_=Uuid), Text))), x="not an id")
    with pytest.raises(asyncpg.UndefinedColumnError):
        await database.fetch(Statement(select(literal_column("nothing"))))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await database.fetch(Statement(delete(events)))
    with pytest.raises(KeyError):
        await database.fetch(NOTE)
    assert await database.fetch_one(PID) is not None


async def test_nobody_there_is_unavailability():
    for dsn in ("postgresql://postgres@127.0.0.1:1/x", "postgresql://postgres@/x?host=/nonexistent"):
        database = Database(dsn)
        with pytest.raises(StoreUnavailable):
            await database.fetch(PID)
        await database.close()


async def test_a_refused_connection_is_unavailability_in_the_servers_words(dsn: str):
    async with connected(dsn, owner=True) as owner, connected(on_database(dsn, "postgres"), owner=True) as elsewhere:
        name = await owner.fetchval("SELECT current_database()")
        await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        closed, gone = Database(dsn), Database(on_database(dsn, "gone"))
        try:
            with pytest.raises(StoreUnavailable, match="not currently accepting connections"):
                await closed.fetch(PID)
            with pytest.raises(StoreUnavailable, match='database "gone" does not exist'):
                await gone.fetch(PID)
        finally:
            await elsewhere.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        assert await closed.fetch_one(PID) is not None
        await asyncio.gather(closed.close(), gone.close())


async def test_a_database_that_may_not_write_is_unavailable_and_asked_anew(dsn: str, database: Database):
    """As after a failover, when the old primary comes back as a standby."""
    await database.fetch(PID)
    async with connected(dsn, owner=True) as owner:
        name = await owner.fetchval("SELECT current_database()")
        await owner.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        standby = Database(dsn)
        with pytest.raises(StoreUnavailable, match="ReadOnly"):
            await standby.fetch(Statement(select(func.nextval("sandledger.events_position"))))
        await owner.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = off")
        await standby.fetch(Statement(select(func.nextval("sandledger.events_position"))))
        await standby.close()


async def test_a_full_pool_is_unavailability_in_bounded_time(dsn: str):
    database = Database(dsn, max_size=1, pool_timeout=0.05)
    async with database.connection():
        with pytest.raises(StoreBusy, match="max_pool_size"):
            await database.fetch(PID)
    assert await database.fetch_one(PID) is not None
    await database.close()


async def test_values_stay_out_of_errors(database: Database):
    secret = "hunter2"
    broken = Statement(select(cast(func.concat("x", bindparam("note", type_=Text)), Uuid)))
    with pytest.raises(asyncpg.PostgresError) as caught:
        await database.fetch(broken, note=uuid4().hex)
    assert "invalid input syntax" in str(caught.value)
    with pytest.raises(SettingsError) as wrong:
        address(f"postgresql//u:{secret}@h")
    assert secret not in str(wrong.value)
    with pytest.raises(SettingsError) as wrong:
        address(f"mysql://u:{secret}@h/d")
    assert secret not in str(wrong.value)
    unreachable = Database(f"postgresql://u:{secret}@127.0.0.1:1/x")
    with pytest.raises(StoreUnavailable) as away:
        await unreachable.fetch(PID)
    assert secret not in str(away.value)
    await unreachable.close()
