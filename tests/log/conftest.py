"""A fresh database for tests that write events without heads, which the check for drift would refuse."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from app.store.database.pool import Database
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.store import EventLog
from tests.conftest import cloned, on_database
from tests.support.sql import connected


async def _as_owner(dsn: str, statement: str) -> None:
    async with connected(dsn, owner=True) as connection:
        await connection.execute(statement)


@pytest.fixture
def bare_dsn(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"t_{uuid.uuid4().hex}"
    for statement in cloned(name, template):
        asyncio.run(_as_owner(postgres.dsn, statement))
    try:
        yield on_database(postgres.dsn, name)
    finally:
        asyncio.run(_as_owner(postgres.dsn, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))


@pytest.fixture
async def bare_log(bare_dsn: str) -> AsyncIterator[EventLog]:
    database = Database(bare_dsn)
    yield EventLog(database)
    await database.close()
