"""Wake-ups off the write path.

A transaction that issued NOTIFY holds one cluster-wide lock from before its commit until after its flush, so notifying
commits run one at a time; inside the append it cost 85 % of the throughput. Here an append only calls `poke(id)`:
readers in this process wake at once, and one task per process sends at most one `pg_notify` every 20 ms, on its own
connection, with the ids of that window (or `*` when they are too many). One LISTEN connection per process wakes the
rest.

A listener only waits, and a connection that was cut off without a word looks just like one on which nobody speaks; so
the listener asks something every `check` seconds, and a connection that does not answer is replaced.

A signal carries no truth. Every waiter also has a timeout and then looks for itself, so a lost notification, a pooler
in between or a broken LISTEN costs latency (at most a second), never correctness.

**Two channels.** Readers wait for a stream on `CHANNEL`. Workers wait for work on `WORK_CHANNEL`, which only carries
who spoke, so that each process ignores its own words: it has woken its own worker already. At the end the last words
are sent before the connection goes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID, uuid4

import asyncpg
from sqlalchemy import Text, bindparam, func, select

from app.errors import StoreUnavailable
from app.store.database.pool import Database
from app.store.database.statement import Statement

CHANNEL = "sandledger_log"
WORK_CHANNEL = "sandledger_work"
_LAST_WORDS_S = 2.0
_WINDOW_S = 0.02
_MOST_IDS = 200  # 200 * 33 bytes stay below NOTIFY's 8000
_RECONNECT_S = 1.0
_NOTIFY = Statement(select(func.pg_notify(CHANNEL, bindparam("payload", type_=Text))))
_NOTIFY_WORK = Statement(
    select(
        func.pg_notify(CHANNEL, bindparam("payload", type_=Text)),
        func.pg_notify(WORK_CHANNEL, bindparam("speaker", type_=Text)),
    )
)
_FAILURES = (StoreUnavailable, asyncpg.PostgresError)
"""A standby after a failover, or a full queue, refuses to notify: PostgreSQL's word, and no reason to stop either."""
_LOG = logging.getLogger(__name__)


class Subscription:
    """Something to wait on. Set when there may be news."""

    def __init__(self) -> None:
        """Unset."""
        self._event = asyncio.Event()

    def wake(self) -> None:
        """There may be news."""
        self._event.set()

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
    """One per process. `run` must be running for other processes to hear and be heard."""

    def __init__(self, database: Database, *, check: float = 30) -> None:
        """Not yet listening."""
        self._database = database
        self._check = check
        self._everything: set[Subscription] = set()
        self._by_id: dict[UUID, set[Subscription]] = {}
        self._workers: set[Subscription] = set()
        self._speaker = uuid4().hex
        self._outbox: set[UUID] = set()
        self._outbox_work = False
        self._outgoing = asyncio.Event()

    def poke(self, sandbox_id: UUID, *, work: bool = True) -> None:
        """Something was committed for this stream; `work`: there is something for a reconciler to do."""
        self._wake(sandbox_id)
        self._outbox.add(sandbox_id)
        if work:
            self._wake_workers()
            self._outbox_work = True
        self._outgoing.set()

    @contextmanager
    def subscribe(self, sandbox_id: UUID | None = None) -> Generator[Subscription]:
        """News of one sandbox, or of any."""
        subscription = Subscription()
        if sandbox_id is None:
            self._everything.add(subscription)
        else:
            self._by_id.setdefault(sandbox_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            if sandbox_id is None:
                self._everything.discard(subscription)
            elif (waiting := self._by_id.get(sandbox_id)) is not None:
                waiting.discard(subscription)
                if not waiting:
                    del self._by_id[sandbox_id]

    @contextmanager
    def subscribe_work(self) -> Generator[Subscription]:
        """News of work, in this process or another."""
        subscription = Subscription()
        self._workers.add(subscription)
        try:
            yield subscription
        finally:
            self._workers.discard(subscription)

    async def run(self) -> None:
        """Notify and listen until cancelled; then send the last words."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._notify_forever(), name="signal-notify")
                tasks.create_task(self._listen_forever(), name="signal-listen")
        finally:
            if self._outbox:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LAST_WORDS_S):
                        await self._notify()

    async def _notify_forever(self) -> None:
        while True:
            await self._outgoing.wait()
            self._outgoing.clear()
            await self._notify()
            await asyncio.sleep(_WINDOW_S)

    async def _notify(self) -> None:
        ids, self._outbox = self._outbox, set()
        work, self._outbox_work = self._outbox_work, False
        payload = "*" if len(ids) > _MOST_IDS else ",".join(sandbox_id.hex for sandbox_id in ids)
        try:
            if work:
                await self._database.reserved.fetch(_NOTIFY_WORK, payload=payload, speaker=self._speaker)
            else:
                await self._database.reserved.fetch(_NOTIFY, payload=payload)
        except _FAILURES as error:
            _LOG.warning("notification lost, readers fall back to polling: %s", error)
        except asyncio.CancelledError:
            self._outbox |= ids  # the last words; said twice at worst
            self._outbox_work |= work
            raise

    async def _listen_forever(self) -> None:
        while True:
            try:
                await self._listen()
            except _FAILURES as error:
                _LOG.warning("not listening, polling instead: %s", error)
            await asyncio.sleep(_RECONNECT_S)

    async def _listen(self) -> None:
        channels = {CHANNEL: self._heard, WORK_CHANNEL: self._heard_work}
        async with self._database.listen(channels) as listening:
            self._wake_all()  # whatever was said while nobody listened
            while not listening.ended.is_set():
                try:
                    async with asyncio.timeout(self._check):
                        await listening.ended.wait()
                except TimeoutError:
                    await listening.ping()

    def _heard(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        try:
            ids = [UUID(text) for text in payload.split(",")]
        except ValueError:  # `*`, or somebody else's words: either way, let everybody look
            self._wake_all()
            return
        for sandbox_id in ids:
            self._wake(sandbox_id)

    def _heard_work(self, _connection: Any, _pid: int, _channel: str, payload: str) -> None:
        if payload != self._speaker:
            self._wake_workers()

    def _wake_workers(self) -> None:
        for subscription in self._workers:
            subscription.wake()

    def _wake(self, sandbox_id: UUID) -> None:
        for subscription in self._everything:
            subscription.wake()
        for subscription in self._by_id.get(sandbox_id, ()):
            subscription.wake()

    def _wake_all(self) -> None:
        self._wake_workers()
        for subscription in self._everything:
            subscription.wake()
        for waiting in self._by_id.values():
            for subscription in waiting:
                subscription.wake()
