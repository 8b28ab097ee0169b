"""Connections to PostgreSQL: one SQLAlchemy engine per process, autocommit, as the application role.

Every statement is its own transaction unless `transaction()` says otherwise. The role is part of the connection's
start packet, so that no statement can forget it. `idle_in_transaction_session_timeout` ends a stuck writer, which
would otherwise hold back every reader of the log.

A statement that is not answered within `command_timeout` counts as a database that is gone: after a failover, or a
partition that drops packets, an open connection may stay silent for a quarter of an hour, and ten of them are the pool.

Failure: whatever means "the database is not there, or may not write" becomes StoreUnavailable and the connection is
dropped from the pool; parameters never appear in an error or a log (`hide_parameters`). Connections that died while
nobody used them are replaced at checkout, so that a restart of PostgreSQL does not cost one request for each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, cast

import asyncpg
from sqlalchemy import event, exc
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import greenlet_spawn

from app.errors import SettingsError, StoreUnavailable
from app.store.database.statement import Statement

APP_ROLE = "sandledger_app"
_GONE = (
    OSError,
    asyncio.TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.OperatorInterventionError,  # shutting down, starting up, killed
    asyncpg.InsufficientResourcesError,  # disk full, too many connections
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby since the last failover
    exc.TimeoutError,
    AsyncAdapt_asyncpg_dbapi.Error,  # SQLAlchemy only connects; its errors are refused connections
    exc.DBAPIError,
)


def async_url(dsn: str) -> URL:
    """Any PostgreSQL DSN, for SQLAlchemy on asyncpg."""
    try:
        url = make_url(dsn)
    except exc.ArgumentError:
        raise SettingsError(
            "the PostgreSQL DSN does not parse; write postgresql://user:password@host/database"
        ) from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise SettingsError("the DSN must begin with postgresql://")
    return url.set(drivername="postgresql+asyncpg")


class DriverConnection(Protocol):
    """What we use of asyncpg's connection, which ships without types."""

    async def fetch(self, query: str, *args: Any) -> list[asyncpg.Record]:
        """All rows."""
        ...

    async def execute(self, query: str) -> str:
        """A script."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[object]:
        """All or none."""
        ...

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        """LISTEN."""
        ...

    def add_termination_listener(self, callback: Callable[..., None]) -> None:
        """Called when the connection ends."""
        ...


class Connection:
    """One connection out of the pool."""

    def __init__(self, pooled: PoolProxiedConnection) -> None:
        """Wrap a checked-out connection."""
        self._pooled = pooled
        self._driver = cast("DriverConnection", pooled.driver_connection)

    async def driver(self) -> DriverConnection:
        """The asyncpg connection underneath."""
        return self._driver

    async def fetch(self, statement: Statement, **values: Any) -> Sequence[asyncpg.Record]:
        """All rows."""
        return await self._driver.fetch(statement.sql, *statement.arguments(values))

    async def fetch_one(self, statement: Statement, **values: Any) -> asyncpg.Record | None:
        """The first row, or None."""
        rows = await self.fetch(statement, **values)
        return rows[0] if rows else None

    async def invalidate(self) -> None:
        """Never give this one back to the pool."""
        await _drop(self._pooled)


async def _drop(pooled: PoolProxiedConnection) -> None:
    """Close for good, by way of a greenlet: only so are a cancelled statement's cancellation sent and a goodbye said.

    Without, the server would go on with the statement, on a connection that no pool counts any more.
    """
    if pooled.is_valid:
        await greenlet_spawn(pooled.invalidate)


def _replace_dead(connection: Any, _record: object, _proxy: object) -> None:
    """At checkout. What PostgreSQL closed is known by now; SQLAlchemy answers this error with a new connection."""
    if connection.driver_connection.is_closed():
        raise exc.DisconnectionError


def _what(error: BaseException) -> str:
    """The server's words for a refused connection, which name no value of ours; else the kind of error."""
    if isinstance(error, exc.DBAPIError):
        return str(error.orig)
    return str(error) if isinstance(error, AsyncAdapt_asyncpg_dbapi.Error) else type(error).__name__


class Database:
    """The pool, and the two ways to use it."""

    def __init__(
        self,
        dsn: str,
        *,
        min_size: int = 1,
        max_size: int = 10,
        connect_timeout: float = 5,
        pool_timeout: float = 5,
        command_timeout: float = 15,
    ) -> None:
        """Open lazily. Timeouts in seconds."""
        self.dsn = dsn
        self.engine: AsyncEngine = create_async_engine(
            async_url(dsn),
            isolation_level="AUTOCOMMIT",
            pool_size=max(min_size, max_size),
            max_overflow=0,
            pool_timeout=pool_timeout,
            pool_reset_on_return=None,  # every statement commits by itself; transaction() cleans up after itself
            pool_pre_ping=False,
            pool_use_lifo=True,
            hide_parameters=True,
            json_deserializer=str,  # JSON stays text; each reader decodes it once, into its own struct
            connect_args={
                "timeout": connect_timeout,
                "command_timeout": command_timeout,
                "server_settings": {
                    "application_name": "sandledger",
                    "role": APP_ROLE,
                    "idle_in_transaction_session_timeout": "5000",
                    "jit": "off",
                    # An answer means that it is on disk, whatever this database's default is.
                    "synchronous_commit": "on",
                    "TimeZone": "UTC",
                },
            },
        )
        event.listen(self.engine.sync_engine, "checkout", _replace_dead)

    async def fetch(self, statement: Statement, **values: Any) -> Sequence[asyncpg.Record]:
        """All rows of one autocommitted statement."""
        async with self._connection() as connection:
            return await connection.fetch(statement, **values)

    async def fetch_one(self, statement: Statement, **values: Any) -> asyncpg.Record | None:
        """The first row of one autocommitted statement, or None."""
        rows = await self.fetch(statement, **values)
        return rows[0] if rows else None

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Connection]:
        """Several statements, READ COMMITTED, all or none."""
        async with self._connection() as connection, (await connection.driver()).transaction():
            yield connection

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A connection for as long as the caller wants, e.g. to listen."""
        async with self._connection() as connection:
            yield connection

    @asynccontextmanager
    async def _connection(self) -> AsyncGenerator[Connection]:
        try:
            # The pool's own connection, not an AsyncConnection: the latter's three more trips through a greenlet cost
            # a read by primary key a fifth of its throughput, for abilities that nothing here uses.
            pooled = await self.engine.raw_connection()
            try:
                yield Connection(pooled)
            except (*_GONE, asyncio.CancelledError):
                await _drop(pooled)  # a statement of unknown fate may still be running on it
                raise
            finally:
                pooled.close()
        except _GONE as error:
            raise StoreUnavailable(f"PostgreSQL is not reachable: {_what(error)}") from error

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()
