"""Other major versions of PostgreSQL, where the machine has them: migrated by a plain owner, served by a plain login."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest

from app.service.sandboxes import Service
from app.store.database.dsn import address
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.log.signal import Signal
from tests.support.cluster import tcp_server
from tests.support.drift import assert_no_drift
from tests.support.needs import refuse_or_skip
from tests.support.sql import app_role, connected
from tests.support.stream import META, requested

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
SQL = ("CREATE ROLE owner LOGIN CREATEROLE", "CREATE DATABASE ledger OWNER owner")


@pytest.mark.parametrize("programs", PROGRAMS or [None], ids=lambda path: "none" if path is None else path.parent.name)
async def test_another_major_version(programs: Path | None):
    if programs is None or not (programs / "initdb").exists():
        refuse_or_skip("no other PostgreSQL is installed; .ci/apt postgresql installs one")
    with tcp_server(programs) as server:
        server.create()
        server.start()
        for sql in SQL:
            server.run(
                "psql", "-XAtq", "-h", server.home / "socket", "-p", str(server.port), "-U", "postgres", "-c", sql
            )
        owner, serving = server.dsn("ledger", "owner"), server.dsn("ledger", "server")
        assert (await migrate(owner, admit=address(serving))).before is None
        assert (await migrate(serving)).before is not None
        database = Database(serving)
        service = Service(database, Signal(database))
        made = await service.create(uuid4(), "default", requested(), None, META)
        assert await service.log.horizon() >= made.position
        await database.close()
        assert database.login is not None
        assert database.login.warning is None
        assert await assert_no_drift(serving) == 1
        async with connected(owner, owner=True) as connection:
            assert await app_role(connection) == database.login.role
