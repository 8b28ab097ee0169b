"""What an auditor relies on: nothing switches the log's triggers off by a setting, and no event is without its author."""

from __future__ import annotations

from uuid import uuid4

import asyncpg
import pytest

from tests.support.sql import META, connected, insert_event, partitions

ACTOR = '{"kind": "operator", "id": "t", "name": "test"}'
NOBODY = [
    "{}",
    '{"actor": null, "app_version": "1"}',
    '{"actor": "t", "app_version": "1"}',
    '{"actor": {"kind": "operator", "id": null, "name": "test"}, "app_version": "1"}',
    '{"actor": {"kind": "", "id": "t", "name": "test"}, "app_version": "1"}',
    f'{{"actor": {ACTOR}}}',
    f'{{"actor": {ACTOR}, "app_version": null}}',
]
EVENT = "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) VALUES ($1, 'sandbox', $2, 1, 'x', 1, '{}', $3)"
REFUSAL = (
    "INSERT INTO refusals (stream_id, tenant, command, status, code, message, meta) "
    "VALUES ($1, $2, 'POST /sandboxes', 400, 'X', 'no', $3)"
)


@pytest.mark.parametrize("change", ["UPDATE {} SET tenant = 'x'", "DELETE FROM {}", "TRUNCATE {}"])
async def test_a_session_that_switches_triggers_off_changes_nothing(bare_dsn: str, change: str):
    async with connected(bare_dsn, owner=True) as owner:
        await insert_event(owner)
        await owner.execute("SET session_replication_role = replica")
        for table in ["events", *await partitions(owner), "refusals"]:
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
                await owner.execute(change.format(table))
        assert await owner.fetchval("SELECT count(*) FROM events WHERE tenant = 'default'") == 1


async def test_such_a_session_announces_too(bare_dsn: str):
    async with connected(bare_dsn, owner=True) as owner, connected(bare_dsn) as reader:
        await owner.execute("SET session_replication_role = replica")
        async with owner.transaction():
            position = await insert_event(owner)
            assert await reader.fetchval("SELECT log_horizon()") < position
        assert await reader.fetchval("SELECT log_horizon()") >= position


@pytest.mark.parametrize("statement", [EVENT, REFUSAL], ids=["event", "refusal"])
async def test_nothing_is_recorded_without_author_version_and_tenant(bare_dsn: str, statement: str):
    async with connected(bare_dsn) as app:
        for meta in NOBODY:
            with pytest.raises(asyncpg.CheckViolationError):
                await app.execute(statement, uuid4(), "default", meta)
        with pytest.raises(asyncpg.CheckViolationError):
            await app.execute(statement, uuid4(), "", META)
        await app.execute(statement, uuid4(), "default", META)


async def test_whoever_reads_the_tables_finds_them_explained(bare_dsn: str):
    async with connected(bare_dsn, owner=True) as owner:
        mute = await owner.fetch(
            "SELECT relname FROM pg_class WHERE relnamespace = 'sandledger'::regnamespace AND relkind IN ('r', 'p') "
            "AND NOT relispartition AND relname <> 'alembic_version' AND obj_description(oid, 'pg_class') IS NULL"
        )
        assert [row[0] for row in mute] == []
