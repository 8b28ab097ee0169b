"""Plain connections for tests that go behind the service's back, as the application role or as the owner."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from app.store.database.pool import APP_ROLE

META = '{"actor": {"kind": "operator", "id": "t", "name": "test"}, "app_version": "test"}'
INSERT_EVENT = (
    "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
    f"VALUES ($1, 'sandbox', 'default', $2, 'sandbox.metadata_patched', 1, '{{}}', '{META}') RETURNING position"
)


@asynccontextmanager
async def connected(dsn: str, *, owner: bool = False, **settings: str) -> AsyncGenerator[Any]:
    """One asyncpg connection. A killed one closes without complaint."""
    role = {} if owner else {"role": APP_ROLE}
    connection = await asyncpg.connect(dsn, server_settings={**role, **settings})
    try:
        yield connection
    finally:
        connection.terminate()


async def insert_event(connection: Any, stream: UUID | None = None, version: int = 1) -> int:
    """A bare event, without a head row. Says its position."""
    return await connection.fetchval(INSERT_EVENT, stream or uuid4(), version)


async def partitions(connection: Any) -> list[str]:
    """Names, oldest first."""
    rows = await connection.fetch(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "WHERE i.inhparent = 'events'::regclass ORDER BY 1"
    )
    return [row[0] for row in rows]
