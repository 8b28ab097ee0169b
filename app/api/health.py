"""Whether the process lives, and whether it can do its work.

`/health` checks nothing, so that an outage of the database does not make an orchestrator kill servers that will work
again when it is over. `/ready` checks everything that this process needs, each check bounded in time. A process
without a worker needs no engine.

`/ready` needs no key, so it must be cheap to ask: the checks run once for all who ask at the same time, and the result
holds for two seconds. A process that is asked to stop says so at once. Callers without a key learn which checks fail;
only callers with a key learn why, because the reasons name addresses. The schema is checked until it is found right
once; it does not go back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from litestar import get
from litestar.openapi.datastructures import ResponseSpec
from msgspec import Struct
from sqlalchemy import literal, select

from app import __version__
from app.api.answers import Answer
from app.api.auth import ANONYMOUS
from app.api.context import ApiContext
from app.api.controller import OPEN, ApiController
from app.api.openapi import OpenOperation, may_refuse
from app.api.request import ApiRequest
from app.domain.text import printable
from app.errors import SandledgerError
from app.store.database.migrate import migrate
from app.store.database.statement import Statement

_WITHIN_SECONDS = 3.0
_PING = Statement(select(literal(1)))
_OK = "ok"
_FAILED = "failed"


class Health(Struct, frozen=True):
    """The answer of `/health`: the process serves requests, nothing more."""

    status: str = "healthy"


class Readiness(Struct, frozen=True):
    """Whether requests can be served, part by part: `ok`, or what is wrong; without a key `failed`."""

    status: str
    checks: dict[str, str]


class VersionBody(Struct, frozen=True):
    """The answer of `/version`: the version of this server."""

    version: str


class Server(ApiController):
    """The server's own paths. They need no key."""

    tags = ("server",)
    opt = OPEN

    def __init__(self, owner: Any) -> None:
        """One checker an application."""
        super().__init__(owner)
        self._checks = Checks(self.context)

    @get(
        "/health",
        operation_id="health",
        operation_class=OpenOperation,
        summary="Whether the process answers",
        response_description="The process is running.",
        responses=may_refuse(keyed=False),
    )
    async def health(self) -> Answer[Health]:
        """Checks nothing else."""
        return Answer(Health())

    @get(
        "/ready",
        operation_id="ready",
        operation_class=OpenOperation,
        summary="Whether requests can be served",
        response_description="Requests can be served.",
        responses={
            **may_refuse(keyed=False),
            503: ResponseSpec(Readiness, generate_examples=False, description="Requests cannot be served."),
        },
    )
    async def ready(self, request: ApiRequest) -> Answer[Readiness]:
        """Database, migrations, and where this process has a worker, engine and worker. Only callers with a key learn
        what is wrong; others learn which checks fail. Not in the public contract.
        """
        checks = await self._checks.result()
        if self.context.asked_to_stop.is_set():
            checks = {**checks, "process": "this server was asked to stop"}
        fine = set(checks.values()) == {_OK}
        principal = request.call.principal
        if principal is None or principal is ANONYMOUS:
            checks = {name: found if found == _OK else _FAILED for name, found in checks.items()}
        return Answer(Readiness("ready" if fine else "unready", dict(checks)), status=200 if fine else 503)

    @get(
        "/version",
        operation_id="version",
        operation_class=OpenOperation,
        summary="Version of this server",
        response_description="The version.",
        responses=may_refuse(keyed=False),
    )
    async def version(self) -> Answer[VersionBody]:
        """The version of the installed package."""
        return Answer(VersionBody(__version__))


class Checks:
    """Runs the checks, for all who ask at the same time once."""

    def __init__(self, context: ApiContext) -> None:
        """Nothing is checked yet."""
        self._context = context
        self._schema_is_right = False
        self._flight: asyncio.Task[Mapping[str, str]] | None = None
        self._until = 0.0

    async def result(self) -> Mapping[str, str]:
        """Name -> `ok` or what is wrong."""
        now = asyncio.get_running_loop().time()
        if self._flight is None or (self._flight.done() and now >= self._until):
            self._flight = asyncio.create_task(self._run())
        # Shielded: a caller who leaves must not cancel the checks of the others.
        return await asyncio.shield(self._flight)

    async def _run(self) -> Mapping[str, str]:
        checks: dict[str, Callable[[], Awaitable[str]]] = {"database": self._database, "migrations": self._migrations}
        if self._context.worker_alive is not None:
            checks |= {"engine": self._engine, "worker": self._worker}
        found = await asyncio.gather(*[_bounded(check) for check in checks.values()])
        self._until = asyncio.get_running_loop().time() + self._context.ready_cache_seconds
        return dict(zip(checks, found, strict=True))

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
        mismatch = self._context.engine_mismatch
        return (mismatch() if mismatch is not None else "") or _OK

    async def _worker(self) -> str:
        alive = self._context.worker_alive
        return _OK if alive is None or alive() else "the worker has stopped; restart this process"


async def _bounded(check: Callable[[], Awaitable[str]]) -> str:
    try:
        async with asyncio.timeout(_WITHIN_SECONDS):
            return await check()
    except TimeoutError:
        return f"no answer within {_WITHIN_SECONDS:.0f} s"
    except SandledgerError as error:
        return printable(str(error))
