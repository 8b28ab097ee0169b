"""Waiting inside a request until a sandbox reaches a state, without polling and without holding anything.

Between reads the request holds no connection and no lock, only a subscription. What this process itself appends comes
with the signal. It reads again when the signal says that there may be other news, and after a second anyway, because a
signal can be lost. Where many requests wait, that second becomes longer: all of them together then read at most 200
times a second without a signal. It ends with the state that it has when that is the wanted one, the time is over, the
client is gone, the server is asked to stop, or the database is away: what the client asked for is committed already,
and waiting is only a courtesy. It does not begin when too many wait already. A read that gets no answer is given up, so
that a database which hangs does not keep the client longer than it asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar
from uuid import UUID

from msgspec import Struct

from app.api.call import Call
from app.api.context import ApiContext
from app.domain.sandbox.state import Sandbox
from app.errors import StoreUnavailable
from app.store.log.signal import Subscription, Versioned

S = TypeVar("S", bound=Versioned)
READ_AGAIN_SECONDS = 1.0
"""A signal can be lost, so a request that waits reads after this at the latest."""
_READ_WITHIN_SECONDS = 2.0
_MAX_READS_A_SECOND = 200


class Watched(Struct, Generic[S], frozen=True):
    """The stream that is waited for, as it was read last, how it is read again, and what ends the wait."""

    stream_id: UUID
    state: S
    load: Callable[[], Awaitable[S | None]]
    done: Callable[[S], bool]
    appended: bool = False
    """The state is what this request has just appended, so it is not read again before there is news.

    What another process appends in the moment before the subscription begins is seen by the next read without a signal.
    """


async def until(
    context: ApiContext,
    call: Call,
    sandbox: Sandbox,
    done: Callable[[Sandbox], bool],
    seconds: float,
    *,
    appended: bool = False,
) -> Sandbox:
    """The state of a sandbox that `done` accepts, or the last one seen. `appended` as in `Watched`."""

    async def load() -> Sandbox | None:
        loaded = await context.service.view.load(sandbox.id, call.who.tenant)
        return None if loaded is None else loaded[0]

    return await watch(context, call, Watched(sandbox.id, sandbox, load, done, appended), seconds)


async def watch(context: ApiContext, call: Call, watched: Watched[S], seconds: float) -> S:
    """As `until`, of a stream of any kind."""
    if watched.done(watched.state) or seconds <= 0:
        return watched.state
    with context.waiters.one_more() as may_wait:
        if not may_wait:
            return watched.state
        with context.signal.subscribe(watched.stream_id) as news:
            return await _wait(context, call, watched, news, seconds)


class Ends:
    """What ends a wait before its time: the client has left, or the server is asked to stop."""

    def __init__(self, context: ApiContext, call: Call) -> None:
        self._tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(call.disconnected()),
            asyncio.create_task(context.stopping.wait()),
        ]

    @property
    def have_come(self) -> bool:
        """Whether there is no sense in waiting any more."""
        return any(task.done() for task in self._tasks)

    async def turn(self, news: Subscription, seconds: float) -> None:
        """Until there is news, an end has come, or the time is over."""
        turn = asyncio.create_task(news.wait(seconds))
        try:
            await asyncio.wait([turn, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.cancel()

    async def close(self) -> None:
        """Nobody waits any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _wait(context: ApiContext, call: Call, watched: Watched[S], news: Subscription, seconds: float) -> S:
    deadline = asyncio.get_running_loop().time() + seconds
    state = watched.state if watched.appended else await _read_again(watched, watched.state)
    ends = Ends(context, call)
    try:
        while True:
            left = deadline - asyncio.get_running_loop().time()
            if watched.done(state) or left <= 0 or ends.have_come:
                return state
            again = max(READ_AGAIN_SECONDS, context.waiters.count / _MAX_READS_A_SECOND)
            await ends.turn(news, min(again, left))
            state = await _newest(watched, news, state)
    finally:
        await ends.close()


async def _newest(watched: Watched[S], news: Subscription, known: S) -> S:
    latest = news.after(known)
    if latest is not None:
        return latest
    news.take()  # the read sees it
    return await _read_again(watched, known)


async def _read_again(watched: Watched[S], known: S) -> S:
    try:
        async with asyncio.timeout(_READ_WITHIN_SECONDS):
            loaded = await watched.load()
    except (StoreUnavailable, TimeoutError):
        return known
    return known if loaded is None else loaded
