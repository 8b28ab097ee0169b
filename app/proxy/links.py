"""Signed links on their way through the proxy: where they stand in a request, and how a browser gets its cookie. Pure.

A link comes in the query, the first time, and then in a cookie. Neither reaches the sandbox, and no answer repeats it
but the one that sets the cookie: query, `Cookie` and `Referer` are cleaned, whoever sends them.

The first visit is answered by 303 to the same URL without the link, so that it stands in no history, no bookmark and no
`Referer`. That is for GET and HEAD; other requests with a link in the query, and handshakes, are passed on without it,
because programs send them, which keep no cookies.

======================= =========================================== ========================
form                    cookie                                      path
======================= =========================================== ========================
host of its own, TLS    `__Host-sandledger-link`, `Secure`          `/`
host of its own         `sandledger-link`                           `/`
path                    `sandledger-link`, `Secure` with TLS        of this sandbox and port
======================= =========================================== ========================

Browsers take the name with `__Host-` over TLS only. It keeps the page of another sandbox, whose host is a sibling of
this one, from setting the cookie. Where a sibling can set it, several may come: the right one counts when it is among
the first eight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import unquote_to_bytes

from app.domain.sandbox.links import LINK_PARAMETER

COOKIE: Final = b"sandledger-link"
HOST_COOKIE: Final = b"__Host-sandledger-link"
_COOKIES: Final = frozenset((COOKIE, HOST_COOKIE))
_PARAMETER: Final = LINK_PARAMETER.encode()
_MOST: Final = 8
"""Values in one request that are looked at."""
_PLAIN: Final = re.compile(rb"/(?:[0-9A-Za-z._~%!$&'()*+,;=:@-]|[?#]|\Z)")
"""The beginning of a path that no browser takes for a host."""


def taken(query: bytes) -> tuple[bytes, tuple[str, ...]]:
    """The query without links, all else as it was sent, and the links."""
    if _PARAMETER not in query and b"%" not in query:
        return query, ()
    fields = query.split(b"&")
    kept = [field for field in fields if not _names_link(field)]
    if len(kept) == len(fields):
        return query, ()
    links = [field.partition(b"=")[2].decode("latin-1") for field in fields if _names_link(field)]
    return b"&".join(kept), tuple(links[:_MOST])


def taken_from(rest: bytes) -> tuple[bytes, tuple[str, ...]]:
    """The same of what stands behind the port in a request target."""
    path, mark, behind = rest.partition(b"?")
    if not mark or b"#" in path:
        return rest, ()
    query, hash_mark, fragment = behind.partition(b"#")
    kept, links = taken(query)
    if not links:
        return rest, ()
    return path + (b"?" + kept if kept else b"") + hash_mark + fragment, links


def _names_link(field: bytes) -> bool:
    name = field.partition(b"=")[0]
    return name == _PARAMETER or (b"%" in name and unquote_to_bytes(name) == _PARAMETER)


def in_cookies(headers: Sequence[tuple[bytes, bytes]]) -> tuple[str, ...]:
    """The links that a browser sends."""
    found = [
        (name.strip(), value.strip(b' "').decode("latin-1"))
        for header, cookies in headers
        if header == b"cookie" and COOKIE in cookies
        for name, _, value in (each.partition(b"=") for each in cookies.split(b";"))
        if name.strip() in _COOKIES
    ]
    # Pages of a sibling can set the plain name for the whole domain, and many of them. The other name they cannot.
    safe = [value for name, value in found if name == HOST_COOKIE]
    return tuple((safe or [value for _, value in found])[:_MOST])


def without_link(cookies: bytes) -> bytes:
    """A header `Cookie` without ours. All else as it was sent; empty = nothing is left."""
    if COOKIE not in cookies:
        return cookies
    kept = [each for each in cookies.split(b";") if each.partition(b"=")[0].strip() not in _COOKIES]
    return b";".join(kept).strip()


def sets_link(cookie: bytes) -> bool:
    """Whether a header `Set-Cookie` of a program names ours."""
    return cookie.partition(b";")[0].partition(b"=")[0].strip() in _COOKIES


def shows_link(referer: bytes) -> bool:
    """Whether a header `Referer` has a link in it."""
    return bool(taken_from(referer)[1])


def first_visit(value: str, seconds: int, prefix: str, rest: bytes, *, secure: bool) -> Iterable[tuple[bytes, bytes]]:
    """The headers of the answer to a first visit. `prefix` is as the client sees it, and empty in the form with the
    host; `rest` has no link any more.
    """
    name = HOST_COOKIE if secure and not prefix else COOKIE
    parts = [
        name + b"=" + value.encode(),
        f"Max-Age={seconds}".encode(),
        b"Path=" + (prefix.encode() or b"/"),
        b"HttpOnly",
        *([b"Secure"] if secure else []),
        b"SameSite=Lax",
    ]
    yield b"location", location(prefix, rest)
    yield b"set-cookie", b"; ".join(parts)
    yield b"referrer-policy", b"no-referrer"
    yield b"cache-control", b"no-store"


def location(prefix: str, rest: bytes) -> bytes:
    """The path of the same URL. Browsers take what follows `//`, or `/` and a backslash or a tab, for a host; `/.`
    before it changes nothing else.
    """
    path = prefix.encode() + rest
    return path if _PLAIN.match(path) else b"/." + path
