"""Empty databases, to be migrated by the test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from app.store.embedded.server import EmbeddedPostgres
from tests.conftest import on_database
from tests.support.sql import connected

MakeEmpty = Callable[..., Awaitable[str]]


@pytest.fixture
async def make_empty(postgres: EmbeddedPostgres) -> AsyncIterator[MakeEmpty]:
    """Each call: the DSN of a new empty database, with a login role of its own as owner when one is named."""
    names: list[str] = []

    async def make(owner: str = "postgres") -> str:
        name = f"m_{uuid.uuid4().hex}"
        async with connected(postgres.dsn, owner=True) as superuser:
            await superuser.execute(f"CREATE DATABASE {name} TEMPLATE template0 OWNER {owner}")
        names.append(name)
        return on_database(postgres.dsn, name).replace("postgres@", f"{owner}@")

    yield make
    async with connected(postgres.dsn, owner=True) as superuser:
        for name in names:
            await superuser.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def make_login(postgres: EmbeddedPostgres) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Each call: the name of a new login role with these attributes."""
    names: list[str] = []

    async def make(attributes: str = "") -> str:
        name = f"login_{uuid.uuid4().hex[:12]}"
        async with connected(postgres.dsn, owner=True) as superuser:
            await superuser.execute(f"CREATE ROLE {name} LOGIN {attributes}")
        names.append(name)
        return name

    yield make
    async with connected(postgres.dsn, owner=True) as superuser:
        for name in names:
            await superuser.execute(f"DROP ROLE {name}")
