"""How requests are carried to sandboxes: what the relay and the decisions for nginx have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias, cast

from msgspec import Struct

from app.domain.sandbox.links import LinkKey
from app.proxy.admit import Credentials
from app.proxy.heads import Headers, Passage
from app.proxy.limits import Limits
from app.proxy.resolve import Target
from app.proxy.route import Route
from app.proxy.splice import HALF_CLOSED_SECONDS

Identify: TypeAlias = Callable[[Headers, Route], Credentials]
"""From the headers and the route of a request to what it shows. Raises `Refusal`."""
IDLE_SECONDS: Final = 180.0


class Options(Struct, frozen=True):
    """How the relay works."""

    via: str
    """Our name in `Via`."""
    adds_token: bool = True
    """Whether callers reach the agent without its token."""
    external_path: str | None = None
    """The path before `/sandboxes`, as clients see it; None = as they sent it."""
    limits: Limits = Limits()
    cors: bool = False
    """Whether pages of other origins may call, see `app.proxy.cors`."""
    links: LinkKey | None = None
    """The key of signed links; None = none are taken."""
    secure: bool = False
    """Whether clients reach this server by TLS that ends in front of it."""
    same_origin_pages: bool = False
    """Whether pages of sandboxes may be pages of this server, in the form with the path."""
    idle_seconds: float = IDLE_SECONDS
    """How long a request may stand still before the head of its answer."""
    stream_idle_seconds: float | None = None
    """How long an answer or a WebSocket may stand still; None = for ever."""
    half_closed_seconds: float = HALF_CLOSED_SECONDS
    """How long one direction of a WebSocket may outlive the other."""


def passage_of(
    options: Options,
    route: Route,
    target: Target,
    *,
    adds_token: bool,
    host: bytes,
    client: str,
    scheme: str,
    request_id: str,
) -> Passage:
    """What the way of a request adds to its headers."""
    return Passage(
        prefix=prefix_of(route, options.external_path),
        port=cast("int", route.port),
        token=target.token if adds_token and not target.leased else None,
        to_agent=not target.path,
        is_program=target.leased,
        host=host,
        address=target.address,
        client=client,
        scheme=scheme,
        request_id=request_id,
        via=options.via,
        same_origin_pages=options.same_origin_pages,
    )


def prefix_of(route: Route, external: str | None) -> str:
    """The path up to the port as the client sees it. Empty in the form with the host. `external` as in `Options`."""
    own = route.prefix
    return own if external is None or not own else external + own[own.index("/sandboxes/") :]
