"""Bring the schema to this version, as the owner, guarded so that two servers starting at once do it once.

`alembic_version` decides; a database that is ahead (a newer server ran first in a rolling deploy) is left alone and
used, because releases read what the next one writes. Alembic's `op` is one for the process: two databases migrate in
two processes, or one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import asyncpg
from alembic import command, op
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from msgspec import Struct
from sqlalchemy import Connection, exc, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.errors import SettingsError, StoreUnavailable
from app.store.database.pool import DriverConnection, async_url

_LOCK = 0x53414E444C454447  # 'SANDLEDG'


class Migration(Struct, frozen=True):
    """What a run did."""

    before: str | None
    after: str | None
    head: str
    known: bool
    """False when the database was written by a newer version."""


def run_script(sql: str) -> None:
    """Run a script of several statements inside a migration; asyncpg prepares only single ones."""
    adapted = cast("Any", op.get_bind().connection.dbapi_connection)

    async def execute(driver: DriverConnection) -> None:
        await driver.execute(sql)

    adapted.run_async(execute)


def _config() -> Config:
    package = Path(__file__).resolve().parents[2]
    home = next(path for path in (package / "migrations", package.parent / "migrations") if path.is_dir())
    config = Config()
    config.set_main_option("script_location", str(home))
    return config


def _upgrade(connection: Connection, *, apply: bool) -> Migration:
    config = _config()
    script = ScriptDirectory.from_config(config)
    head = script.get_current_head() or ""
    known = {revision.revision for revision in script.walk_revisions()}
    before = MigrationContext.configure(connection).get_current_revision()
    if before == head or (before is not None and before not in known) or not apply:
        return Migration(before, before, head, before is None or before in known)
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    after = MigrationContext.configure(connection).get_current_revision()
    return Migration(before, after, head, known=True)


async def migrate(dsn: str, *, apply: bool = True) -> Migration:
    """Apply what is missing, or with `apply=False` only look.

    Raises:
        StoreUnavailable: no connection.
        SettingsError: the DSN's user may not create what is needed.
    """
    engine = create_async_engine(async_url(dsn), hide_parameters=True, connect_args={"timeout": 10})
    try:
        async with engine.begin() as connection:
            # Held to the end of the transaction: the second server waits here, then finds nothing to do.
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            return await connection.run_sync(lambda sync: _upgrade(sync, apply=apply))
    except (OSError, exc.DBAPIError, asyncpg.PostgresError) as error:
        cause = getattr(error, "orig", None) or error
        if getattr(cause, "sqlstate", None) == asyncpg.InsufficientPrivilegeError.sqlstate:
            raise SettingsError(
                f"the database user may not do this: {cause}. Migrations need the database's owner with CREATEROLE, or "
                "a role sandledger_app made beforehand and granted to that user"
            ) from error
        if isinstance(cause, OSError):
            raise StoreUnavailable(
                f"no PostgreSQL answers at the configured address ({cause}); start it, or correct store.postgresql.dsn "
                "(OPENSANDBOX_STORE_POSTGRESQL_DSN, DATABASE_URL)"
            ) from error
        raise StoreUnavailable(f"PostgreSQL did not migrate: {cause}") from error
    finally:
        await engine.dispose()
