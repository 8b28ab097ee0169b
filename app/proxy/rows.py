"""Head rows of the sandboxes that get traffic, so that a request does not cost a query.

A row is kept for a second at most, and only while the signal has no news of the sandbox. The subscription is older than
the read: news that come while the row is read make it old at once. A signal that was lost costs the second.
What is read too late, an address that has another owner by now, is found by the agent's token.

A row is read whosever it is, because a signed link does not say whose sandbox it leads to. `read` and `known` compare
the tenant, so nobody is answered from a row that he may not read. What is not there is not kept. Requests that meet the
same read wait for it together.

With a row comes the database's time, by which links end. It counts from the moment before the read, so a link may end
too early by the time that the read took, and never too late.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from app.domain.sandbox.state import Sandbox
from app.domain.tenants import ANY_TENANT, AnyTenant
from app.errors import StoreUnavailable, UnknownEvent
from app.store.log.signal import Signal, Subscription
from app.views.current import CurrentView

KEPT_SECONDS: Final = 1.0
MAX_ROWS: Final = 4096
READ_WITHIN_SECONDS: Final = 5.0
LOST_SECONDS: Final = 30.0
"""For how long `known` relies on a signal that may have been lost."""


class _Row:
    """One sandbox."""

    __slots__ = ("news", "reading", "sandbox", "stack", "until")

    def __init__(self, stack: ExitStack, news: Subscription) -> None:
        self.stack = stack
        self.news = news
        self.sandbox: Sandbox | None = None
        self.until = 0.0
        self.reading: asyncio.Task[None] | None = None


class Rows:
    """Of one process."""

    def __init__(self, view: CurrentView, signal: Signal) -> None:
        self._view = view
        self._signal = signal
        self._rows: dict[UUID, _Row] = {}
        self._clock: tuple[datetime, float] | None = None
        """The database's time, and the loop's before it was asked. Of the last row that was read."""

    async def read(self, sandbox_id: UUID, tenant: str | AnyTenant) -> Sandbox | None:
        """The sandbox; None = this tenant has no such one.

        Raises:
            StoreUnavailable: it cannot be read.
        """
        return _of(tenant, await self._read_any(sandbox_id))

    async def _read_any(self, key: UUID) -> Sandbox | None:
        loop = asyncio.get_running_loop()
        while True:
            row = self._rows.get(key)
            if row is None:
                row = self._add(key, loop.time())
            if (fresh := self.fresh(key)) is not None:
                return fresh
            if row.reading is not None:
                # It may have begun before the news that this request is about: look again after it.
                await asyncio.shield(row.reading)
                if row.sandbox is None:
                    return None
                continue
            row.reading = asyncio.create_task(self._read(key, row))
            # All who wait may have left by the time it fails.
            row.reading.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(row.reading)
            return row.sandbox

    def known(self, key: tuple[UUID, str | AnyTenant]) -> Sandbox | None:
        """What was read and, as far as the signal tells, still holds. None = read it."""
        row = self._rows.get(key[0])
        if row is None or row.news.woken or asyncio.get_running_loop().time() >= row.until + LOST_SECONDS:
            return None
        return _of(key[1], row.sandbox)

    def fresh(self, key: UUID) -> Sandbox | None:
        """What `read` would answer at once, whosever it is. None = it would read."""
        row = self._rows.get(key)
        if row is None or row.sandbox is None or row.news.woken:
            return None
        return row.sandbox if asyncio.get_running_loop().time() < row.until else None

    def now(self) -> datetime:
        """The database's time. Only after a row was read."""
        assert self._clock is not None, "the time comes with a row"
        return self._clock[0] + timedelta(seconds=asyncio.get_running_loop().time() - self._clock[1])

    async def _read(self, key: UUID, row: _Row) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        row.news.take()
        try:
            async with asyncio.timeout(READ_WITHIN_SECONDS):
                loaded = await self._view.load(key, ANY_TENANT)
        except UnknownEvent:
            row.news.wake()
            raise
        except (TimeoutError, StoreUnavailable) as error:
            row.news.wake()  # the news that was taken is not read yet
            raise StoreUnavailable(str(error) or f"no answer within {READ_WITHIN_SECONDS:g} s") from None
        else:
            row.sandbox, self._clock = (None, self._clock) if loaded is None else (loaded[0], (loaded[1], began))
            row.until = loop.time() + KEPT_SECONDS
        finally:
            row.reading = None
            if row.sandbox is None:
                self._forget(key)

    def _add(self, key: UUID, now: float) -> _Row:
        if len(self._rows) >= MAX_ROWS:
            for old in [old for old, row in self._rows.items() if row.until <= now and row.reading is None]:
                self._forget(old)
        while len(self._rows) >= MAX_ROWS:
            self._forget(next(iter(self._rows)))
        stack = ExitStack()
        row = self._rows[key] = _Row(stack, stack.enter_context(self._signal.subscribe(key)))
        return row

    def _forget(self, key: UUID) -> None:
        row = self._rows.pop(key, None)
        if row is not None:
            row.stack.close()

    def close(self) -> None:
        """End all subscriptions."""
        for key in list(self._rows):
            self._forget(key)


def _of(tenant: str | AnyTenant, sandbox: Sandbox | None) -> Sandbox | None:
    return sandbox if sandbox is None or tenant is ANY_TENANT or sandbox.tenant == tenant else None
