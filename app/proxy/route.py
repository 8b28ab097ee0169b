"""Which sandbox and port a request target means. Pure.

The target is taken as the bytes of the request line. A router would decode `%2F`, join `//` and lose a `?` at the end;
the program in the sandbox must see what the client wrote. So the rest of the path is never decoded, never resolved and
never compared: `..` in it goes to the sandbox as it came.
"""

from __future__ import annotations

import re
from typing import Final
from uuid import UUID

from msgspec import Struct

_ORIGIN = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*")
"""What stands before the path when the target has the absolute form (RFC 9112, section 3.2.2)."""
_ROUTE = re.compile(
    rb"((?:/v1)?/sandboxes/([0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})/proxy/([^/?#]+))(.*)", re.DOTALL
)
_PORT = re.compile(rb"[1-9][0-9]{0,4}")
MAX_PORT: Final = 65535


class Route(Struct, frozen=True):
    """Where a request goes."""

    sandbox_id: UUID
    port: int | None
    """None = the path names something that is no port."""
    prefix: str
    """The path up to the port, as the client wrote it."""
    rest: bytes
    """All that stands behind the port, with the query. Empty, or it begins with `/`, `?` or `#`."""


def route(target: bytes) -> Route | None:
    """The route of a request target; None = it is not for a sandbox."""
    if b"/proxy/" not in target:
        return None
    if not target.startswith(b"/"):
        target = _ORIGIN.sub(b"", target, count=1)
    found = _ROUTE.fullmatch(target)
    if found is None:
        return None
    prefix, identity, port, rest = found.groups()
    number = int(port) if _PORT.fullmatch(port) else MAX_PORT + 1
    return Route(UUID(identity.decode()), number if number <= MAX_PORT else None, prefix.decode(), rest)
