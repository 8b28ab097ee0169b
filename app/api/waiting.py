"""Waiting inside a request until a sandbox reaches a state, without polling and without holding anything.

Between reads the request holds no connection and no lock, only a subscription. What this process itself appends comes
with the signal. It reads again when the signal says that there may be other news, and after a second anyway, because a
signal can be lost. Where many requests wait, that second
becomes longer: all of them together then read at most 200 times a second without a signal. It ends with the state that
it has when that is the wanted one, the time is over, the client is gone, the server is asked to stop, or the database
is away: what the client asked for is committed already, and waiting is only a courtesy. It does not begin when too many
wait already. A read that gets no answer is given up, so that a database which hangs does not keep the client longer
than it asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from app.api.call import Call
from app.api.context import ApiContext
from app.domain.sandbox.state import Sandbox
from app.errors import StoreUnavailable
from app.store.log.signal import Subscription

_READ_AGAIN_SECONDS = 1.0
_READ_WITHIN_SECONDS = 2.0
_MAX_READS_A_SECOND = 200


async def until(
    context: ApiContext,
    call: Call,
    sandbox: Sandbox,
    done: Callable[[Sandbox], bool],
    seconds: float,
    *,
    appended: bool = False,
) -> Sandbox:
    """The state that `done` accepts, or the last one seen.

    `appended`: the given state is what this request has just appended, so it is not read again before there is news.
    What another process appends in the moment before the subscription begins is seen a second later.
    """
    if done(sandbox) or seconds <= 0:
        return sandbox
    with context.waiters.one_more() as may_wait:
        if not may_wait:
            return sandbox
        with context.signal.subscribe(sandbox.id) as news:
            if not appended:
                sandbox = await _read_again(context, call, sandbox)
            return await _wait(context, call, sandbox, done, seconds=seconds, news=news)


async def _wait(
    context: ApiContext,
    call: Call,
    sandbox: Sandbox,
    done: Callable[[Sandbox], bool],
    *,
    seconds: float,
    news: Subscription,
) -> Sandbox:
    deadline = asyncio.get_running_loop().time() + seconds
    ends: list[asyncio.Task[Any]] = [
        asyncio.create_task(call.disconnected()),
        asyncio.create_task(context.stopping.wait()),
    ]
    try:
        while True:
            left = deadline - asyncio.get_running_loop().time()
            if done(sandbox) or left <= 0 or any(end.done() for end in ends):
                return sandbox
            again = max(_READ_AGAIN_SECONDS, context.waiters.count / _MAX_READS_A_SECOND)
            turn = asyncio.create_task(news.wait(min(again, left)))
            try:
                await asyncio.wait([turn, *ends], return_when=asyncio.FIRST_COMPLETED)
            finally:
                turn.cancel()
            sandbox = news.after(sandbox) or await _read_again(context, call, sandbox)
    finally:
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


async def _read_again(context: ApiContext, call: Call, known: Sandbox) -> Sandbox:
    try:
        async with asyncio.timeout(_READ_WITHIN_SECONDS):
            loaded = await context.service.view.load(known.id, call.who.tenant)
    except (StoreUnavailable, TimeoutError):
        return known
    return known if loaded is None else loaded[0]
