"""Bring the schema to this version, as its owner, guarded so that servers starting at once do it once.

`sandledger.alembic_version` decides; tables of another project in the same database, and its version table in `public`,
do not count. A database that is ahead (a newer server ran first in a rolling deploy) is left alone and used, because
releases read what the next one writes.

**One transaction a revision**, so that a long history does not hold all locks to its end. A revision that cannot run
inside one (an index built concurrently) says so with `op.get_context().autocommit_block()`.

**Locks.** A statement that waits for a table lock makes every later reader and writer of that table wait behind it. So
it waits `_LOCK_TIMEOUT` at most; then the revision is rolled back and tried again after a pause in which others go on.

**Once.** An advisory lock of the session excludes other runs. It is asked for again and again and never waited for: a
session that waits inside a statement holds a snapshot, for which an index built concurrently waits in turn.

Alembic's `op` is one for the process: two databases migrate in two processes, or one after the other.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from alembic import command, op
from alembic.config import Config
from alembic.script import ScriptDirectory
from asyncpg import exceptions as pg
from msgspec import Struct
from sqlalchemy import Connection, exc
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from app.errors import SettingsError, StoreUnavailable
from app.store.database.connect import GONE, GRANTED, PINNED, dial, explained
from app.store.database.dsn import Address, address

_LOCK_KEY = 0x53414E444C454447  # 'SANDLEDG'
_LOCK_TIMEOUT = "3s"
_MAX_LOCK_ATTEMPTS = 20
_LOCK_PAUSE_SECONDS = 1.0
_POLL_SECONDS = 0.05
_SCRAM_ROUNDS = 4096
_OWNER = {
    **PINNED,
    "application_name": "sandledger migrate",
    # Ours first, because new objects go into the first schema of the path.
    "search_path": "sandledger, pg_catalog, pg_temp",
    "idle_in_transaction_session_timeout": "0",
    "jit": "off",
}
_FOUND = """
SELECT c.relname FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
 WHERE n.nspname = 'sandledger' AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
"""
_FOREIGN = (
    "the schema sandledger of this database holds tables of something else ({what}); use another database, or move "
    "that schema away (ALTER SCHEMA sandledger RENAME TO ...)"
)
Say = Callable[[str], None]


class Migration(Struct, frozen=True):
    """The revisions before and after a run."""

    before: str | None
    after: str | None
    head: str
    known: bool
    """False when the database was written by a newer version."""


def _silent(_: str) -> None:
    pass


def run_script(sql: str) -> None:
    """Run a script of several statements inside a migration; asyncpg prepares only single ones."""
    bind = op.get_bind()
    bind.exec_driver_sql("SELECT 1")  # SQLAlchemy begins its transaction with the first statement that it sees
    adapted = cast("Any", bind.connection.dbapi_connection)

    async def execute(driver: Any) -> None:
        await driver.execute(sql)

    adapted.run_async(execute)


def _scripts(home: Path | None) -> tuple[Config, ScriptDirectory]:
    package = Path(__file__).resolve().parents[2]
    found = home or next(path for path in (package / "migrations", package.parent / "migrations") if path.is_dir())
    config = Config()
    config.set_main_option("script_location", str(found))
    return config, ScriptDirectory.from_config(config)


async def migrate(
    dsn: str,
    *,
    apply: bool = True,
    admit: Address | None = None,
    say: Say = _silent,
    scripts: Path | None = None,
) -> Migration:
    """Apply what is missing, or with `apply=False` only look. `admit` is whom servers log in as: made when missing.

    Raises:
        StoreUnavailable: no connection.
        SettingsError: the DSN's user may not create what is needed, or the schema is not ours.
    """
    config, script = _scripts(scripts)
    driver = await dial(address(dsn), 10, _OWNER)
    try:
        if not apply:
            return await _look(driver, script)
        while not await driver.fetchval("SELECT pg_catalog.pg_try_advisory_lock($1)", _LOCK_KEY):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)
        seen = await _look(driver, script)
        async with _engine_on(driver) as connection:
            if seen.known and seen.before != seen.head:
                if seen.before is None:
                    await driver.execute("CREATE SCHEMA IF NOT EXISTS sandledger")
                await driver.execute(f"SET lock_timeout = '{_LOCK_TIMEOUT}'")
                await _upgrade(connection, config, say)
            if seen.known:
                await _name_role(driver)
            if admit is not None:
                await _admit(driver, admit)
            return Migration(seen.before, (await _look(driver, script)).after, seen.head, seen.known)
    except (*GONE, pg.PostgresError, exc.DBAPIError) as error:
        raise _told(error) from error
    finally:
        driver.terminate()


@asynccontextmanager
async def _engine_on(driver: Any) -> AsyncGenerator[AsyncConnection]:
    """SQLAlchemy, for Alembic, on this very connection, so that the session keeps its lock."""

    async def given() -> Any:
        return driver

    engine = create_async_engine("postgresql+asyncpg://", async_creator=given, poolclass=NullPool, hide_parameters=True)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


async def _look(driver: Any, script: ScriptDirectory) -> Migration:
    """Which revision the database is at."""
    head = script.get_current_head() or ""
    tables = {row[0] for row in await driver.fetch(_FOUND)}
    if not tables:
        return Migration(None, None, head, known=True)
    if "alembic_version" not in tables:
        raise SettingsError(_FOREIGN.format(what=", ".join(sorted(tables)[:3])))
    at = await driver.fetchval("SELECT version_num FROM sandledger.alembic_version")
    known = at is None or at in {revision.revision for revision in script.walk_revisions()}
    if not known and "installation" not in tables:
        raise SettingsError(_FOREIGN.format(what=f"alembic revision {at}"))
    return Migration(at, at, head, known)


async def _upgrade(connection: AsyncConnection, config: Config, say: Say) -> None:
    """Revision by revision. What was done stays when a later one has to wait."""

    def run(sync: Connection) -> None:
        config.attributes["connection"] = sync
        command.upgrade(config, "head")

    for attempt in range(1, _MAX_LOCK_ATTEMPTS + 1):
        try:
            await connection.run_sync(run)
        except (exc.DBAPIError, pg.LockNotAvailableError) as error:
            if _sqlstate(error) != pg.LockNotAvailableError.sqlstate or attempt == _MAX_LOCK_ATTEMPTS:
                raise
        else:
            return
        await connection.rollback()
        say(f"migration waits for a table that others use (attempt {attempt} of {_MAX_LOCK_ATTEMPTS})")
        await asyncio.sleep(_LOCK_PAUSE_SECONDS)


async def _name_role(driver: Any) -> None:
    """Data restored from another database brings the name of that one's role; the privileges are this one's."""
    role = await driver.fetchval(GRANTED)
    if role is not None and role != await driver.fetchval("SELECT app_role FROM sandledger.installation"):
        await driver.execute("UPDATE sandledger.installation SET app_role = $1", role)


async def _admit(driver: Any, server: Address) -> None:
    """Make the servers' login a member of the application role, and make the login itself when there is none."""
    role = await driver.fetchval("SELECT app_role FROM sandledger.installation")
    login = server.user
    member = "SELECT pg_catalog.pg_has_role(r.oid, $2, 'MEMBER') FROM pg_catalog.pg_roles AS r WHERE r.rolname = $1"
    is_member = await driver.fetchval(member, login, role)
    if is_member is None:
        secret = None if server.password is None else verifier(server.password)
        create = "SELECT pg_catalog.format('CREATE ROLE %I LOGIN PASSWORD %L', $1::text, $2::text)"
        await driver.execute(await driver.fetchval(create, login, secret))
    if not is_member:
        await driver.execute(
            await driver.fetchval("SELECT pg_catalog.format('GRANT %I TO %I', $1::text, $2::text)", role, login)
        )


def verifier(password: str) -> str:
    """What PostgreSQL stores for a password (SCRAM-SHA-256, RFC 5803), so that no log of statements can hold it.

    Raises:
        SettingsError: the password has characters that would first have to be normalised.
    """
    if not password.isascii():
        raise SettingsError("the password in store.postgresql.dsn is not ASCII: make the login yourself (CREATE ROLE)")
    salt = os.urandom(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, _SCRAM_ROUNDS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    salt64, stored64, server64 = (base64.b64encode(part).decode() for part in (salt, stored, server))
    return f"SCRAM-SHA-256${_SCRAM_ROUNDS}:{salt64}${stored64}:{server64}"


def _sqlstate(error: BaseException) -> str | None:
    cause = getattr(error, "orig", None) or error
    return getattr(cause, "sqlstate", None)


def _told(error: BaseException) -> Exception:
    cause = getattr(error, "orig", None) or error
    if _sqlstate(error) == pg.InsufficientPrivilegeError.sqlstate:
        return SettingsError(
            f"the database user may not do this: {cause}. Migrations need the owner (store.postgresql.migrate_dsn or "
            "SANDLEDGER_MIGRATE_DSN): a user that may create a schema in this database and has CREATEROLE, or the "
            "application role made beforehand and granted to that user"
        )
    if isinstance(cause, GONE):
        return explained(cause)
    return StoreUnavailable(f"PostgreSQL did not migrate: {cause}")
