"""Wake-ups off the write path.

A transaction that issued NOTIFY holds one cluster-wide lock from before its commit until after its flush, so notifying
commits run one at a time; inside the append it cost 85 % of the throughput. Here an append only calls `poke(id)`:
subscribers in this process wake at once, and one task per process sends at most one statement every 20 ms.

**Two channels.** `news` names the streams that were appended to (or `*` when they are too many) and wakes the
subscribers of one of them and of all of them. `work` wakes claimers, and is sent only when a reconciler has something
to do: a patch of metadata needs no work at an engine. Every notification begins with a random word of its process,
which skips its own echo: its subscribers woke at the poke.

A listener only waits. A connection that was cut without notice looks the same as a quiet one. So the listener sends a
query every `check` seconds and replaces a connection that does not answer.

When `run` is cancelled it first sends what was poked and not sent yet. Stop it after the last append and before the
pool closes.

**The state itself** goes along to the subscribers of its stream within the process, so that they need not read it. It
is what an append has just written. A subscriber keeps the latest version: two appends may report in either order.

A signal from another process carries no truth. Every waiter also has a timeout and then reads the database, so a lost
notification, a pooler in between or a broken LISTEN costs latency (at most a second), never correctness.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar
from uuid import UUID

import asyncpg
from sqlalchemy import Text, bindparam, func, select

from app.errors import StoreUnavailable
from app.store.database.pool import Database
from app.store.database.statement import Statement

NEWS_CHANNEL = "sandledger_news"
WORK_CHANNEL = "sandledger_work"
_COLLECT_SECONDS = 0.02
_MAX_IDS = 200  # 200 * 33 bytes stay below NOTIFY's 8000
_RECONNECT_SECONDS = 1.0
_FINAL_SEND_SECONDS = 1.0
_news = func.pg_notify(NEWS_CHANNEL, bindparam("news", type_=Text))
_NEWS = Statement(select(_news))
_NEWS_AND_WORK = Statement(select(_news, func.pg_notify(WORK_CHANNEL, bindparam("work", type_=Text))))
_FAILURES = (StoreUnavailable, asyncpg.PostgresError)
"""A standby after a failover, or a full queue, refuses to notify: PostgreSQL reports it as an error. The tasks go
on."""
_LOG = logging.getLogger(__name__)


class Versioned(Protocol):
    """A state of a stream."""

    @property
    def version(self) -> int:
        """That of its last event."""
        ...


V = TypeVar("V", bound=Versioned)


class Subscription:
    """Something to wait on. Set when there may be news."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._latest: Versioned | None = None
        self._has_other = False
        """News came without its state. A state that comes beside it does not tell what that news is."""

    def wake(self, state: Versioned | None = None) -> None:
        """Record that there may be news; `state` is what the stream came to."""
        if state is None:
            self._has_other = True
        elif self._latest is None or self._latest.version < state.version:
            self._latest = state
        self._event.set()

    def after(self, known: V) -> V | None:
        """The state that this process wrote after the known one. None = there may be other news; `take` it and read."""
        latest = self._latest
        if self._has_other or latest is None or latest.version <= known.version:
            return None
        return latest if isinstance(latest, type(known)) else None

    @property
    def woken(self) -> bool:
        """Whether there may be news that nobody has taken."""
        return self._event.is_set()

    def take(self) -> None:
        """The next read sees the news."""
        self._event.clear()
        self._has_other = False

    async def wait(self, timeout: float) -> bool:  # noqa: ASYNC109 - a bounded wait is the point
        """Until woken, or the timeout in seconds. Says whether it was woken; resets."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


class Signal:
    """One per process. `run` must be running to send to other processes and to receive from them."""

    def __init__(self, database: Database, *, check: float = 30) -> None:
        self._database = database
        self._check = check
        self._word = secrets.token_hex(4)
        self._everything: set[Subscription] = set()
        self._claimers: set[Subscription] = set()
        self._by_id: dict[UUID, set[Subscription]] = {}
        self._outbox: set[UUID] = set()
        self._has_work = False
        self._outgoing = asyncio.Event()

    def poke(self, stream_id: UUID, *, work: bool = True, state: Versioned | None = None) -> None:
        """Something was committed for this stream; `work`: there is something for a reconciler to do.

        `state`: what the stream came to by it.
        """
        self._wake(stream_id, state)
        if work:
            _wake(self._claimers)
        self._outbox.add(stream_id)
        self._has_work |= work
        self._outgoing.set()

    @contextmanager
    def subscribe(self, stream_id: UUID | None = None) -> Generator[Subscription]:
        """Subscribe to one stream, or to all."""
        subscription = Subscription()
        here = self._everything if stream_id is None else self._by_id.setdefault(stream_id, set())
        here.add(subscription)
        try:
            yield subscription
        finally:
            here.discard(subscription)
            if stream_id is not None and not here and self._by_id.get(stream_id) is here:
                del self._by_id[stream_id]

    @contextmanager
    def subscribe_work(self) -> Generator[Subscription]:
        """Work for a reconciler: there may be a queue row to claim."""
        subscription = Subscription()
        self._claimers.add(subscription)
        try:
            yield subscription
        finally:
            self._claimers.discard(subscription)

    async def run(self) -> None:
        """Notify and listen until cancelled; then send what was poked and not sent yet."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._notify_forever(), name="signal-notify")
                tasks.create_task(self._listen_forever(), name="signal-listen")
        finally:
            try:
                async with asyncio.timeout(_FINAL_SEND_SECONDS):
                    while self._outbox:
                        await self._notify()
            except TimeoutError:
                _LOG.warning("the last notification was not sent in time; readers fall back to polling")

    async def _notify_forever(self) -> None:
        while True:
            await self._outgoing.wait()
            await self._notify()
            await asyncio.sleep(_COLLECT_SECONDS)

    async def _notify(self) -> None:
        self._outgoing.clear()
        ids, self._outbox = self._outbox, set()
        work, self._has_work = self._has_work, False
        names = "*" if len(ids) > _MAX_IDS else ",".join(stream_id.hex for stream_id in ids)
        news = f"{self._word} {names}"
        try:
            if work:
                await self._database.reserved.fetch(_NEWS_AND_WORK, news=news, work=self._word)
            else:
                await self._database.reserved.fetch(_NEWS, news=news)
        except _FAILURES as error:
            _LOG.warning("notification lost, readers fall back to polling: %s", error)
        except asyncio.CancelledError:
            # It may have been sent or not. Sending it twice does no harm; not sending it does.
            self._outbox |= ids
            self._has_work |= work
            raise

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._listen()
            except _FAILURES as error:
                _LOG.warning("not listening, polling instead: %s", error)
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen(self) -> None:
        channels = {NEWS_CHANNEL: self._on_news, WORK_CHANNEL: self._on_work}
        async with self._database.listen(channels) as listening:
            self._wake_all()  # notifications may have been missed while no connection listened
            while not listening.ended.is_set():
                try:
                    async with asyncio.timeout(self._check):
                        await listening.ended.wait()
                except TimeoutError:
                    await listening.ping()

    def _on_news(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        word, _, names = payload.partition(" ")
        if word == self._word:
            return
        try:
            ids = [UUID(text) for text in names.split(",")]
        except ValueError:  # `*`, or a text of another sender: wake every subscriber
            self._wake_news()
            return
        for stream_id in ids:
            self._wake(stream_id)

    def _on_work(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        if payload != self._word:
            _wake(self._claimers)

    def _wake(self, stream_id: UUID, state: Versioned | None = None) -> None:
        _wake(self._everything)
        for subscription in self._by_id.get(stream_id, ()):
            subscription.wake(state)

    def _wake_news(self) -> None:
        _wake(self._everything)
        for waiting in self._by_id.values():
            _wake(waiting)

    def _wake_all(self) -> None:
        self._wake_news()
        _wake(self._claimers)


def _wake(subscriptions: Iterable[Subscription]) -> None:
    for subscription in subscriptions:
        subscription.wake()
