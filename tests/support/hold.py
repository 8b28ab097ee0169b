"""Hold a head row, so that appends meet each other where a test wants them to."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import msgspec

from tests.support.sql import connected
from tests.support.stream import META


class Hold:
    """A locked head row."""

    def __init__(self, connection: Any, watcher: Any, sandbox_id: UUID) -> None:
        self._connection = connection
        self._watcher = watcher
        self._sandbox_id = sandbox_id
        self._transaction = connection.transaction()

    async def take(self) -> None:
        await self._transaction.start()
        await self._connection.execute("SELECT FROM sandboxes WHERE id = $1 FOR UPDATE", self._sandbox_id)

    def keeps_waiting(self, count: int) -> Callable[[], Awaitable[bool]]:
        """A condition: so many others have loaded and now wait to append."""

        async def waiting() -> bool:
            return count <= await self._watcher.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )

        return waiting

    async def write(self) -> None:
        """Another event, before all who wait."""
        await self._connection.execute(
            "WITH written AS ("
            "  INSERT INTO events (stream_id, kind, tenant, version, type, schema, data, meta) "
            "  SELECT id, 'sandbox', tenant, version + 1, 'sandbox.metadata_patched', 1, '{}', $2 "
            "  FROM sandboxes WHERE id = $1 RETURNING position) "
            "UPDATE sandboxes SET version = version + 1, position = written.position FROM written WHERE id = $1",
            self._sandbox_id,
            msgspec.json.encode(META).decode(),
        )

    async def let_go(self) -> None:
        await self._transaction.commit()


@asynccontextmanager
async def held(dsn: str, sandbox_id: UUID) -> AsyncGenerator[Hold]:
    """Taken; let go by hand, or by the connection's end."""
    # Only the owner is shown what other sessions wait for.
    async with connected(dsn) as connection, connected(dsn, owner=True) as watcher:
        hold = Hold(connection, watcher, sandbox_id)
        await hold.take()
        yield hold
