"""Whether the process lives, and whether it can do its work.

`/health` looks at nothing, so that a database outage does not make an orchestrator kill servers that will be fine
when it is over. `/ready` looks at everything this process needs, each look bounded in time, and names what is wrong.
The schema is looked at until it is found in order once; it does not go back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from litestar.response.base import ASGIResponse
from sqlalchemy import literal, select

from app import __version__
from app.api.call import Call
from app.api.context import ApiContext
from app.api.sandboxes import answer
from app.api.schema import Health, Readiness, VersionBody
from app.errors import SandledgerError
from app.store.database.migrate import migrate
from app.store.database.statement import Statement

_WITHIN_S = 3.0
_PING = Statement(select(literal(1)))
_OK = "ok"


class ServerState:
    """On a context; each public method is an endpoint."""

    def __init__(self, context: ApiContext) -> None:
        """Nothing looked at yet."""
        self._context = context
        self._schema_is_right = False

    async def health(self, _call: Call) -> ASGIResponse:
        """It answers."""
        return answer(Health())

    async def version(self, _call: Call) -> ASGIResponse:
        """Of the package."""
        return answer(VersionBody(__version__))

    async def ready(self, _call: Call) -> ASGIResponse:
        """200 when every check is ok, else 503."""
        looks: dict[str, Callable[[], Awaitable[str]]] = {"database": self._database, "migrations": self._migrations}
        if self._context.worker_alive is not None:
            looks |= {"engine": self._engine, "worker": self._worker}
        found = await asyncio.gather(*[_bounded(look) for look in looks.values()])
        checks = dict(zip(looks, found, strict=True))
        fine = set(found) == {_OK}
        return answer(Readiness("ready" if fine else "unready", checks), status=200 if fine else 503)

    async def _database(self) -> str:
        await self._context.database.fetch(_PING)
        return _OK

    async def _migrations(self) -> str:
        if not self._schema_is_right:
            seen = await migrate(self._context.database.dsn, apply=False)
            if seen.known and seen.after != seen.head:
                return f"the schema is at {seen.after or 'nothing'}, not {seen.head}; run sandledger migrate"
            self._schema_is_right = True
        return _OK

    async def _engine(self) -> str:
        await self._context.driver.check()
        return _OK

    async def _worker(self) -> str:
        alive = self._context.worker_alive
        return _OK if alive is None or alive() else "the worker has stopped; restart this process"


async def _bounded(look: Callable[[], Awaitable[str]]) -> str:
    try:
        async with asyncio.timeout(_WITHIN_S):
            return await look()
    except TimeoutError:
        return f"no answer within {_WITHIN_S:.0f} s"
    except SandledgerError as error:
        return str(error)
