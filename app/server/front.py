"""What stands before Litestar: requests to sandboxes go to the relay. The protocol has found them by their target.

A router decodes the path, joins `//`, answers HEAD and OPTIONS itself, and refuses methods that no handler names. None
of that may happen to what is meant for a program in a sandbox. So these paths are dispatched before the router, and
Litestar does not know them. That is why they are no handlers, and why the OpenAPI document has them in its text.

Who may send them is decided by the same functions as for the API (`app.api.auth`). Without keys every request is taken
for one that acts, also a GET: nobody knows what it does in the sandbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias
from uuid import UUID

from msgspec.structs import replace

from app.api.auth import ANONYMOUS, API_KEY, Authenticate, built_in, check_keyless, principal_of
from app.api.errors import Problem
from app.proxy.http import Admit, Options, Relay
from app.proxy.inbound import Receive, Scope, Send, exchange_of
from app.proxy.limits import Limits, with_descriptors
from app.proxy.refusals import Refusal, invalid_header
from app.proxy.resolve import Access, Resolver
from app.proxy.route import Route
from app.server.assembly import Opened
from app.server.network import nowhere, way_of
from app.settings import Settings, is_loopback

App: TypeAlias = Any
"""An ASGI application."""
_LOOKED_AT = {name.encode(): name for name in ("host", "origin", "sec-fetch-site", API_KEY)}
"""Of these depends who may call."""
_ACTS = "CONNECT"
"""A method that is no read."""


class Front:
    """The outermost ASGI application of a server."""

    def __init__(self, app: App, relay: Relay) -> None:
        self._app = app
        self._relay = relay

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        exchange = exchange_of(scope) if scope["type"] == "http" else None
        if exchange is None:
            await self._app(scope, receive, send)
        else:
            await self._relay(exchange, scope, receive, send)


def admission(authenticate: Authenticate | None, *, loopback_only: bool, is_open: bool = False) -> Admit:
    """Who may send a request to a sandbox. `is_open`: everybody, as on the public server."""

    def admit(headers: Sequence[tuple[bytes, bytes]], route: Route) -> str:
        if authenticate is not None and is_open:
            return ANONYMOUS.tenant
        found = _by_name(headers)
        try:
            if authenticate is None:
                # A host that names a sandbox is under the operator's own domain, so no page can have it rebound.
                check_keyless(found, _ACTS, loopback_only=loopback_only and bool(route.prefix))
                return ANONYMOUS.tenant
            return principal_of(found, authenticate).tenant
        except Problem as problem:
            raise Refusal(problem.status, problem.code, problem.message, problem.headers) from None

    return admit


def _by_name(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        key = _LOOKED_AT.get(name)
        if key is None:
            continue
        if key in found:
            raise invalid_header(f"The header {key} must not be repeated.")
        found[key] = value.decode("latin-1")
    return found


def relay_of(parts: Opened, stopping: asyncio.Event) -> Relay:
    """The relay of a server. Made inside the event loop; close it after the listener."""
    settings = parts.settings
    authenticate, is_open = built_in(settings.server.api_key, parts.sealer), settings.proxy.auth == "open"
    return Relay(
        admission(authenticate, loopback_only=is_loopback(settings.server.host), is_open=is_open),
        Resolver(
            parts.service.view,
            parts.signal,
            access_of(settings, parts.installation, parts.keys.token),
            stopping,
        ),
        Options(
            via=f"sandledger-{str(parts.installation)[:8]}",
            adds_token=not is_open,
            cors=authenticate is not None and not is_open,
            external_path=external_path(settings.proxy.public_address or settings.server.eip),
            limits=with_descriptors(Limits()),
            same_origin_pages=settings.proxy.same_origin_pages,
        ),
    )


def access_of(settings: Settings, installation: UUID, token_key: bytes) -> Access:
    """How this server gets into sandboxes."""
    way = way_of(settings, installation)
    if settings.proxy.auth == "open":
        # The agent asks callers without a key for its token. Nobody would, at the program itself.
        way = replace(way, stands_on=nowhere)
    return Access(token_key, way, has_agents=bool(settings.runtime.execd_image))


def external_path(address: str) -> str | None:
    """The path before `/sandboxes` for clients that reach this server by that address; None = as they write it."""
    if not address:
        return None
    _, slash, path = address.rpartition("://")[2].partition("/")
    return (slash + path).rstrip("/")
