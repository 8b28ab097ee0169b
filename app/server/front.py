"""What stands before Litestar: requests to sandboxes go to the relay. The protocol has found them by their target.

A router decodes the path, joins `//`, answers HEAD and OPTIONS itself, and refuses methods that no handler names. None
of that may happen to what is meant for a program in a sandbox. So these paths are dispatched before the router, and
Litestar does not know them. That is why they are no handlers, and why the OpenAPI document has them in its text.

Who may send them is decided by the same functions as for the API (`app.api.auth`). Without keys every request is taken
for one that acts, also a GET: nobody knows what it does in the sandbox.

A server in front that has the secret of the installation (`sandledger nginx`) asks here what it may carry itself, and
says for whom it passes other requests on: the client's address and scheme, which are its own otherwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeAlias
from uuid import UUID

from msgspec import Struct
from msgspec.structs import replace

from app.api.auth import ANONYMOUS, API_KEY, Authenticate, built_in, check_keyless, principal_of
from app.api.errors import Problem
from app.domain.sandbox.address import nowhere
from app.domain.sandbox.links import LinkKey
from app.proxy.activity import Activity
from app.proxy.admit import ByKey, Credentials, by_links, check_page
from app.proxy.decide import PATH, Decider, Hop, hop_of, secret_of
from app.proxy.http import Relay
from app.proxy.inbound import Receive, Scope, Send, exchange_of
from app.proxy.limits import Limits, with_descriptors
from app.proxy.links import in_cookies
from app.proxy.options import Identify, Options
from app.proxy.refusals import Refusal, invalid_header
from app.proxy.resolve import Access, Resolver
from app.proxy.route import Route
from app.server.assembly import Opened
from app.server.listener import domain_of
from app.server.network import way_of
from app.settings import Settings, is_loopback

App: TypeAlias = Any
"""An ASGI application."""
_LOOKED_AT = {name.encode(): name for name in ("host", "origin", "sec-fetch-site", "sec-fetch-mode", API_KEY)}
"""Of these depends who may call."""
_ACTS = "CONNECT"
"""A method that is no read."""


class Before(Struct, frozen=True):
    """What a server in front of this one needs."""

    decide: Decider
    secret: bytes

    def __repr__(self) -> str:
        """Keep the secret out of tracebacks."""
        return "Before(***)"


class Front:
    """The outermost ASGI application of a server."""

    def __init__(self, app: App, relay: Relay, before: Before) -> None:
        self._app = app
        self._relay = relay
        self._before = before

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        exchange = None
        if scope["type"] == "http":
            exchange = exchange_of(scope)
            hop = hop_of(scope["headers"], self._before.secret)
            if hop is not None:
                if exchange is None and scope["path"] == PATH:
                    await self._decide(hop, send)
                    return
                _believe(scope, hop)
        if exchange is None:
            self._relay.pace.asked()
            await self._app(scope, receive, send)
        else:
            await self._relay(exchange, scope, receive, send)

    async def _decide(self, hop: Hop, send: Send) -> None:
        """204 with what nginx does; 401 = it passes the request on."""
        headers = await self._before.decide(hop)
        status, headers = (401, [(b"content-length", b"0")]) if headers is None else (204, headers)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _believe(scope: Scope, hop: Hop) -> None:
    """Take the request for the client's own."""
    scope["headers"] = hop.headers
    scope["scheme"] = hop.scheme
    if hop.client is not None:
        scope["client"] = (hop.client, 0)


class Doors(Struct, frozen=True):
    """By what a request to a sandbox may come in."""

    loopback_only: bool
    """Without keys: whether the header `Host` must name the loopback."""
    is_open: bool = False
    """Everybody may, as on the public server."""
    links: LinkKey | None = None
    allowed_origins: frozenset[str] = frozenset()
    """Origins, in lower case, whose pages may send the cookie of a link."""


def admission(authenticate: Authenticate | None, doors: Doors) -> Identify:
    """What a request to a sandbox shows, and whether that is enough before its row is read.

    A key counts first. A link in the query counts on every server, so that its address works. The cookie of a link
    counts where a key is asked for, and on an open one, because the agent's token is added for it.
    """

    def identify(headers: Sequence[tuple[bytes, bytes]], route: Route) -> Credentials:
        is_open = authenticate is not None and doors.is_open
        found = {} if is_open else _by_name(headers)
        if authenticate is None or is_open or not found.get(API_KEY):
            if route.links:
                return by_links(route.links, route.port, doors.links, is_first_visit=True)
            if authenticate is not None and (kept := in_cookies(headers)):
                check_page(found or _by_name(headers), doors.allowed_origins)
                return by_links(kept, route.port, doors.links, is_first_visit=False)
        if is_open:
            return ByKey(ANONYMOUS.tenant)
        try:
            if authenticate is None:
                # A host that names a sandbox is under the operator's own domain, so no page can have it rebound.
                check_keyless(found, _ACTS, loopback_only=doors.loopback_only and bool(route.prefix))
                return ByKey(ANONYMOUS.tenant)
            return ByKey(principal_of(found, authenticate).tenant)
        except Problem as problem:
            raise Refusal(problem.status, problem.code, problem.message, problem.headers) from None

    return identify


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


def carriers(parts: Opened, stopping: asyncio.Event) -> tuple[Relay, Before]:
    """The relay of a server, and what one in front asks. Made inside the event loop; close the relay after the
    listener.
    """
    settings = parts.settings
    authenticate, is_open = built_in(settings.server.api_key, parts.sealer), settings.proxy.auth == "open"
    links, address = LinkKey(parts.keys.link), settings.proxy.public_address or settings.server.eip
    origins = frozenset(each.lower() for each in settings.proxy.allowed_origins)
    identify = admission(authenticate, Doors(is_loopback(settings.server.host), is_open, links, origins))
    access = access_of(settings, parts.installation, parts.keys.token)
    resolver = Resolver(parts.service.view, parts.signal, access, stopping)
    options = Options(
        via=f"sandledger-{str(parts.installation)[:8]}",
        adds_token=not is_open,
        cors=authenticate is not None and not is_open,
        external_path=external_path(address),
        links=links,
        secure=address.lower().startswith("https://"),
        limits=with_descriptors(Limits()),
        same_origin_pages=settings.proxy.same_origin_pages,
        stream_idle_seconds=settings.proxy.idle_seconds,
    )
    decide = Decider(identify, resolver, options, domain_of(settings.proxy.wildcard).encode())
    return Relay(identify, resolver, options, Activity(parts.database)), Before(
        decide, secret_of(parts.keys.token).encode()
    )


def access_of(settings: Settings, installation: UUID, token_key: bytes) -> Access:
    """How this server gets into sandboxes."""
    way = by_link = way_of(settings, installation)
    if settings.proxy.auth == "open":
        # The agent asks callers without a key for its token. Nobody would, at the program itself. Whoever has a link is
        # asked for that, and then the program does not see the token.
        way = replace(way, stands_on=nowhere)
    return Access(token_key, way, has_agents=bool(settings.runtime.execd_image), way_of_links=by_link)


def external_path(address: str) -> str | None:
    """The path before `/sandboxes` for clients that reach this server by that address; None = as they write it."""
    if not address:
        return None
    _, slash, path = address.rpartition("://")[2].partition("/")
    return (slash + path).rstrip("/")
