"""Bulk traffic gives way to the lifecycle API, because both share one event loop.

A loop that does nothing but move large pieces answers a request late, and late again in each of the several rounds
that a request needs. So while the API is in use, that is for `IN_USE_SECONDS` after each request, large pieces wait
until the loop's thread has been idle for as long as it has worked. Small pieces, as terminals and messages have them,
never wait.
Without requests of the API, and so in a process that only carries traffic, nothing waits.

The measure is the thread's CPU time, so it needs no setting and holds on any machine. Measured with four downloads,
p50 of a GET in ratio to itself when idle, median of four or five runs in turns on two cores that others used too:

=========================================== ======= =====================
way                                         ratio   MB/s during requests
=========================================== ======= =====================
none                                        9-28    180-430
wait only while a request is under way      6-17    190-340
at most 400 MB/s                            1.5-20  200-330
at most 200 MB/s                            1.0-2.0 180
idle as long as it has worked (this)        1.5     130-140
=========================================== ======= =====================

Waiting for requests under way is too late: the loop must be idle when one comes. A bound in bytes holds only on the
machine that it was chosen for: when others had the cores, 400 MB/s was all that could be moved, and so no bound.

While requests alone keep the loop busy, a piece still goes every `2 * CHARGE_SECONDS`, so bulk traffic is slow and
never stops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final
from uuid import UUID

from app.proxy.activity import Activity

IN_USE_SECONDS: Final = 1.0
"""How long after a request of the API it counts as in use."""
CHARGE_SECONDS: Final = 0.01
"""What one piece can be charged with at most: also the work of requests goes by between two pieces."""
BULK_BYTES: Final = 16 * 1024
"""What is smaller never waits."""
_SHORT_SECONDS: Final = 0.001
"""A wait that is not worth its timer; it is kept for the next piece."""


class Pace:
    """Of one process."""

    def __init__(self, worked: Callable[[], float] = time.thread_time) -> None:
        """`worked` is how long the thread has worked, in seconds."""
        self._worked = worked
        self._before = 0.0
        """What that was at the last piece."""
        self._in_use_until = 0.0
        self._free_at = 0.0
        """When the next piece may go."""

    def asked(self) -> None:
        """A request of the API has come."""
        now = asyncio.get_running_loop().time()
        if now >= self._in_use_until:
            self._before = self._worked()
        self._in_use_until = now + IN_USE_SECONDS

    def must_wait(self, size: int) -> bool:
        """Whether a piece of so many bytes has to wait: with `turn`, or `afterwards`. Asked once for each piece."""
        if size < BULK_BYTES:
            return False
        now = asyncio.get_running_loop().time()
        if now >= self._in_use_until:
            return False
        worked = self._worked()
        spent, self._before = worked - self._before, worked
        self._free_at = max(self._free_at, now) + 2 * min(spent, CHARGE_SECONDS)
        return self._free_at - now > _SHORT_SECONDS

    def afterwards(self, act: Callable[[], None]) -> None:
        """Do this when the piece may go."""
        asyncio.get_running_loop().call_at(self._free_at, act)

    async def turn(self) -> None:
        """Wait until the piece may go."""
        await asyncio.sleep(self._free_at - asyncio.get_running_loop().time())


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
