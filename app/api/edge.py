"""The two layers around Litestar's router that hold for every answer, whatever the path.

Litestar runs middleware and guards after routing, so neither sees a request for a path or a method that does not
exist. Both layers are therefore plain ASGI, and nothing else in this package is.

`Edge` is the outermost. It makes the `Call` with the request id, answers HEAD as GET without its body (Litestar wants
a handler of its own for each), adds the request id, and records refused commands before the refusal is sent. Refusals
of callers without a key are not recorded: a flood of wrong keys must not fill a table. When the record cannot be
written because the database is away, the refusal is still answered.

An answer to a request whose body has not arrived whole says `Connection: close`. The rest of the body is then thrown
away for two seconds at most, and the connection is closed. Otherwise a caller without a key could announce a huge body,
send none of it, and hold the connection for ever. When the process is asked to stop, neither is waited for.

`Gate` lies inside Litestar's CORS layer, because a preflight has no key and a 401 must be readable by the page. It
lets a request through with its principal, see `app.api.auth`. Browsers of other origins may call, without
credentials, when keys exist. Without keys no cross-origin header is ever sent.

Our own listener has WebSockets to sandboxes only, which do not come here (`app.server.protocol`). What both layers do
with them guards the application on other ASGI servers, where a WebSocket would otherwise come to the router without a
key.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final, cast

import msgspec
from litestar.types import ASGIApp, HTTPScope, Message, Receive, Scope, Send, WebSocketScope

from app.api.auth import ANONYMOUS, API_KEY, Authenticate, check_keyless, principal_of
from app.api.call import KEY, Call, call_of, uuid_in
from app.api.context import ApiContext
from app.api.errors import INVALID_HEADER, STOPPING, Problem, problem_of
from app.errors import StoreUnavailable

_LOG = logging.getLogger(__name__)
_RECORD_WITHIN_SECONDS = 5.0
_UNRECORDED_FROM = 500
_UNSERVED = 501
_CLOSE: Final = (b"connection", b"close")
_BROKEN_OFF: Final = Problem(
    503,
    STOPPING,
    "The server stopped while it waited for the database. Whether a change was made is not known: look, or send it "
    "again with the same Idempotency-Key.",
)


class Edge:
    """The outermost layer: request id, HEAD, records of refusals, and the connection's end."""

    def __init__(self, inner: ASGIApp, context: ApiContext, methods: Mapping[str, str]) -> None:
        """Around the CORS layer, the gate and the router. `methods` gives each route's `Allow`."""
        self._inner = inner
        self._methods = methods
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "websocket":
            await self._inner(
                cast("WebSocketScope", cast("object", _routed(Call(scope, receive, self._context)))), receive, send
            )
            return
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        call = Call(scope, receive, self._context)
        routed = _routed(call)
        answer = _Answering(self._context, call, routed, self._methods, send)
        try:
            await self._inner(cast("HTTPScope", cast("object", routed)), call.receive, answer)
        except asyncio.CancelledError:
            if answer.started or not self._context.stopping.is_set():
                raise
            # The time to stop is over. The caller has no other way to learn that its change may have been made. The
            # task ends with this answer.
            await _refuse(_BROKEN_OFF, answer)
        except Exception as error:
            if answer.started:
                raise
            await _refuse(problem_of(error, call.request_id), answer)


def _routed(call: Call) -> dict[str, Any]:
    """The scope for the router. The call rides along, HEAD becomes GET, repeated headers become one."""
    scope = cast("dict[str, Any]", cast("object", call.scope))
    routed = {**scope, KEY: call}
    if scope.get("method") == "HEAD":
        routed["method"] = "GET"
    if call.joined:
        routed["headers"] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in call.headers.items()]
    return routed


class Gate:
    """Lets a request in, or refuses it."""

    def __init__(
        self, inner: ASGIApp, authenticate: Authenticate | None, open_paths: frozenset[str], *, loopback_only: bool
    ) -> None:
        """Around the router. `authenticate` is None when there are no keys; `open_paths` need none, exactly as
        they stand.
        """
        self._inner = inner
        self._authenticate = authenticate
        self._loopback_only = loopback_only
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" or scope["type"] == "websocket":
            try:
                self._admit(call_of(scope))
            except Problem as problem:
                await _refuse(problem, send, websocket=scope["type"] == "websocket")
                return
        await self._inner(scope, receive, send)

    def _admit(self, call: Call) -> None:
        if call.repeated is not None:
            raise Problem(400, INVALID_HEADER, f"The header {call.repeated} must not be repeated.")
        if self._authenticate is None:
            method = call.scope["method"] if call.scope["type"] == "http" else "CONNECT"
            check_keyless(call.headers, method, loopback_only=self._loopback_only)
            call.principal = ANONYMOUS
        elif call.scope["type"] == "http" and call.scope["path"] in self._open_paths:
            # A right key shows more there; a wrong one is as good as none.
            call.principal = self._authenticate(call.headers.get(API_KEY, ""))
        else:
            call.principal = principal_of(call.headers, self._authenticate)


class _Answering:
    """The `send` of one request."""

    def __init__(
        self, context: ApiContext, call: Call, routed: dict[str, Any], methods: Mapping[str, str], send: Send
    ) -> None:
        self.started = False
        self._context = context
        self._call = call
        self._routed = routed
        self._methods = methods
        self._send = send
        self._head = call.scope["type"] == "http" and call.scope["method"] == "HEAD"
        self._closing = False

    async def __call__(self, message: Message) -> None:
        """Add what every answer has."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == "http.response.body":
            if self._head:
                message["body"] = b""
            if self._closing and not message.get("more_body", False):
                await self._send({"type": "http.response.body", "body": message["body"], "more_body": True})
                await self._call.linger()
                message["body"] = b""
            await self._send(message)
        else:
            await self._send(message)

    async def _start(self, message: Any) -> None:
        call = self._call
        if call.problem is not None:
            await self._record(call.problem)
        self.started = True
        headers = [*message["headers"], (b"x-request-id", call.request_id.encode())]
        if self._routed["method"] == "OPTIONS":
            allow = self._methods.get(self._routed.get("path_template", ""), "").encode()
            headers = [(name, allow if name == b"allow" else value) for name, value in headers]
        if not call.ended and not await call.arrived():
            self._closing = True
            headers.append(_CLOSE)
        message["headers"] = headers
        await self._send(message)

    async def _record(self, problem: Problem) -> None:
        call, command = self._call, _command(self._routed)
        if command is None or call.principal is None:
            return
        if problem.status >= _UNRECORDED_FROM and problem.status != _UNSERVED:
            return
        named = self._routed.get("path_params", {})
        snapshot_id = uuid_in(named.get("snapshotId", ""))
        stream_id = snapshot_id or call.sandbox_id or uuid_in(named.get("sandboxId", ""))
        try:
            async with asyncio.timeout(_RECORD_WITHIN_SECONDS):
                await self._context.refusals.record(
                    call.principal.tenant,
                    stream_id,
                    command,
                    (problem.status, problem.code, problem.message),
                    msgspec.to_builtins(call.meta()),
                    kind="sandbox" if snapshot_id is None else "snapshot",
                )
        except (StoreUnavailable, TimeoutError) as error:
            _LOG.warning("request %s: refusal %s is not recorded: %s", call.request_id, problem.code, error)


async def _refuse(problem: Problem, send: Send, *, websocket: bool = False) -> None:
    """A whole error answer, from outside the router."""
    if websocket:  # a handshake that is closed before it is accepted is answered with 403
        await send({"type": "websocket.close", "code": 1008, "reason": problem.code})
        return
    body = problem.body
    headers = [(name.encode(), value.encode("latin-1")) for name, value in problem.headers]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _command(routed: dict[str, Any]) -> str | None:
    """Method and route of what changes sandboxes and snapshots; None for all else, and for what no route takes."""
    path = routed.get("path_template", "").removeprefix("/v1")
    if routed["method"] == "GET" or not path.startswith(("/sandboxes", "/snapshots")):
        return None
    return f"{routed['method']} {path.replace('{sandboxId}', '{id}').replace('{snapshotId}', '{id}')}"
