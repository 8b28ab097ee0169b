"""What nginx asks before it carries a request to a sandbox itself, so that bytes pass this process no more.

`sandledger nginx` prints its configuration (`app.proxy.nginx`). For each request nginx asks here, with the client's own
headers and a few that say what the request is. The answer is 204 with the address, the path and the value of each
header that nginx has to set, or 401. Then nginx gives the same request to the relay (`app.proxy.http`), which carries
it or says why not. So 401 is never a refusal: it means "not by nginx". There is one set of refusals, and nothing is
lost when the question fails in any way.

A decision costs one row that is kept already (`app.proxy.rows`). It calls no engine, waits for no sandbox, and holds
for one request: nginx keeps none.

**What nginx may carry** is what it would carry just as the relay does. The headers are those of `app.proxy.heads`: they
are computed for the request, and compared with what nginx makes of it. nginx can set headers, remove those that it
knows by name, and pass the others on; if that is not the same, the relay carries the request. The relay also carries
what nginx cannot: calls from pages of other origins, whose answers need headers that depend on the program's own, and
what a signed link lets in, which ends with the link.

**Who may ask**: who has the secret of the installation. It is derived from a key of the installation and stands in a
file that nginx includes. With it nginx also says for whom it passes a request on to this server: the client's address
and scheme (`Hop`). Without it these headers count for nothing, and the path does not exist.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Final

from msgspec import Struct

from app.agent.token import TOKEN_HEADER
from app.errors import NotFound, StoreUnavailable, UnknownEvent
from app.proxy.admit import ByKey
from app.proxy.heads import CONFINED_PAGE, Headers, Passage, to_sandbox
from app.proxy.inbound import request_id_of
from app.proxy.options import Identify, Options, passage_of
from app.proxy.refusals import Refusal
from app.proxy.resolve import Resolver, Target, generation_of
from app.proxy.route import Route, route

PATH: Final = "/internal/proxy/decide"
OURS: Final = b"x-sandledger-"
SECRET: Final = OURS + b"secret"
CLIENT: Final = OURS + b"client"
SCHEME: Final = OURS + b"scheme"
METHOD: Final = OURS + b"method"
URI: Final = OURS + b"uri"
HOST: Final = OURS + b"host"
UPGRADE: Final = OURS + b"upgrade"
LENGTH: Final = OURS + b"length"
PROTOCOL: Final = OURS + b"protocol"
FORM: Final = OURS + b"form"
BY_PATH: Final = b"path"
BY_HOST: Final = b"host"
ASKED: Final = (CLIENT, SCHEME, METHOD, URI, HOST, UPGRADE, LENGTH, PROTOCOL, FORM)
"""What nginx says of the request beside its headers."""
_OF_NGINX: Final = frozenset((*ASKED, SECRET))
TARGET: Final = OURS + b"target"
TO: Final = OURS + b"path"
PREFIX: Final = OURS + b"prefix"
PORT: Final = OURS + b"port"
POLICY: Final = OURS + b"policy"
ANSWERED: Final = (TARGET, TO, PREFIX, PORT, POLICY, UPGRADE)
"""What the answer says beside the headers."""
SET: Final = (
    b"host",
    b"accept-encoding",
    TOKEN_HEADER.lower().encode(),
    b"opensandbox-egress-auth",
    b"x-forwarded-for",
    b"x-forwarded-proto",
    b"x-forwarded-host",
    b"x-forwarded-prefix",
    b"x-real-ip",
    b"forwarded",
    b"via",
    b"x-request-id",
)
"""Headers that nginx sets to what the answer says under `set_by`; empty = it removes them."""
REMOVED: Final = (
    b"open-sandbox-api-key",
    b"opensandbox-access-renew",
    b"opensandbox-secure-access",
    b"sandledger-generation",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"x-forwarded-port",
    b"x-forwarded-server",
    b"x-forwarded-ssl",
)
"""Headers that nginx always removes."""
REMOVED_BY_PATH: Final = (b"authorization", b"cookie")
"""The same where sandboxes share an origin."""
_NGINXS_OWN: Final = frozenset((b"connection", b"content-length", b"expect", b"host", b"transfer-encoding", b"upgrade"))
"""nginx never passes these on as the client sent them: they are of one hop, or were said under another name."""
MAX_ANSWER_BYTES: Final = 6 * 1024
"""What nginx has room for, with the status line (`proxy_buffer_size`)."""
_PURPOSE: Final = b"nginx"
_GONE: Final = {True: frozenset((*SET, *REMOVED, *REMOVED_BY_PATH)), False: frozenset((*SET, *REMOVED))}
"""What does not pass as it is, by whether the form is the one with the path."""
_HANDSHAKE: Final = (b"GET", b"HTTP/1.1")


def secret_of(token_key: bytes) -> str:
    """The secret that nginx shows, in lower-case hex. `token_key` is the key `token` of the installation."""
    return hmac.digest(token_key, _PURPOSE, "sha256").hex()


def set_by(name: bytes) -> bytes:
    """The header of the answer that has the value for this one."""
    return OURS + b"set-" + name


_SET_BY: Final = {name: set_by(name) for name in SET}


@lru_cache(1024)
def _ip(text: str) -> str | None:
    """The address as it is usually written; None = it is none of IP."""
    try:
        return str(ip_address(text))
    except ValueError:
        return None


class Hop(Struct, frozen=True):
    """What a server in front says, which has shown the secret."""

    said: Mapping[bytes, bytes]
    headers: list[tuple[bytes, bytes]]
    """The client's own."""

    @property
    def client(self) -> str | None:
        """The client's address; None = it is none of IP."""
        return _ip(self.said.get(CLIENT, b"").decode("latin-1"))

    @property
    def scheme(self) -> str:
        """That the client used."""
        return "https" if self.said.get(SCHEME) == b"https" else "http"


def hop_of(headers: Headers, secret: bytes) -> Hop | None:
    """None = it comes from somebody else."""
    shown = [value for name, value in headers if name == SECRET]
    if len(shown) != 1 or not hmac.compare_digest(shown[0], secret):
        return None
    said: dict[bytes, bytes] = {}
    own: list[tuple[bytes, bytes]] = []
    for header in headers:
        if header[0] in _OF_NGINX:
            said[header[0]] = header[1]
        else:
            own.append(header)
    return Hop(said, own)


class Decider:
    """Of one process."""

    def __init__(self, identify: Identify, resolver: Resolver, options: Options, domain: bytes) -> None:
        """The same parts as those of the relay. `domain` as `app.proxy.route.route` takes it."""
        self._identify = identify
        self._resolver = resolver
        self._options = options
        self._domain = domain

    async def __call__(self, hop: Hop) -> list[tuple[bytes, bytes]] | None:
        """The headers of the answer 204; None = nginx may not carry this request."""
        try:
            return await self._decide(hop)
        except (Refusal, NotFound, StoreUnavailable, UnknownEvent):
            return None

    async def _decide(self, hop: Hop) -> list[tuple[bytes, bytes]] | None:
        said = hop.said
        uri, host, client = said.get(URI, b""), said.get(HOST, b""), hop.client
        found = route(uri, host, self._domain) if uri.isascii() else None
        if found is None or found.port is None or client is None:
            return None
        if said.get(FORM) != (BY_PATH if found.prefix else BY_HOST):
            return None
        own = [header for header in hop.headers if header[0] not in _NGINXS_OWN]
        headers = [*([(b"host", host)] if host else []), *own]
        upgrade = _upgrade(said)
        if self._options.cors and not upgrade and any(name == b"origin" for name, _ in own):
            return None
        shown = self._identify(headers, found)
        if not isinstance(shown, ByKey):
            return None
        target = await self._resolver.target_now(found.sandbox_id, shown.tenant, found.port, generation_of(headers))
        if target.leased and target.place not in self._resolver.ports.accepting:
            return None  # the relay finds out whose the address is, and whether the program itself accepts connections
        passage = passage_of(
            self._options,
            found,
            target,
            adds_token=self._options.adds_token,
            host=host,
            client=client,
            scheme=hop.scheme,
            request_id=request_id_of(headers),
        )
        values = _values(own, to_sandbox(headers, passage), by_path=bool(found.prefix))
        return None if values is None else _answer(found, target, passage, values, upgrade)


def _upgrade(said: Mapping[bytes, bytes]) -> bytes:
    """The protocol that nginx asks the sandbox for; empty = none. As `app.server.protocol` tells a handshake."""
    if (said.get(METHOD), said.get(PROTOCOL)) != _HANDSHAKE or said.get(LENGTH, b"") not in (b"", b"0"):
        return b""
    return b"websocket" if said.get(UPGRADE, b"").strip().lower() == b"websocket" else b""


def _values(own: Headers, wanted: Headers, *, by_path: bool) -> dict[bytes, bytes] | None:
    """What nginx has to set, so that the sandbox gets the wanted headers; None = it cannot make them."""
    gone = _GONE[by_path]
    passed = [header for header in own if header[0] not in gone]
    if passed != [header for header in wanted if header[0] not in _SET_BY]:
        return None
    values = {name: value for name, value in wanted if name in _SET_BY}
    return values if len(values) + len(passed) == len(wanted) else None  # else one of them is repeated


def _answer(
    found: Route, target: Target, passage: Passage, values: Mapping[bytes, bytes], upgrade: bytes
) -> list[tuple[bytes, bytes]] | None:
    if _ip(target.host) is None:
        return None  # nginx has no resolver
    confined = passage.prefix and not passage.same_origin_pages
    answer = [
        (TARGET, target.address.encode()),
        (TO, (target.path + found.path).encode("latin-1")),
        (PREFIX, passage.prefix.encode()),
        (PORT, b"%d" % passage.port),
        (POLICY, CONFINED_PAGE[1] if confined else b""),
        (UPGRADE, upgrade),
        *[(_SET_BY[name], value) for name, value in values.items()],
    ]
    return answer if len(b"".join([b": \r\n".join(header) for header in answer])) <= MAX_ANSWER_BYTES else None
