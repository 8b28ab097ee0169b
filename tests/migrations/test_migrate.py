"""Migrations: once, by whoever comes first, as whoever may; and what they make is what the code believes."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from app.errors import SettingsError, StoreUnavailable
from app.service.sandboxes import Service
from app.store.database.migrate import Migration, migrate
from app.store.database.pool import Database
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from app.store.tables import metadata
from tests.conftest import ROOT, on_database
from tests.support.drift import assert_no_drift
from tests.support.sql import app_role, connected, partitions
from tests.support.stream import META as ACTOR
from tests.support.stream import requested

HEAD = "0001"


MakeEmpty = Callable[..., Awaitable[str]]
MakeLogin = Callable[..., Awaitable[str]]
Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


async def works(dsn: str) -> None:
    """A sandbox can be created there."""
    database = Database(dsn)
    service = Service(database, Signal(database))
    made = await service.create(uuid4(), "default", requested(), None, ACTOR)
    assert (await service.log.read_after(0))[0][0].position == made.position
    assert await EventLog(database).ensure_partitions() == 0
    await database.close()
    assert await assert_no_drift(dsn) == 1


async def test_the_second_run_finds_nothing_to_do(make_empty: MakeEmpty):
    dsn = await make_empty()
    assert await migrate(dsn, apply=False) == Migration(None, None, HEAD, known=True)
    assert await migrate(dsn) == Migration(None, HEAD, HEAD, known=True)
    assert await migrate(dsn) == Migration(HEAD, HEAD, HEAD, known=True)
    await works(dsn)


async def test_four_at_once_do_it_once(make_empty: MakeEmpty):
    dsn = await make_empty()
    runs = await asyncio.gather(*(migrate(dsn) for _ in range(4)))
    assert sorted(run.before or "" for run in runs) == ["", HEAD, HEAD, HEAD]
    assert {run.after for run in runs} == {HEAD}
    async with connected(dsn, owner=True) as owner:
        assert await owner.fetchval("SELECT count(*) FROM installation") == 1
        assert len(await partitions(owner)) == 3


async def role_of(dsn: str) -> str:
    async with connected(dsn, owner=True) as owner:
        return await app_role(owner)


async def test_databases_of_a_cluster_may_all_migrate_at_once_and_share_no_role(make_empty: MakeEmpty):
    """Else the servers of a staging database could read production's."""
    dsns = [await make_empty() for _ in range(3)]
    runs = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", MIGRATE, dsn, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
        )
        for dsn in dsns
    ]  # Alembic's `op` is one for the process
    assert [await run.wait() for run in runs] == [0, 0, 0]
    roles = [await role_of(dsn) for dsn in dsns]
    assert len(set(roles)) == 3
    async with connected(dsns[0], owner=True) as owner:
        assert not await owner.fetchval(f"SELECT has_schema_privilege('{roles[1]}', 'sandledger', 'USAGE')")
        assert await owner.fetchval(f"SELECT has_schema_privilege('{roles[0]}', 'sandledger', 'USAGE')")


MIGRATE = "import asyncio, sys; from app.store.database.migrate import migrate; asyncio.run(migrate(sys.argv[1]))"


async def test_a_database_of_a_newer_version_is_left_alone_and_used(make_empty: MakeEmpty):
    dsn = await make_empty()
    await migrate(dsn)
    async with connected(dsn, owner=True) as owner:
        await owner.execute("UPDATE sandledger.alembic_version SET version_num = '9999'")
    assert await migrate(dsn) == Migration("9999", "9999", HEAD, known=False)
    await works(dsn)


async def test_a_migration_that_fails_midway_leaves_nothing(make_empty: MakeEmpty):
    dsn = await make_empty()
    async with connected(dsn, owner=True) as owner:
        await owner.execute(
            "CREATE SCHEMA sandledger; CREATE FUNCTION sandledger.check_phase() RETURNS int LANGUAGE sql AS 'SELECT 1'"
        )
        with pytest.raises(StoreUnavailable, match="check_phase"):
            await migrate(dsn)
        tables = await owner.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = 'sandledger'::regnamespace AND relkind = 'r'"
        )
        assert tables == []
        await owner.execute("DROP FUNCTION sandledger.check_phase")
    assert (await migrate(dsn)).after == HEAD


# As whom


async def test_an_owner_that_may_create_roles_needs_nothing_else(
    make_login: MakeLogin, make_empty: MakeEmpty, postgres: EmbeddedPostgres
):
    dsn = await make_empty(await make_login("CREATEROLE"))
    assert (await migrate(dsn)).after == HEAD
    await works(dsn)
    async with connected(dsn.replace(dsn.split("//")[1].split("@")[0], "postgres"), owner=True) as superuser:
        role = await app_role(superuser)
        await superuser.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")  # the fixture drops its maker


async def test_a_plain_owner_does_with_the_role_made_and_granted_beforehand(
    make_login: MakeLogin, make_empty: MakeEmpty, postgres: EmbeddedPostgres
):
    login = await make_login()
    dsn = await make_empty(login)
    with pytest.raises(SettingsError, match="CREATE ROLE sandledger_app_") as told:
        await migrate(dsn)
    statements = re.findall(r"CREATE ROLE \w+; GRANT \w+ TO \w+", str(told.value))
    assert len(statements) == 1
    async with connected(postgres.dsn, owner=True) as superuser:
        await superuser.execute(statements[0])
    assert (await migrate(dsn)).after == HEAD
    await works(dsn)


async def test_somebody_who_may_create_nothing_is_told_what_to_do(
    make_login: MakeLogin, make_empty: MakeEmpty, postgres: EmbeddedPostgres
):
    login = await make_login()
    dsn = (await make_empty()).replace("postgres@", f"{login}@")
    with pytest.raises(SettingsError, match="may not do this"):
        await migrate(dsn)


async def test_nobody_there_is_unavailability(postgres: EmbeddedPostgres):
    with pytest.raises(StoreUnavailable):
        await migrate("postgresql://postgres@127.0.0.1:1/x")
    with pytest.raises(StoreUnavailable, match='"gone" does not exist'):
        await migrate(on_database(postgres.dsn, "gone"))


# What it makes


def _ours(_object: object, name: str | None, kind: str, _reflected: bool, _compare: object) -> bool:
    """Partitions come and go; indexes, unique or not, are written by hand; some tables are the database's own affair."""
    return kind not in ("index", "unique_constraint") and not (
        kind == "table"
        and name is not None
        and (name.startswith("events_p") or name in ("phase_transitions", "alembic_version"))
    )


def _differences(connection: Connection) -> list[object]:
    context = MigrationContext.configure(
        connection,
        opts={"target_metadata": metadata, "compare_type": True, "include_object": _ours, "include_schemas": True},
    )
    return [found for found in compare_metadata(context, metadata) if found[0] != "remove_table_comment"]


async def test_what_the_code_believes_is_what_the_migrations_made(dsn: str):
    async def connect() -> Any:
        return await asyncpg.connect(dsn, server_settings={"search_path": "public"})

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect)
    async with engine.connect() as connection:
        assert await connection.run_sync(_differences) == []
    await engine.dispose()


COLUMNS = """
SELECT column_name, is_nullable = 'YES', udt_name FROM information_schema.columns
 WHERE table_schema = 'sandledger' AND table_name = $1 ORDER BY ordinal_position
"""
TYPES = {
    "UUID": "uuid",
    "TEXT": "text",
    "BIGINT": "int8",
    "INTEGER": "int4",
    "SMALLINT": "int2",
    "BOOLEAN": "bool",
    "JSONB": "jsonb",
    "BYTEA": "bytea",
    "TIMESTAMP WITH TIME ZONE": "timestamptz",
    "DATE": "date",
    "INET": "inet",
}


async def test_column_by_column(dsn: str):
    tables = list(metadata.sorted_tables)
    assert len(tables) == 18
    async with connected(dsn, owner=True) as owner:
        for table in tables:
            dialect = PGDialect_asyncpg()
            believed = [(column.name, column.nullable, TYPES[column.type.compile(dialect)]) for column in table.columns]
            made = [tuple(row) for row in await owner.fetch(COLUMNS, table.name)]
            assert believed == made, table.name


PRIVILEGES = {
    "activity": "INSERT SELECT UPDATE",
    "addresses": "INSERT SELECT UPDATE",
    "alembic_version": "SELECT",
    "client_metrics": "DELETE INSERT SELECT UPDATE",
    "deadlines": "DELETE INSERT SELECT UPDATE",
    "engine_requests": "DELETE INSERT SELECT UPDATE",
    "engines": "INSERT SELECT UPDATE",
    "events": "SELECT",
    "idempotency_keys": "INSERT SELECT",
    "installation": "SELECT",
    "installation_keys": "INSERT SELECT UPDATE",
    "kept_ends": "DELETE INSERT SELECT UPDATE",
    "operations": "INSERT SELECT UPDATE",
    "phase_transitions": "SELECT",
    "reconcile_queue": "DELETE INSERT SELECT UPDATE",
    "refusals": "INSERT SELECT",
    "sandboxes": "INSERT SELECT UPDATE",
    "sealed_values": "DELETE INSERT SELECT",
    "snapshots": "INSERT SELECT UPDATE",
    "stations": "DELETE INSERT SELECT UPDATE",
}


async def test_the_application_may_do_exactly_this(dsn: str):
    async with connected(dsn, owner=True) as owner:
        rows = await owner.fetch(
            "SELECT table_name, string_agg(privilege_type, ' ' ORDER BY privilege_type) "
            "FROM information_schema.role_table_grants WHERE grantee = $1 GROUP BY 1",
            await app_role(owner),
        )
        assert {row[0]: row[1] for row in rows} == PRIVILEGES
        columns = await owner.fetch(
            "SELECT table_name, column_name, privilege_type FROM information_schema.column_privileges "
            "WHERE grantee = $1 AND table_name IN ('events', 'installation', 'sealed_values') AND privilege_type <> 'SELECT'",
            await app_role(owner),
        )
        by_table: dict[str, set[tuple[str, str]]] = {}
        for table, column, privilege in columns:
            by_table.setdefault(table, set()).add((privilege, column))
        assert by_table["installation"] == {("UPDATE", "master_key_id")}
        updated = {column for privilege, column in by_table["sealed_values"] if privilege == "UPDATE"}
        assert updated == {"key_id", "wrapped_key"}
        assert by_table["events"] == {
            ("INSERT", column.name)
            for column in metadata.tables["sandledger.events"].columns
            if column.name != "position"
        }
        assert not await owner.fetch(
            "SELECT FROM information_schema.role_table_grants WHERE grantee = 'PUBLIC' AND table_schema = 'sandledger'"
        )
        role = await owner.fetchrow(
            "SELECT rolcanlogin, rolsuper, rolcreatedb, rolcreaterole, rolbypassrls FROM pg_roles WHERE rolname = $1",
            await app_role(owner),
        )
        assert set(role) == {False}


async def test_an_outsider_reads_nothing(dsn: str, make_login: MakeLogin):
    outsider = dsn.replace("postgres@", f"{await make_login()}@")
    async with connected(dsn, owner=True) as owner:
        tables = [row[0] for row in await owner.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = 'sandledger'::regnamespace AND relkind IN ('r', 'p')"
        )]  # fmt: skip
    connection = await asyncpg.connect(outsider)
    try:
        for table in tables:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(f"SELECT FROM sandledger.{table}")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("SELECT sandledger.log_ensure_partitions()")
    finally:
        await connection.close()
