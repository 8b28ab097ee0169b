"""The runner: a transaction a revision, no long wait for locks, and a clear word about schemas that are not ours."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from app.errors import SettingsError
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from tests.conftest import ROOT
from tests.migrations.conftest import MakeEmpty
from tests.support.sql import connected

NEXT = """
from alembic import op
from app.store.database.migrate import run_script
revision = "{revision}"
down_revision = "{after}"
branch_labels = None
depends_on = None
def upgrade():
    {body}
"""
CONCURRENTLY = """with op.get_context().autocommit_block():
        op.execute("CREATE INDEX CONCURRENTLY later ON sandledger.refusals (code)")"""
ALTER = 'run_script("ALTER TABLE refusals ADD COLUMN later text; ALTER TABLE refusals ADD COLUMN latest text")'
FAILS = 'run_script("CREATE TABLE half (x int); SELECT 1 / 0")'
COLUMNS = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'refusals' AND column_name LIKE 'late%'"


@pytest.fixture
def scripts(tmp_path: Path) -> Any:
    """Our migrations, and others behind them."""
    (tmp_path / "versions").mkdir()
    for path in ("env.py", "versions/0001_foundation.py"):
        (tmp_path / path).write_text((ROOT / "migrations" / path).read_text())

    def add(*bodies: str) -> Path:
        for number, body in enumerate(bodies, 2):
            text = NEXT.format(revision=f"{number:04}", after=f"{number - 1:04}", body=body)
            (tmp_path / "versions" / f"{number:04}.py").write_text(text)
        return tmp_path

    return add


async def test_a_revision_stays_when_a_later_one_fails(make_empty: MakeEmpty, scripts: Any):
    dsn = await make_empty()
    with pytest.raises(Exception, match="division by zero"):
        await migrate(dsn, scripts=scripts(ALTER, FAILS))
    async with connected(dsn, owner=True) as owner:
        assert await owner.fetchval("SELECT version_num FROM alembic_version") == "0002"
        assert await owner.fetchval("SELECT to_regclass('sandledger.half')") is None
        assert await owner.fetchval(COLUMNS) == 2


async def test_an_index_is_built_concurrently_while_another_server_waits_for_its_turn(
    make_empty: MakeEmpty, scripts: Any, until: Any
):
    """Whoever waited inside a statement would hold a snapshot for which the index waits: a deadlock."""
    dsn = await make_empty()
    await migrate(dsn)
    home = scripts(CONCURRENTLY)
    async with connected(dsn, owner=True) as owner, connected(dsn, owner=True) as watcher:
        await owner.execute("BEGIN; LOCK TABLE refusals IN SHARE UPDATE EXCLUSIVE MODE")
        first = asyncio.create_task(migrate(dsn, scripts=home))

        async def blocked() -> bool:
            return await watcher.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted") > 0

        await until(blocked)
        second = asyncio.create_task(migrate(dsn, scripts=home))
        asked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%pg_try_adv%'"

        async def waits() -> bool:
            return await watcher.fetchval(f"{asked} AND pid <> pg_backend_pid()") > 0

        await until(waits)
        await owner.execute("COMMIT")
        runs = [await first, await second]
        assert [run.before for run in runs] == ["0001", "0002"]
        assert await owner.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'later'::regclass")


async def test_a_lock_that_does_not_come_is_given_up_and_asked_for_again(
    make_empty: MakeEmpty, scripts: Any, until: Any
):
    """Readers behind a waiting ALTER TABLE would wait as long as it does."""
    dsn = await make_empty()
    await migrate(dsn)
    said: list[str] = []
    async with connected(dsn, owner=True) as reader, connected(dsn, owner=True) as other:
        await reader.execute("BEGIN; SELECT FROM refusals")
        run = asyncio.create_task(migrate(dsn, scripts=scripts(ALTER), say=said.append))

        async def given_up() -> bool:
            return bool(said)

        await until(given_up)
        assert "waits for a table that others use" in said[0]
        assert await other.fetchval("SELECT count(*) FROM refusals") == 0
        await reader.execute("COMMIT")
        assert (await run).after == "0002"
        assert await other.fetchval(COLUMNS) == 2


async def test_tables_and_versions_of_another_project_do_not_count(make_empty: MakeEmpty):
    dsn = await make_empty()
    async with connected(dsn, owner=True) as owner:
        await owner.execute(
            "CREATE TABLE public.alembic_version (version_num text); INSERT INTO public.alembic_version VALUES ('ab12');"
            "CREATE TABLE public.events (x int); CREATE TABLE public.sandboxes (x int)"
        )
        assert (await migrate(dsn)).after == "0001"
        assert await owner.fetchval("SELECT version_num FROM public.alembic_version") == "ab12"
        name = await owner.fetchval("SELECT current_database()")
        assert await owner.fetchval("SELECT has_database_privilege('public', $1, 'TEMPORARY')", name), "not ours alone"
    database = Database(dsn)
    assert await database.connection().__aenter__() is not None
    database.terminate()


async def test_temporary_tables_are_gone_where_the_database_is_ours_alone(make_empty: MakeEmpty):
    dsn = await make_empty()
    await migrate(dsn)
    async with connected(dsn, owner=True) as owner:
        name = await owner.fetchval("SELECT current_database()")
        assert not await owner.fetchval("SELECT has_database_privilege('public', $1, 'TEMPORARY')", name)


@pytest.mark.parametrize(
    "theirs",
    [
        "CREATE TABLE sandledger.books (x int)",
        "CREATE TABLE sandledger.alembic_version (version_num text); INSERT INTO sandledger.alembic_version VALUES ('ab12')",
    ],
    ids=["tables", "alembic"],
)
async def test_a_schema_of_that_name_that_is_somebody_elses_is_left_alone(make_empty: MakeEmpty, theirs: str):
    dsn = await make_empty()
    async with connected(dsn, owner=True) as owner:
        await owner.execute(f"CREATE SCHEMA sandledger; {theirs}")
        for apply in (True, False):
            with pytest.raises(SettingsError, match="something else"):
                await migrate(dsn, apply=apply)


def test_a_downgrade_says_that_there_is_none(scripts: Any):
    namespace: dict[str, Any] = {}
    exec((ROOT / "migrations" / "versions" / "0001_foundation.py").read_text(), namespace)
    with pytest.raises(SettingsError, match="restore a backup"):
        namespace["downgrade"]()
