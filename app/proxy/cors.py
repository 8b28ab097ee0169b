"""Pages of other origins that call programs in sandboxes with a key. Pure.

Before such a call a browser asks whether it may send the key, and that question (a preflight) has none. So it is
answered here, as for the API: any origin, any method, any header, and no credentials. Without credentials a page gets
only what its own key opens. The answer to the call itself may then be read, refusals included. A program that sets
these headers itself decides for its own answers.

Without keys nothing of this is sent: then every page could use the server.
"""

from __future__ import annotations

from typing import Final

from app.proxy.heads import Headers

_KEY: Final = b"open-sandbox-api-key"
_ALLOW_ORIGIN: Final = b"access-control-allow-origin"
_ANY: Final = (_ALLOW_ORIGIN, b"*")
_VARY: Final = (b"vary", b"Origin")
_EXPOSED: Final = (b"access-control-expose-headers", b"Retry-After, Sandledger-Error, X-Request-ID")
PREFLIGHT: Final[Headers] = (
    _ANY,
    (b"access-control-allow-methods", b"*"),
    (b"access-control-allow-headers", b"*, Authorization, OPEN-SANDBOX-API-KEY"),
    (b"access-control-max-age", b"600"),
    _VARY,
)
"""The answer to a preflight."""


def is_preflight(method: str, headers: Headers) -> bool:
    """Whether a browser asks before a call. A request with the key is the call."""
    if method != "OPTIONS":
        return False
    names = {name for name, _ in headers}
    return {b"origin", b"access-control-request-method"} <= names and _KEY not in names


def readable(asked: Headers, answered: Headers) -> Headers:
    """What lets a page of another origin read the answer; nothing where no page asked, or the program has decided."""
    if not any(name == b"origin" for name, _ in asked) or any(name == _ALLOW_ORIGIN for name, _ in answered):
        return ()
    return _ANY, _EXPOSED, _VARY
