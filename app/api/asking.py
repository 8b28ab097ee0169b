"""What only an engine knows, asked through the database: this process may have no engine.

The request waits for the answer of a worker as `app.api.waiting` waits for a state: on the signal, and it reads again
after a second anyway. When its client leaves, the server stops, or the time is over, it takes its question back.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from app.api.call import Call
from app.api.context import ApiContext
from app.api.errors import Problem
from app.api.waiting import READ_AGAIN_SECONDS, Ends
from app.domain.sandbox.state import RuntimeState, Sandbox
from app.errors import StoreUnavailable
from app.store.diagnostics.requests import MAX_OPEN, EngineRequests, Question, Reply
from app.store.log.signal import Subscription

TOO_MANY: Final = (
    503,
    "ENGINE::TOO_MANY_QUESTIONS",
    f"{MAX_OPEN} reads of logs and inspections wait for the engine already; try again when some are answered.",
)
_ON_AN_ENGINE = (RuntimeState.CREATED, RuntimeState.RUNNING, RuntimeState.PAUSED, RuntimeState.EXITED)


def has_object(sandbox: Sandbox) -> bool:
    """Whether the log says that an engine has something of it."""
    return sandbox.engine is not None and sandbox.closed_at is None and sandbox.observed in _ON_AN_ENGINE


async def ask(context: ApiContext, call: Call, engine: str, question: Question) -> Reply | None:
    """The answer of a worker. None = no worker has answered in time, or too many requests wait already.

    Raises:
        Problem: 503, the tenant has too many open questions.
    """
    engines = await context.service.engines.known()
    engine_id = next((each.id for each in engines if each.name == engine), None)
    if engine_id is None:
        return None
    requests = EngineRequests(context.database)
    with context.waiters.one_more() as may_wait, context.signal.subscribe(question.id) as news:
        if not may_wait:
            return None
        if not await requests.ask(question, engine):
            raise Problem(*TOO_MANY, headers=[("retry-after", "2")])
        context.signal.poke(engine_id, work=False)
        return await _wait(context, call, requests, question, news)


async def _wait(
    context: ApiContext, call: Call, requests: EngineRequests, question: Question, news: Subscription
) -> Reply | None:
    ends = Ends(context, call)
    reply: Reply | None = None
    try:
        deadline = asyncio.get_running_loop().time() + context.diagnostics_wait_seconds
        while (left := deadline - asyncio.get_running_loop().time()) > 0 and not ends.have_come:
            await ends.turn(news, min(READ_AGAIN_SECONDS, left))
            if (reply := await requests.take(question.id, question.tenant)) is not None:
                return reply
        return None
    finally:
        if reply is None:
            with suppress(StoreUnavailable):  # then the row goes by itself, within a minute
                await requests.forget(question.id, question.tenant)
        await ends.close()
