"""Plain connections for tests that go behind the service's back, as the application role or as the owner."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg

META = '{"actor": {"kind": "operator", "id": "t", "name": "test"}, "app_version": "test"}'
INSERT_EVENT = (
    "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
    f"VALUES ($1, 'sandbox', 'default', $2, 'sandbox.metadata_patched', 1, '{{}}', '{META}') RETURNING position"
)
INSERT_EVENT_AT = (
    "INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta, recorded_at) "
    f"VALUES ($1, 'sandbox', 'default', $2, 'sandbox.metadata_patched', 1, $3, '{META}', $4) RETURNING position"
)


@asynccontextmanager
async def connected(dsn: str, *, owner: bool = False, **settings: str) -> AsyncGenerator[Any]:
    """One asyncpg connection. A killed one closes without complaint."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "sandledger, public", **settings})
    try:
        if not owner:
            await connection.execute(f"SET ROLE {await app_role(connection)}")
        yield connection
    finally:
        connection.terminate()


async def app_role(connection: Any) -> str:
    """The role that servers of this database work as."""
    return await connection.fetchval("SELECT app_role FROM sandledger.installation")


async def insert_event(connection: Any, stream: UUID | None = None, version: int = 1) -> int:
    """A bare event, without a head row. Says its position."""
    return await connection.fetchval(INSERT_EVENT, stream or uuid4(), version)


async def partitions(connection: Any) -> list[str]:
    """Names, oldest first."""
    rows = await connection.fetch(
        "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
        "WHERE i.inhparent = 'sandledger.events'::regclass ORDER BY 1"
    )
    return [row[0] for row in rows]


async def insert_patch(connection: Any, stream: UUID, version: int, data: str, at: datetime) -> int:
    """A patch of metadata that was recorded at this time. Says its position."""
    return await connection.fetchval(INSERT_EVENT_AT, stream, version, data, at)
