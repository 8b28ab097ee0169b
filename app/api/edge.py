"""The outermost layer: what holds for every answer, whatever path, and before any routing.

In this order: the request id (taken or made), the preflight of browsers, headers that must not be repeated, the API
key, and only then the router. Whatever comes out, also from the router's own errors, leaves through `_Answer`, which
adds the request id, and records refused commands *before* the refusal is sent.

Keys are compared in constant time. Exempt are exact paths, so `/healthz` needs a key. No key configured = everybody
may do everything; the server refuses to listen beyond loopback that way.

Browsers of other origins may call, without credentials, when a key is configured: a page then needs to be told the
key. Without one no cross-origin header is ever sent, or any page that a developer visits could use the server on their
own machine; for the same reason bodies must say that they are JSON, which no simple cross-origin request can.

Refusals are recorded for authenticated callers only: a flood of wrong keys must not fill a table. When the record
cannot be written because the database is away, the refusal is still answered.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Final, cast

import msgspec
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send

from app.api.call import API_KEY, Call
from app.api.context import ApiContext
from app.api.errors import INVALID_HEADER, Problem, problem_of, unauthorised
from app.domain.sandbox.events import Actor, ActorKind
from app.errors import StoreUnavailable

_LOG = logging.getLogger(__name__)
_RECORD_WITHIN_S = 5.0
_EXPOSED = "ETag, Idempotency-Replayed, Location, Preference-Applied, Retry-After, X-Request-ID"
_ORIGIN: Final = (b"access-control-allow-origin", b"*")
_PREFLIGHT: Final = [
    (b"access-control-allow-methods", b"DELETE, GET, HEAD, PATCH, POST, PUT"),
    (b"access-control-allow-headers", b"*"),
    (b"access-control-max-age", b"600"),
]
_UNRECORDED_FROM = 500
_UNSERVED = 501


def call_of(scope: Scope) -> Call:
    """The call that a request inside the router belongs to."""
    return cast("dict[str, Call]", cast("object", scope))["sandledger.call"]


class Edge:
    """Wraps Litestar's router."""

    def __init__(self, inner: ASGIApp, context: ApiContext, open_paths: frozenset[str]) -> None:
        """`open_paths` need no key."""
        key = (context.api_key or "").strip()
        self._inner = inner
        self._context = context
        self._open_paths = open_paths
        self._key = key.encode() or None
        fingerprint = context.sealer.digest(key.encode(), "api-key")[:12] if key else "none"
        self._actor = Actor(ActorKind.API_KEY, fingerprint, "default" if key else "anonymous")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        context = self._context
        call = Call(scope, receive, self._actor, context.body_limit, context.body_idle_seconds)
        answer = _Answer(context, call, send, cross_origin=self._key is not None)
        if self._key is not None and _is_preflight(call):
            await answer.send_all(204, _PREFLIGHT)
            return
        problem = self._admit(call)
        if problem is not None:
            await answer.refuse(problem)
            return
        try:
            await self._inner(_routed(call), receive, answer)
        except Exception as error:
            if answer.started:
                raise
            await answer.refuse(problem_of(error, call.request_id))

    def _admit(self, call: Call) -> Problem | None:
        if call.repeated is not None:
            return Problem(400, INVALID_HEADER, f"The header {call.repeated} may be given once.")
        if self._key is None or call.scope["path"] in self._open_paths:
            return None
        key = call.headers.get(API_KEY)
        if not key:
            return unauthorised("MISSING_API_KEY", "The header OPEN-SANDBOX-API-KEY is missing.")
        if not hmac.compare_digest(key.encode("latin-1"), self._key):
            return unauthorised("INVALID_API_KEY", "The API key is not valid.")
        return None


def _is_preflight(call: Call) -> bool:
    return call.scope["method"] == "OPTIONS" and {"origin", "access-control-request-method"} <= call.headers.keys()


def _routed(call: Call) -> HTTPScope:
    """The scope for the router: HEAD is GET whose body is not sent, and the call rides along."""
    routed: dict[str, object] = {**call.scope, "sandledger.call": call}
    if call.scope["method"] == "HEAD":
        routed["method"] = "GET"
    return cast("HTTPScope", cast("object", routed))


class _Answer:
    """The `send` of one request."""

    def __init__(self, context: ApiContext, call: Call, send: Send, *, cross_origin: bool) -> None:
        self.started = False
        self._context = context
        self._call = call
        self._send = send
        self._headers = [(b"x-request-id", call.request_id.encode())]
        if cross_origin and "origin" in call.headers:
            self._headers += [_ORIGIN, (b"access-control-expose-headers", _EXPOSED.encode())]

    async def __call__(self, message: Message) -> None:
        """Add what every answer has; drop the body that HEAD does not get."""
        if message["type"] == "http.response.start":
            await self._record()
            self.started = True
            message["headers"] = [*message["headers"], *self._headers]
        elif message["type"] == "http.response.body" and self._call.scope["method"] == "HEAD":
            message["body"] = b""
        await self._send(message)

    async def send_all(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes = b"") -> None:
        """A whole answer."""
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": False})

    async def refuse(self, problem: Problem) -> None:
        """A whole error answer, from outside the router."""
        body = problem.body
        headers = [(name.encode(), value.encode("latin-1")) for name, value in problem.headers]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send_all(problem.status, headers, body)

    async def _record(self) -> None:
        call, problem = self._call, self._call.problem
        if problem is None or call.command is None:
            return
        if problem.status >= _UNRECORDED_FROM and problem.status != _UNSERVED:
            return
        try:
            async with asyncio.timeout(_RECORD_WITHIN_S):
                await self._context.refusals.record(
                    self._context.tenant,
                    call.sandbox_id,
                    call.command,
                    (problem.status, problem.code, problem.message),
                    msgspec.to_builtins(call.meta()),
                )
        except (StoreUnavailable, TimeoutError) as error:
            _LOG.warning("request %s: refusal %s is not recorded: %s", call.request_id, problem.code, error)
