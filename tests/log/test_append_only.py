"""What nobody may do to the log: not the application, and by accident not even the owner."""

from __future__ import annotations

from uuid import uuid4

import asyncpg
import pytest

from app.store.log.refusals import Refusals
from app.store.log.store import EventLog
from tests.support.sql import INSERT_EVENT, META, connected, insert_event, partitions

REFUSED = asyncpg.InsufficientPrivilegeError
CHANGES = ("UPDATE {} SET tenant = 'x'", "DELETE FROM {}", "TRUNCATE {}")


@pytest.mark.parametrize("owner", [False, True], ids=["application", "owner"])
async def test_nothing_recorded_is_changed_removed_or_emptied(bare_dsn: str, owner: bool):
    async with connected(bare_dsn) as app, connected(bare_dsn, owner=owner) as connection:
        await insert_event(app)
        await refuse(app)
        tables = ["events", *await partitions(app), "refusals"]
        assert len(tables) == 5
        for table in tables:
            for change in CHANGES:
                with pytest.raises(REFUSED):
                    await connection.execute(change.format(table))
        assert await app.fetchval("SELECT count(*) FROM events WHERE tenant = 'default'") == 1
        assert await app.fetchval("SELECT count(*) FROM refusals WHERE tenant = 'default'") == 1


async def refuse(connection) -> None:
    await connection.execute(
        "INSERT INTO refusals (tenant, command, status, code, message, meta) "
        f"VALUES ('default', 'POST /sandboxes', 400, 'X', 'no', '{META}')"
    )


async def test_an_upsert_is_an_update(bare_dsn: str):
    async with connected(bare_dsn, owner=True) as owner:
        position = await insert_event(owner)
        with pytest.raises(REFUSED, match="append-only"):
            await owner.execute(
                "INSERT INTO events (position, stream_id, kind, tenant, version, type, schema, data, meta) "
                f"VALUES ($1, $2, 'sandbox', 't', 1, 'x', 1, '{{}}', '{META}') "
                "ON CONFLICT (position) DO UPDATE SET tenant = 'x'",
                position,
                uuid4(),
            )


BYPASSES = (
    "CREATE TABLE public.mine (x int)",
    "CREATE TABLE sandledger.mine (x int)",
    "CREATE TEMPORARY TABLE mine (x int)",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "DROP TABLE events",
    "ALTER TABLE events DISABLE TRIGGER ALL",
    "ALTER TABLE events DETACH PARTITION events_p000000",
    "ALTER SEQUENCE events_position RESTART",
    "SELECT setval('events_position', 1)",
    "UPDATE events SET tenant = 'x'",
    "DELETE FROM events",
    "TRUNCATE events",
    "UPDATE phase_transitions SET to_phase = 'Running'",
    "INSERT INTO phase_transitions VALUES ('Terminated', 'Running')",
    "DELETE FROM sandboxes",
    "TRUNCATE sandboxes",
    "UPDATE sealed_values SET sealed = '\\x00'",
    "UPDATE installation SET id = gen_random_uuid()",
    "DELETE FROM installation",
    "UPDATE alembic_version SET version_num = '9999'",
    "SET session_replication_role = replica",
)


async def test_the_application_cannot_step_around_it(bare_dsn: str):
    async with connected(bare_dsn) as app:
        for statement in BYPASSES:
            with pytest.raises(REFUSED):
                await app.execute(statement)


async def test_the_application_writes_through_the_parent_only(bare_dsn: str):
    async with connected(bare_dsn) as app:
        for table in await partitions(app):
            with pytest.raises(REFUSED):
                await app.execute(INSERT_EVENT.replace("INTO events", f"INTO {table}"), uuid4(), 1)


async def test_the_application_cannot_choose_a_position(bare_dsn: str, bare_log: EventLog):
    """A row below the horizon would never be seen."""
    async with connected(bare_dsn) as app:
        for _ in range(3):
            await insert_event(app)
        with pytest.raises(REFUSED):
            await app.execute(
                "INSERT INTO events (position, stream_id, kind, tenant, version, type, schema, data, meta) "
                f"VALUES (1, $1, 'sandbox', 'default', 1, 'sandbox.paused', 1, '{{}}', '{META}')",
                uuid4(),
            )


async def test_a_direct_insert_into_a_partition_by_the_owner_still_announces(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn, owner=True) as owner, connected(bare_dsn) as app:
        transaction = owner.transaction()
        await transaction.start()
        hidden = await owner.fetchval(
            INSERT_EVENT.replace("INTO events", f"INTO {(await partitions(owner))[0]}"), uuid4(), 1
        )
        await insert_event(app)
        assert await bare_log.horizon() < hidden
        await transaction.commit()
        assert [event.position for event in (await bare_log.read_after(0))[0]] == [hidden, hidden + 1]


async def test_a_copy_announces(bare_dsn: str, bare_log: EventLog):
    async with connected(bare_dsn) as app, connected(bare_dsn) as other:
        transaction = app.transaction()
        await transaction.start()
        await app.copy_records_to_table(
            "events",
            records=[(uuid4(), "sandbox", "default", 1, "sandbox.paused", 1, "{}", META)],
            columns=["stream_id", "kind", "tenant", "version", "type", "schema", "data", "meta"],
        )
        later = await insert_event(other)
        assert await bare_log.horizon() < later - 1
        await transaction.commit()
        assert len((await bare_log.read_after(0))[0]) == 2


async def test_no_event_without_an_actor_and_a_version(bare_dsn: str):
    async with connected(bare_dsn, owner=True) as owner:
        for meta in ("{}", '{"actor": {}}', '{"app_version": "1"}', "[]"):
            with pytest.raises(asyncpg.CheckViolationError):
                await owner.execute(INSERT_EVENT.replace(META, meta), uuid4(), 1)


async def test_a_version_stands_once_in_a_stream(bare_dsn: str):
    stream = uuid4()
    async with connected(bare_dsn) as app:
        await insert_event(app, stream)
        with pytest.raises(asyncpg.UniqueViolationError):
            await insert_event(app, stream)


async def test_refusals_carry_who_what_and_why(dsn: str, database):
    sandbox_id = uuid4()
    meta = {"actor": {"kind": "api_key", "id": "k", "name": "n"}, "app_version": "1", "request_id": "r"}
    await Refusals(database).record("default", sandbox_id, "POST /sandboxes", (409, "X", "späť"), meta)
    async with connected(dsn) as app:
        row = await app.fetchrow("SELECT tenant, stream_id, command, status, code, message, meta->>'request_id', "
                                 "refused_at IS NOT NULL FROM refusals")  # fmt: skip
    assert tuple(row) == ("default", sandbox_id, "POST /sandboxes", 409, "X", "späť", "r", True)
