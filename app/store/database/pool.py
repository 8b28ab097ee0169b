"""The connections of one process: most of them shared, a few reserved for leases and wake-ups.

asyncpg's pool holds the connections, `app.store.database.connect` opens and checks them, SQLAlchemy Core only writes
SQL. Every statement is its own transaction.

**Two pools.** Twelve slow statements of the API may use up the first one. Claims, heartbeats and notifications go
through `reserved`, so that a busy server keeps its leases. One more connection listens.

**Errors.** StoreBusy: all connections are in use for longer than `pool_timeout`; PostgreSQL itself answers.
StoreRefused: it answers, and the login, the database or our schema is not there (any more), so waiting does not help.
Any other StoreUnavailable: it does not answer, or may not write. Only acquiring and the statement itself are
translated, never the body of a caller who holds a connection: an error of the engine in there is not the database's.

**Silence.** A statement that is not answered within `command_timeout` counts as a database that is gone: after a
failover, or a partition that drops packets, an open connection may stay silent for a quarter of an hour. A statement
that is cancelled or times out is cancelled at the server too, and its connection is closed in the background, so that
no caller waits for the close.

**Smart shutdown.** PostgreSQL then refuses new connections and waits for the open ones, without telling them. So a new
connection is tried every `knock_every` seconds; when it is refused because the server shuts down, all idle connections
are given back, and the others as soon as they are free.

A connection that died while nobody used it is replaced when it is taken, so that a restart of PostgreSQL does not cost
one request for each of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar, cast

import asyncpg
from asyncpg import exceptions as pg

from app.errors import SandledgerError, StoreBusy, StoreRefused, StoreUnavailable
from app.store.database.connect import GONE, SCHEMA_MISSING, Connector, Login, explained
from app.store.database.statement import Statement

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 2.0
_IDLE_SECONDS = 60.0
RESERVED_CONNECTIONS = 2
"""Connections for leases and wake-ups."""
RESERVED_AND_LISTENER_CONNECTIONS = RESERVED_CONNECTIONS + 1
"""The reserved connections and the one that listens."""


class _OneLine(logging.Filter):
    """asyncpg reports a connection that it could not restore with a traceback; the kind of error is enough."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            kind = record.exc_info[0]
            record.msg, record.args = f"{record.getMessage()}: {kind.__name__ if kind else 'unknown'}", ()
            record.exc_info = None
        return True


logging.getLogger("asyncpg.pool").addFilter(_OneLine())


async def _no_reset(_driver: object) -> None:
    """Every statement commits by itself, and the holder of a connection cleans up, so there is nothing to reset."""


class Connection:
    """One connection that was taken from the pool."""

    def __init__(self, driver: Any, why_denied: Callable[[], Awaitable[StoreRefused | None]]) -> None:
        """`why_denied` says why the role may not use the schema. None = it may."""
        self._driver = driver
        self._why_denied = why_denied
        self.broken = False
        """A statement of unknown fate may still run on it."""

    async def fetch(self, statement: Statement, **values: Any) -> Sequence[asyncpg.Record]:
        """Run a statement and answer all its rows."""
        arguments = statement.arguments(values)
        return await self._translated(self._driver.fetch(statement.sql, *arguments))

    async def fetch_one(self, statement: Statement, **values: Any) -> asyncpg.Record | None:
        """Run a statement and answer its first row. None = it has no row."""
        rows = await self.fetch(statement, **values)
        return rows[0] if rows else None

    @asynccontextmanager
    async def all_or_none(self) -> AsyncGenerator[None]:
        """One transaction (READ COMMITTED) around the body."""
        transaction = self._driver.transaction()
        await self._translated(transaction.start())
        try:
            yield
        except BaseException:
            if not self.broken:
                await self._translated(transaction.rollback())
            raise
        await self._translated(transaction.commit())

    async def _translated(self, call: Awaitable[T]) -> T:
        """Run a call of the driver. Only its own errors are translated, never those of a caller's body."""
        try:
            return await call
        except GONE as error:
            if isinstance(error, ValueError):
                raise  # a value of ours that does not fit; asyncpg counts it among the broken connections
            self.broken = True
            raise StoreUnavailable(f"PostgreSQL is not reachable: {_kind(error)}") from error
        except SCHEMA_MISSING as error:
            raise self._schema_gone(error) from None
        except pg.InsufficientPrivilegeError:
            why = await self._why_denied()
            if why is None:
                raise  # a mistake of ours, as any other wrong statement
            raise self._schema_gone(why) from None
        except asyncio.CancelledError:
            self.broken = True
            raise

    def _schema_gone(self, why: Exception) -> StoreRefused:
        self.broken = True  # a new connection is checked, and learns the role of a schema that was made again
        return StoreRefused(
            f"the schema sandledger is gone, or was made again, under this server ({why}): restore a backup, or "
            "run `sandledger migrate` for an empty one"
        )


class Pool:
    """Connections of one size. Opens at the first statement."""

    def __init__(
        self, connector: Connector, *, min_size: int, max_size: int, wait: float, on_open: Callable[[], None]
    ) -> None:
        """`wait` is how long to wait for a free one, in seconds."""
        self._connector = connector
        self._sizes = (min_size, max_size)
        self._wait = wait
        self._on_open = on_open
        self._slots = asyncio.Semaphore(max_size)
        self._pool: Any = None
        self._opening: asyncio.Task[Any] | None = None
        self._goodbyes: set[asyncio.Task[None]] = set()

    async def fetch(self, statement: Statement, **values: Any) -> Sequence[asyncpg.Record]:
        """All rows of one autocommitted statement."""
        connection, driver = await self._take()
        try:
            return await connection.fetch(statement, **values)
        finally:
            await self._give_back(connection, driver)

    async def fetch_one(self, statement: Statement, **values: Any) -> asyncpg.Record | None:
        """The first row of one autocommitted statement, or None."""
        rows = await self.fetch(statement, **values)
        return rows[0] if rows else None

    @asynccontextmanager
    async def connection(self) -> AsyncGenerator[Connection]:
        """A connection for as long as the caller wants. Errors of the caller's body pass as they are."""
        connection, driver = await self._take()
        try:
            yield connection
        except asyncio.CancelledError:
            connection.broken = True  # the body may have left a lock
            raise
        finally:
            await self._give_back(connection, driver)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Connection]:
        """Run several statements in one transaction."""
        async with self.connection() as connection, connection.all_or_none():
            yield connection

    async def _take(self) -> tuple[Connection, Any]:
        if self._slots.locked():
            try:
                async with asyncio.timeout(self._wait):
                    await self._slots.acquire()
            except TimeoutError:
                raise StoreBusy(
                    f"all {self._sizes[1]} database connections of this process are in use for {self._wait:g} s; "
                    "raise store.postgresql.max_pool_size, or look for slow statements"
                ) from None
        else:
            await self._slots.acquire()
        try:
            pool = self._pool or await self._opened()
            driver = await pool.acquire()
        except GONE as error:
            self._slots.release()
            raise explained(error) from error
        except BaseException:
            self._slots.release()
            raise
        return Connection(driver, self._connector.why_denied), driver

    async def _give_back(self, connection: Connection, driver: Any) -> None:
        if connection.broken:
            task = asyncio.get_running_loop().create_task(self._part(driver))
            self._goodbyes.add(task)
            task.add_done_callback(self._goodbyes.discard)
            return
        try:
            await self._pool.release(driver)
        except (*GONE, pg.PostgresError):
            pass  # it is closed, and the answer is ours already
        finally:
            self._slots.release()

    async def _part(self, driver: Any) -> None:
        """Close the connection. Closing sends the cancel request of a statement that was given up and waits for it."""
        try:
            if not driver.is_closed():
                await driver.close(timeout=_CLOSE_SECONDS)
            await self._pool.release(driver)
        except (*GONE, pg.PostgresError):
            with suppress(pg.InterfaceError):  # it is out of the pool already
                driver.terminate()
        finally:
            self._slots.release()

    async def _opened(self) -> Any:
        """The pool, opened once; all who come meanwhile share the outcome."""
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(self._settle)
        return await asyncio.shield(self._opening)

    def _settle(self, opening: asyncio.Task[Any]) -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self._pool = opening.result()
            self._on_open()

    async def _open(self) -> Any:
        minimum, maximum = self._sizes
        return await cast("Any", asyncpg).create_pool(
            min_size=minimum,
            max_size=maximum,
            connect=self._connector.open,
            reset=_no_reset,
            max_inactive_connection_lifetime=_IDLE_SECONDS,
            max_queries=2**62,
        )

    async def retire(self) -> None:
        """Close idle connections now, and the others when they come back."""
        pool = self._pool
        if pool is None:
            return
        idle = pool.get_idle_size()
        await pool.expire_connections()
        for _ in range(idle):
            # Taking an expired connection closes it; the new one in its place is refused.
            with suppress(StoreUnavailable, *GONE, pg.PostgresError):
                await pool.release(await pool.acquire())

    async def close(self) -> None:
        """Wait for statements under way, then close every connection."""
        if self._opening is not None:
            with suppress(StoreUnavailable, *GONE):
                await asyncio.shield(self._opening)
        await asyncio.gather(*self._goodbyes, return_exceptions=True)
        if self._pool is not None:
            with suppress(*GONE, pg.PostgresError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._pool.close()

    def terminate(self) -> None:
        """Drop every connection without a word."""
        if self._pool is not None:
            self._pool.terminate()


def _kind(error: BaseException) -> str:
    return type(error).__name__


class Database(Pool):
    """All connections of one process. Itself the pool for everybody."""

    def __init__(
        self,
        dsn: str,
        *,
        min_size: int = 1,
        max_size: int = 10,
        connect_timeout: float = 5,
        pool_timeout: float = 5,
        command_timeout: float = 15,
        knock_every: float = 5,
    ) -> None:
        """Open lazily. Times in seconds.

        Raises:
            SettingsError: the DSN does not parse.
        """
        self.dsn = dsn
        connector = Connector(dsn, connect_timeout=connect_timeout, command_timeout=command_timeout)
        super().__init__(
            connector, min_size=min(min_size, max_size), max_size=max_size, wait=pool_timeout, on_open=self._attend
        )
        self.reserved = Pool(
            connector, min_size=0, max_size=RESERVED_CONNECTIONS, wait=pool_timeout, on_open=self._attend
        )
        """For claims, heartbeats and notifications only."""
        self._knock_every = knock_every
        self._listening: set[Any] = set()
        self._attending: asyncio.Task[None] | None = None

    @property
    def login(self) -> Login | None:
        """Whom PostgreSQL knows us as; None before the first connection."""
        return self._connector.login

    @asynccontextmanager
    async def listen(self, channels: Mapping[str, Callable[..., None]]) -> AsyncGenerator[Listening]:
        """A connection of its own that hears these channels, outside the pools."""
        driver = await self._connector.open()
        listening = Listening(driver)
        try:
            self._listening.add(driver)
            driver.add_termination_listener(listening.end)
            try:
                for channel, callback in channels.items():
                    await driver.add_listener(channel, callback)
            except GONE as error:
                raise explained(error) from error
            yield listening
        finally:
            self._listening.discard(driver)
            with suppress(*GONE, pg.PostgresError):
                await asyncio.shield(driver.close(timeout=_CLOSE_SECONDS))

    def _attend(self) -> None:
        if self._attending is None:
            self._attending = asyncio.get_running_loop().create_task(self._watch(), name="database-watch")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._knock_every)
            try:
                await self._connector.knock()
            except SandledgerError as error:
                if isinstance(error.__cause__, pg.CannotConnectNowError):
                    _LOG.warning("%s; giving its connections back", error)
                    await self.retire()

    async def retire(self) -> None:
        """Give back what is idle, so that a smart shutdown ends."""
        await super().retire()
        await self.reserved.retire()
        for driver in list(self._listening):
            with suppress(*GONE, pg.PostgresError):
                await driver.close(timeout=_CLOSE_SECONDS)

    async def close(self) -> None:
        """Close every connection of both pools, when the statements under way have ended."""
        if self._attending is not None:
            self._attending.cancel()
        await asyncio.gather(super().close(), self.reserved.close())

    def terminate(self) -> None:
        """Drop every connection without a word."""
        if self._attending is not None:
            self._attending.cancel()
        super().terminate()
        self.reserved.terminate()


class Listening:
    """A connection that listens on channels."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.ended = asyncio.Event()
        """Set when the connection has ended."""

    def end(self, *_: object) -> None:
        """The connection has ended."""
        self.ended.set()

    async def ping(self) -> None:
        """Ask something: a connection that was cut off looks just like one on which nobody speaks."""
        try:
            await self._driver.fetchval("SELECT 1")
        except GONE as error:
            raise StoreUnavailable(f"PostgreSQL is not reachable: {_kind(error)}") from error
