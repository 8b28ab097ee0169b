"""Which sandbox and port a request means. Pure.

There are two forms. In the path: `/sandboxes/{id}/proxy/{port}/...`, under the origin of this server. In the host:
`{port}-{id}.<domain>`, where each port of each sandbox has an origin of its own and all paths are the program's.

The target is taken as the bytes of the request line. A router would decode `%2F`, join `//` and lose a `?` at the end;
the program in the sandbox must see what the client wrote. So the rest of the path is never decoded, never resolved and
never compared: `..` in it goes to the sandbox as it came. Only signed links are taken out of the query
(`app.proxy.links`).
"""

from __future__ import annotations

import re
from typing import Final
from uuid import UUID

from msgspec import Struct

from app.proxy.links import taken_from

_ORIGIN = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*)")
"""What stands before the path when the target has the absolute form (RFC 9112, section 3.2.2)."""
_ROUTE = re.compile(
    rb"((?:/v1)?/sandboxes/([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})/proxy/([^/?#]+))(.*)", re.DOTALL
)
_HOST = re.compile(rb"([0-9]{1,9})-([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([0-9a-z.-]*[0-9a-z])\.?(?::[0-9]*)?")
_PORT = re.compile(rb"[1-9][0-9]{0,4}")
MAX_PORT: Final = 65535


class Route(Struct, frozen=True):
    """Where a request goes."""

    sandbox_id: UUID
    port: int | None
    """None = the path names something that is no port."""
    prefix: str
    """The path up to the port, as the client wrote it; empty in the form with the host."""
    rest: bytes
    """All that stands behind the port, with the query. Empty, or it begins with `/`, `?` or `#`; in the form with the
    host it may also be `*`. Signed links in the query are taken out of it."""
    links: tuple[str, ...] = ()
    """The signed links that stood in the query."""

    def __repr__(self) -> str:
        """Keep links, and what programs have in their queries, out of tracebacks."""
        return f"Route({self.sandbox_id}, {self.port})"

    @property
    def path(self) -> str:
        """The same as a request target, which begins with `/`."""
        rest = self.rest.decode("latin-1")
        return rest if rest.startswith("/") else f"/{rest}"


def route(target: bytes, host: bytes = b"", domain: bytes = b"") -> Route | None:
    """The route of a request target and a `Host`; None = it is not for a sandbox. `domain` is that of the form with the
    host, in lower case; empty = there is none.
    """
    if not target.startswith(b"/"):
        found = _ORIGIN.match(target)
        if found is not None:
            # The absolute form wins over `Host` (RFC 9112, section 3.2.2).
            host, target = found[1], target[found.end() :]
    if domain:
        named = _by_host(host, target, domain)
        if named is not None:
            return named
    if b"/proxy/" not in target:
        return None
    found = _ROUTE.fullmatch(target)
    if found is None:
        return None
    prefix, identity, port, rest = found.groups()
    return Route(UUID(identity.decode()), _number(port), prefix.decode(), *taken_from(rest))


def _by_host(host: bytes, target: bytes, domain: bytes) -> Route | None:
    found = _HOST.fullmatch(host.lower())
    if found is None or found[3] != domain:
        return None
    return Route(UUID(found[2].decode()), _number(found[1]), "", *taken_from(target))


def _number(port: bytes) -> int | None:
    number = int(port) if _PORT.fullmatch(port) else MAX_PORT + 1
    return number if number <= MAX_PORT else None
