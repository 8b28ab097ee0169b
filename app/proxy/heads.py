"""The headers of a request to a sandbox, and of its answer. Pure.

In the form with the path all sandboxes share the origin of this server. So `Authorization` and `Cookie` of the origin
never reach a sandbox, and what a sandbox sets is confined to its own prefix. In the form with the host (in brackets
below) each port of a sandbox has an origin of its own, and these headers are the program's.

====================================== =================================== ====================================
Header                                 to the sandbox                      to the client
====================================== =================================== ====================================
hop-by-hop, and all in `Connection`    removed                             removed
`Content-Length`, `Transfer-Encoding`  removed: the client frames again    length kept where there is a body
our own (key, `Sandledger-*`, …)       removed                             `Sandledger-*` removed
`X-Sandledger-*`, which are nginx's    removed                             removed
`X-EXECD-ACCESS-TOKEN`                 ours, for the agent only            kept
`OPENSANDBOX-EGRESS-AUTH`              kept for port 18080 only            kept
`Authorization`, `Cookie`              removed [kept, without our cookie]  kept
`Set-Cookie`                           kept                                removed, if it names our cookie; no
                                                                           `Domain`; `Path` under the prefix
                                                                           [kept]
`Referer`                              removed, if a link stands in it     kept
`Host`                                 the client's                        kept
`X-Forwarded-*`, `Forwarded`,          replaced by ours                    kept
`X-Real-IP`
`Expect`                               removed                             kept
`Accept-Encoding`                      `identity` where it is missing      kept
                                       and the agent is between
`Location`                             kept                                under the prefix, if it is the
                                                                           program's own
`Server`                               kept                                removed
`Content-Security-Policy`              kept                                kept; `sandbox` beside it [kept]
`Strict-Transport-Security` and others kept                                removed [kept]
of a whole origin
`X-Accel-*`, `X-Sendfile`              kept                                removed, but `X-Accel-Buffering`
`X-Request-ID`                         passed, or made                     ours, if the program sets none
`Via`                                  ours added; four of ours: refused   kept
====================================== =================================== ====================================

A page of a sandbox in the form with the path would be a page of this server: its script could use the API as its
reader, where no key is needed, and read what a console keeps. `sandbox` gives it an origin of no one. Every answer
gets it: browsers take many types for a page, also wrong and missing ones.

A name that is removed from requests is removed with `_` for `-` too: many frameworks take the two for one, and a caller
could forge with one what we replace in the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

from msgspec import Struct

from app.agent.token import TOKEN_HEADER
from app.domain.sandbox.address import EGRESS_PORT
from app.proxy.links import sets_link, shows_link, without_link
from app.proxy.refusals import invalid_header, loop, no_answer

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]
_MAX_PASSAGES: Final = 4
_HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
_TOKEN: Final = TOKEN_HEADER.lower().encode()
_EGRESS: Final = b"opensandbox-egress-auth"
_NEVER_SENT: Final = _HOP_BY_HOP | {
    b"content-length",
    b"expect",
    b"forwarded",
    b"host",
    b"open-sandbox-api-key",
    b"opensandbox-access-renew",
    b"opensandbox-secure-access",
    b"x-real-ip",
    b"x-request-id",
}
_NOT_FROM_OUR_ORIGIN: Final = _NEVER_SENT | {b"authorization", b"cookie"}
_OURS: Final = (b"sandledger-", b"x-sandledger-")
_FORWARDED: Final = b"x-forwarded-"
CONFINED_PAGE: Final = (
    b"content-security-policy",
    b"sandbox allow-scripts allow-forms allow-popups allow-downloads",
)
"""What a page gets that is reached by path."""
_NO_BODY: Final = (204, 304)
_NO_PAGE: Final = (101, *_NO_BODY)
_QUOTABLE: Final = re.compile(r"[!#-\[\]-~]*")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")
OF_AN_ORIGIN: Final = frozenset(
    (
        b"alt-svc",
        b"clear-site-data",
        b"nel",
        b"origin-agent-cluster",
        b"report-to",
        b"reporting-endpoints",
        b"service-worker-allowed",
        b"strict-transport-security",
    )
)
_AUTHORITY: Final = re.compile(rb"(https?)://([^/?#]*)(.*)", re.DOTALL | re.IGNORECASE)


class Passage(Struct, frozen=True):
    """What a request's way through this server adds to it."""

    prefix: str
    """Path up to the port, as the client sees it. Empty: the port has an origin of its own."""
    port: int
    token: str | None
    """Of the agent; None = the caller sends its own."""
    to_agent: bool
    """Whether the agent itself answers; else it passes on."""
    host: bytes
    """The client's `Host`; empty = it sent none."""
    address: str
    """Of the sandbox, `host:port`."""
    client: str
    scheme: str
    request_id: str
    via: str
    """Our name in `Via`."""
    is_program: bool = False
    """The program itself is asked, without the agent, whose token it must not see."""
    same_origin_pages: bool = False
    """Whether pages of sandboxes may be pages of this server."""


def to_sandbox(headers: Headers, passage: Passage) -> list[tuple[bytes, bytes]]:
    """The head of the request without its framing.

    Raises:
        Refusal: it went in a circle.
    """
    named = _named(headers)
    passed: list[tuple[bytes, bytes]] = []
    host = passage.host or passage.address.encode()
    sent: list[tuple[bytes, bytes]] = [(b"host", host)]
    encoded = False
    kept_back = _NOT_FROM_OUR_ORIGIN if passage.prefix else _NEVER_SENT
    for name, value in headers:
        plain = name.replace(b"_", b"-")
        if plain in kept_back or plain in named or plain.startswith((*_OURS, _FORWARDED)):
            continue
        if plain == _TOKEN and (passage.token is not None or passage.is_program):
            continue
        if plain == _EGRESS and passage.port != EGRESS_PORT:
            continue
        if (plain == b"referer" and shows_link(value)) or (plain == b"cookie" and value and not without_link(value)):
            continue
        if name == b"via":
            passed.append((name, value))
            continue
        if not value.isascii():
            _check_text(name, value)
        encoded = encoded or name == b"accept-encoding"
        sent.append((name, without_link(value) if plain == b"cookie" else value))
    if not encoded and not passage.to_agent:
        sent.append((b"accept-encoding", b"identity"))
    if passage.token is not None:
        sent.append((_TOKEN, passage.token.encode()))
    return [*sent, *_forwarded(passage), *_via(passed, passage.via), (b"x-request-id", passage.request_id.encode())]


def _check_text(name: bytes, value: bytes) -> None:
    """The client writes text. Other bytes would not arrive as they are."""
    try:
        value.decode()
    except UnicodeDecodeError:
        raise invalid_header(f"The header {name.decode()} must be ASCII or UTF-8.") from None


def _named(headers: Headers) -> frozenset[bytes]:
    """Names in `Connection`: they are for the next hop only, and we are that."""
    lists = [value for name, value in headers if name == b"connection"]
    if not lists:
        return frozenset()
    return frozenset(each.strip().lower().replace(b"_", b"-") for value in lists for each in value.split(b","))


def _forwarded(passage: Passage) -> list[tuple[bytes, bytes]]:
    client, scheme = passage.client, passage.scheme
    node = f'"[{client}]"' if ":" in client else client
    host = passage.host.decode("latin-1")
    pairs = [f"for={node}", *([f'host="{host}"'] if host and _QUOTABLE.fullmatch(host) else []), f"proto={scheme}"]
    return [
        (b"x-forwarded-for", client.encode()),
        (b"x-forwarded-proto", scheme.encode()),
        *([(b"x-forwarded-host", passage.host)] if passage.host else []),
        *([(b"x-forwarded-prefix", passage.prefix.encode())] if passage.prefix else []),
        (b"x-real-ip", client.encode()),
        (b"forwarded", ";".join(pairs).encode("latin-1")),
    ]


def _via(passed: Headers, ours: str) -> list[tuple[bytes, bytes]]:
    before = [each.strip() for _, value in passed for each in value.split(b",")]
    name = ours.encode()
    if sum(each.split()[1:2] == [name] for each in before) >= _MAX_PASSAGES:
        raise loop()
    return [*passed, (b"via", b"1.1 " + name)]


def to_client(status: int, headers: Headers, passage: Passage) -> list[tuple[bytes, bytes]]:
    """The head of the answer. Without a length the server frames it in chunks.

    Raises:
        Refusal: a header that no server may send.
    """
    lowered = [(name.lower(), value) for name, value in headers]
    named = _named(lowered)
    framed = status in _NO_BODY or any(name == b"transfer-encoding" for name, _ in lowered)
    sent: list[tuple[bytes, bytes]] = []
    known = False
    for name, value in lowered:
        if name in _HOP_BY_HOP or name in named or name == b"server" or name.startswith(_OURS):
            continue
        if (name == b"content-length" and framed) or _steers(name, passage):
            continue
        if name == b"set-cookie" and sets_link(value):
            continue
        if _CONTROL.search(value) or not _NAME.fullmatch(name):
            raise no_answer("A header of the sandbox's answer has characters that no header may have.")
        known = known or name == b"x-request-id"
        if name == b"set-cookie":
            sent.append((name, confined(value, passage.prefix)))
        elif name == b"location":
            sent.append((name, relocated(value, passage)))
        else:
            sent.append((name, value))
    if not known:
        sent.append((b"x-request-id", passage.request_id.encode()))
    if passage.prefix and not passage.same_origin_pages and status not in _NO_PAGE:
        sent.append(CONFINED_PAGE)
    return sent


def _steers(name: bytes, passage: Passage) -> bool:
    """Whether it steers a server in front of us, or all of an origin that is not the program's alone."""
    if name == b"x-sendfile" or (name.startswith(b"x-accel-") and name != b"x-accel-buffering"):
        return True
    return bool(passage.prefix) and name in OF_AN_ORIGIN


def confined(cookie: bytes, prefix: str) -> bytes:
    """A cookie of this sandbox and port only. Without a `Path` browsers take the folder of the request, which is under
    the prefix already.
    """
    pair, *attributes = cookie.split(b";")
    return b";".join([pair, *_confined(attributes, prefix.encode())])


def _confined(attributes: Iterable[bytes], prefix: bytes) -> Iterable[bytes]:
    for attribute in attributes:
        name, _, value = attribute.partition(b"=")
        match name.strip().lower():
            case b"domain":
                continue
            case b"path":
                path = value.strip()
                if path.startswith(b"/"):
                    yield b" Path=" + (path if _under(path, prefix) else prefix + path)
            case _:
                yield attribute


def relocated(location: bytes, passage: Passage) -> bytes:
    """Where a redirect leads, as the client has to write it. Other hosts stay as they are.

    A program that knows its prefix (`X-Forwarded-Prefix`) writes it itself.
    """
    prefix = passage.prefix.encode()
    if location.startswith(b"/"):
        return location if location.startswith(b"//") or _under(location, prefix) else prefix + location
    found = _AUTHORITY.fullmatch(location)
    if found is None:
        return location
    authority, path = found[2].lower(), found[3]
    port = passage.port
    own = {passage.host.lower(), passage.address.encode(), b"127.0.0.1:%d" % port, b"localhost:%d" % port} - {b""}
    if authority not in own:
        return location
    path = path if path.startswith(b"/") else b"/" + path
    base = passage.scheme.encode() + b"://" + passage.host if passage.host else b""
    return base + (path if _under(path, prefix) else prefix + path)


def _under(path: bytes, prefix: bytes) -> bool:
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in (b"", b"/", b"?", b"#")
