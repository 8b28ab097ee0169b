"""Waiting inside a request for a sandbox to get somewhere, without polling and without holding anything.

Between looks the request holds no connection and no lock, only a subscription. It looks again when the signal says
that there may be news, and once a second anyway, because a signal carries no truth. It ends with the state it has when
that is the wanted one, the time is over, the client is gone, the server is asked to stop, or the database is away:
what the client asked for is committed already, and the wait is only a courtesy. A look that gets no answer is given
up, so that a database which hangs does not keep the client longer than it asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from app.api.call import Call
from app.api.context import ApiContext
from app.domain.sandbox.state import Sandbox
from app.errors import StoreUnavailable

_LOOK_AGAIN_S = 1.0
_LOOK_WITHIN_S = 2.0


async def until(
    context: ApiContext, call: Call, box: Sandbox, done: Callable[[Sandbox], bool], seconds: float
) -> Sandbox:
    """The state that `done` accepts, or the last one seen."""
    if done(box) or seconds <= 0:
        return box
    deadline = asyncio.get_running_loop().time() + seconds
    ends: list[asyncio.Task[Any]] = [
        asyncio.create_task(call.disconnected()),
        asyncio.create_task(context.stopping.wait()),
    ]
    try:
        with context.signal.subscribe(box.id) as news:
            while True:
                box = await _look(context, box)
                left = deadline - asyncio.get_running_loop().time()
                if done(box) or left <= 0 or any(end.done() for end in ends):
                    return box
                turn = asyncio.create_task(news.wait(min(_LOOK_AGAIN_S, left)))
                try:
                    await asyncio.wait([turn, *ends], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    turn.cancel()
    finally:
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


async def _look(context: ApiContext, known: Sandbox) -> Sandbox:
    try:
        async with asyncio.timeout(_LOOK_WITHIN_S):
            loaded = await context.service.view.load(known.id, context.tenant)
    except (StoreUnavailable, TimeoutError):
        return known
    return known if loaded is None else loaded[0]
