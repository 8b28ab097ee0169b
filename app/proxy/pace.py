"""Bulk traffic gives way to requests of the lifecycle API, because both share one event loop.

A loop that moves large pieces for several streams answers nobody else between two of them, and a request of the API
needs several rounds of the loop. So while such a request is under way, a stream waits with its next large piece. Small
pieces, as terminals and messages have them, never wait.

A request counts for `GIVE_WAY_SECONDS` at most, so one that waits for news, or for its own body, holds no stream back.
And no piece waits longer than that, so an API that is never idle leaves each stream a piece in that time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final
from uuid import UUID

from app.proxy.activity import Activity

GIVE_WAY_SECONDS: Final = 0.02
BULK_BYTES: Final = 16 * 1024
"""What is smaller never waits."""


class Pace:
    """Of one process."""

    def __init__(self) -> None:
        self._requests = 0
        self._waiting: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def request(self) -> _Request:
        """A request of the API is under way inside the block."""
        return _Request(self)

    def begin(self) -> None:
        """One more is under way."""
        self._requests += 1

    def end(self) -> None:
        """One less."""
        self._requests -= 1
        if not self._requests:
            self._release()

    def must_wait(self, size: int) -> bool:
        """Whether a piece of so many bytes has to wait now."""
        return self._requests > 0 and size >= BULK_BYTES

    def afterwards(self, act: Callable[[], None]) -> None:
        """Do this when the piece may go."""
        self._waiting.append(act)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GIVE_WAY_SECONDS, self._release)

    async def turn(self) -> None:
        """Wait until the piece may go."""
        turn = asyncio.Event()
        self.afterwards(turn.set)
        await turn.wait()

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        for act in waiting:
            act()


class _Request:
    """One request of the API."""

    __slots__ = ("_pace", "_timer")

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(GIVE_WAY_SECONDS, self._end)
        self._pace.begin()

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        """Once."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._pace.end()


class Passing:
    """What each piece of a stream meets on its way: it marks its sandbox, and it may have to wait."""

    __slots__ = ("_activity", "_pace", "_sandbox_id")

    def __init__(self, activity: Activity, pace: Pace, sandbox_id: UUID) -> None:
        self._activity = activity
        self._pace = pace
        self._sandbox_id = sandbox_id

    def asked(self) -> None:
        """The request is sent to the sandbox."""
        self._activity.asked(self._sandbox_id)

    def answered(self) -> None:
        """The head of its answer has come."""
        self._activity.out(self._sandbox_id, 0)

    async def into(self, size: int) -> None:
        """A piece of the body goes to the sandbox."""
        self._activity.into(self._sandbox_id, size)
        if self._pace.must_wait(size):
            await self._pace.turn()

    async def out(self, size: int) -> None:
        """A piece of the answer goes to the client."""
        self._activity.out(self._sandbox_id, size)
        if self._pace.must_wait(size):
            await self._pace.turn()

    def spliced(self, size: int, *, into: bool, act: Callable[[], None]) -> bool:
        """A piece went over a WebSocket. True: `act` is done when the next one may come."""
        (self._activity.into if into else self._activity.out)(self._sandbox_id, size)
        if not self._pace.must_wait(size):
            return False
        self._pace.afterwards(act)
        return True
