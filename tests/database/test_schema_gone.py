"""A schema that is dropped under a server is known by PostgreSQL's codes, because its texts are in the server's language."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from asyncpg import exceptions as pg
from sqlalchemy import func, select

from app.errors import StoreRefused
from app.store.database.connect import Connector
from app.store.database.dsn import address
from app.store.database.migrate import migrate
from app.store.database.pool import Connection, Database
from app.store.database.statement import Statement
from app.store.tables import sandboxes
from tests.conftest import as_server
from tests.support.cluster import TcpServer, tcp_server
from tests.support.sql import app_role, connected

COUNT = Statement(select(func.count()).select_from(sandboxes))
NO_TABLE = pg.UndefinedTableError("Relation \u00bbsandledger.sandboxes\u00ab existiert nicht")
NO_SCHEMA = pg.InvalidSchemaNameError("Schema \u00bbsandledger\u00ab existiert nicht")
DENIED = pg.InsufficientPrivilegeError("keine Berechtigung f\u00fcr Schema sandledger")
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


class Refusing:
    """A driver whose statements fail with this error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def fetch(self, *_: Any) -> None:
        raise self._error


async def is_refused() -> StoreRefused | None:
    return StoreRefused("the role may not use it")


async def is_allowed() -> StoreRefused | None:
    return None


@pytest.mark.parametrize("error", [NO_TABLE, NO_SCHEMA, DENIED], ids=lambda error: error.sqlstate)
async def test_the_code_decides_and_not_the_text(error: pg.PostgresError):
    connection = Connection(Refusing(error), is_refused)
    with pytest.raises(StoreRefused, match="the schema sandledger is gone, or was made again"):
        await connection.fetch(COUNT)
    assert connection.broken, "the next one is checked again"


async def test_a_denial_that_is_not_about_the_schema_is_a_mistake_of_ours():
    connection = Connection(Refusing(DENIED), is_allowed)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connection.fetch(COUNT)
    assert not connection.broken


async def test_a_role_that_may_not_use_the_schema_any_more_is_refused(dsn: str):
    database = Database(as_server(dsn))
    await database.fetch(COUNT)
    async with connected(dsn, owner=True) as owner:
        role = await app_role(owner)
        await owner.execute(f"REVOKE USAGE ON SCHEMA sandledger FROM {role}")
        try:
            with pytest.raises(StoreRefused, match=f"gone, or was made again.*{role} may not use"):
                await database.fetch(COUNT)
        finally:
            await owner.execute(f"GRANT USAGE ON SCHEMA sandledger TO {role}")
    await database.fetch(COUNT)
    await database.close()


@pytest.fixture
def german(tmp_path: Path) -> Iterator[TcpServer]:
    """A server that says everything in German."""
    catalogue = "/usr/share/locale/de/LC_MESSAGES"
    usable = [path.parent for path in PROGRAMS if Path(catalogue, f"postgres-{path.parts[-3]}.mo").exists()]
    source = Path("/usr/share/i18n/locales/de_DE")
    if not usable or not source.exists() or shutil.which("localedef") is None:
        pytest.skip("no PostgreSQL with German texts, or no German locale to compile; the test of the codes has run")
    with tcp_server(usable[-1]) as server:
        locales = server.account.own(server.home / "locales")
        subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", locales / "de_DE.UTF-8"], check=True)
        locales.chmod(0o755)
        server.create()
        server.start(locales=locales, lc_messages="de_DE.UTF-8")
        yield server


@pytest.mark.parametrize("done", ["DROP SCHEMA sandledger CASCADE", "REVOKE USAGE ON SCHEMA sandledger FROM {role}"])
async def test_a_server_that_speaks_german(german: TcpServer, done: str):
    owner_dsn, serving = german.dsn(), german.dsn(user="server")
    await migrate(owner_dsn, admit=address(serving))
    database = Database(serving)
    await database.fetch(COUNT)
    async with connected(owner_dsn, owner=True) as owner:
        with pytest.raises(asyncpg.UndefinedTableError, match="existiert nicht"):
            await owner.execute(f"SELECT FROM x_{uuid4().hex}")
        await owner.execute(done.format(role=await app_role(owner)))
    for _ in range(2):
        with pytest.raises(StoreRefused):
            await database.fetch(COUNT)
    await database.close()


async def test_a_schema_that_was_made_again_for_another_role_is_used_after_one_refusal(dsn: str):
    """Opening as the role of before fails already at the start packet, and that role must be forgotten."""
    connector = Connector(as_server(dsn), connect_timeout=5, command_timeout=5)
    (await connector.open()).terminate()
    async with connected(dsn, owner=True) as owner:
        before = await app_role(owner)
        await owner.execute(f"ALTER ROLE {before} RENAME TO {before}_2")
        try:
            await owner.execute(f"UPDATE installation SET app_role = '{before}_2'")
            with pytest.raises(StoreRefused):
                await connector.open()
            (await connector.open()).terminate()
            assert connector.login is not None
            assert connector.login.role == f"{before}_2"
        finally:
            await owner.execute(f"ALTER ROLE {before}_2 RENAME TO {before}")
            await owner.execute(f"UPDATE installation SET app_role = '{before}'")
