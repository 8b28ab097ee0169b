"""The HTTP client to sandboxes: aiohttp's, behind this seam, without its habits.

* It is a session as `app.agent.session` makes them. No redirect is followed and no header added.
* The request target is written as it is given: it stands as the path of a URL that says of itself that it is encoded.
* A request is repeated only when it has no body, changes nothing by its method, and met a kept connection that ended
  before the first byte of the answer; then once, on a new connection. Other requests always get a new connection.
* A request may ask for another protocol. When the answer is 101, the connection leaves aiohttp with what came behind
  the head, so nothing of it is parsed (`Answer.take`).
* Connections are kept by sandbox, generation and port, so what one sandbox writes behind its answer never reaches a
  request to another.
* Heads of answers are strict: lines end in CR LF, nothing is folded, 64 KiB at most. aiohttp's parser is lenient in
  production, so the bytes are looked at before it gets them.
* A body that ends with the connection ends well only if the connection did. aiohttp takes a reset for an end.
* A connection that is given up is given up at once. `transport.close` would first wait until a peer that does not read
  has taken all that is buffered.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Final, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.helpers import _EXC_SENTINEL as _NO_CAUSE  # pyright: ignore[reportPrivateUsage] - a default of theirs
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import Struct
from multidict import CIMultiDict
from yarl import URL

from app.agent.session import plain_session
from app.proxy.resolve import Target

CONNECT_SECONDS: Final = 5.0
KEPT_SECONDS: Final = 15.0
MAX_KEPT: Final = 1024
MAX_KEPT_A_TARGET: Final = 32
"""As many as one client of many connections has in use: with fewer, those connections are made again and again."""
MAX_HEAD_BYTES: Final = 64 * 1024
READ_BYTES: Final = 128 * 1024
"""aiohttp stops reading at twice this much."""
_MAX_HEADERS: Final = 1024
_KEPT_METHODS: Final = frozenset(("GET", "HEAD", "OPTIONS"))
_KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: |\r|\Z)")
_FOLDED: Final = re.compile(rb"\n[ \t]|\r(?!\n)|\x00")
_HIGHEST_STATUS: Final = 599
_SWITCHING: Final = 101


class ConnectFailed(Exception):
    """Nothing was sent."""

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused
        """Whether the machine at the address answered that nothing listens there."""


class AnswerFailed(Exception):
    """No whole head of an answer came; the message says what came."""


class Cut(Exception):
    """The answer ended in its middle."""


class Outgoing(Struct, frozen=True):
    """A request."""

    method: str
    target: Target
    rest: str
    """The request target behind the target's own path; begins with `/`."""
    headers: Sequence[tuple[bytes, bytes]]
    """Without framing."""
    body: AsyncIterator[bytes] | None = None
    length: int | None = None
    """Of the body; None = in chunks."""
    upgrade: bytes | None = None
    """The protocol that is asked for; such a request has no body."""


class Answer:
    """The head of an answer, and its body in pieces."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.switched = response.status == _SWITCHING
        """Whether the connection speaks the other protocol now."""
        self.headers: Sequence[tuple[bytes, bytes]] = response.raw_headers
        self._peeked = b""

    async def read(self) -> bytes:
        """What is there of the body, as soon as something is; empty at its end.

        Raises:
            Cut: the connection ended before the body did.
        """
        if peeked := self._peeked:
            self._peeked = b""
            return peeked
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            raise Cut(str(error) or type(error).__name__) from error

    async def peek(self, most: int) -> bytes:
        """The beginning of the body, without taking it: so many bytes or more, or all.

        Raises:
            Cut: as `read`.
        """
        found = b""
        while len(found) < most and (piece := await self.read()):
            found += piece
        self._peeked = found
        return found

    @property
    def ended(self) -> bool:
        """Whether all of the body was read."""
        return not self._peeked and self._response.content.at_eof()

    def take(self) -> tuple[asyncio.Transport, bytes]:
        """The connection that has switched, which is the caller's from now on, and what came behind the head. It may
        be closed already.
        """
        connection = self._response.connection
        assert connection is not None, "it is kept while the connection has switched"
        protocol = cast("_Connection", connection.protocol)
        carrier, tail = protocol.let_go()
        self._response.close()
        return carrier, tail

    def abort(self) -> None:
        """Give up what has not been read, and what has not been written. Harmless after the end."""
        self._response.close()


class Client:
    """Connections of one process. Made inside the event loop."""

    def __init__(self) -> None:
        self._kept = _session(force_close=False)
        self._new = _session(force_close=True)

    async def close(self) -> None:
        """End all connections."""
        await self._kept.close()
        await self._new.close()

    async def send(self, outgoing: Outgoing) -> Answer:
        """The head of the answer.

        Raises:
            ConnectFailed, AnswerFailed: there is none.
        """
        try:
            if outgoing.body is None and outgoing.upgrade is None and outgoing.method in _KEPT_METHODS:
                try:
                    return await _request(self._kept, outgoing)
                except _Stale:
                    pass
            return await _request(self._new, outgoing)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            refused = isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == errno.ECONNREFUSED
            raise ConnectFailed(str(error), refused=refused) from error
        except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise AnswerFailed(str(error) or type(error).__name__) from error


class _Request(aiohttp.ClientRequest):
    """aiohttp's request with the headers that it is given, in their order, and no others."""

    _skip_auto_headers = CIMultiDict[None]([("Content-Type", None)])

    def update_headers(self, headers: Any) -> None:
        """Take them as they are; the session has made a copy."""
        self.headers = headers

    def update_auto_headers(self, skip_auto_headers: Any) -> None:
        """Add none."""

    def update_cookies(self, cookies: Any) -> None:
        """Add none."""


def _session(*, force_close: bool) -> aiohttp.ClientSession:
    return plain_session(
        _Connector(force_close=force_close),
        aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        request_class=_Request,
        read_bufsize=READ_BYTES,
        max_line_size=MAX_HEAD_BYTES,
        max_field_size=MAX_HEAD_BYTES,
        max_headers=_MAX_HEADERS,
    )


async def _request(session: aiohttp.ClientSession, outgoing: Outgoing) -> Answer:
    target, body = outgoing.target, outgoing.body
    headers = [(name.decode(), value.decode()) for name, value in outgoing.headers]
    if outgoing.upgrade is not None:
        headers += [("connection", "Upgrade"), ("upgrade", outgoing.upgrade.decode())]
    if body is not None and outgoing.length is not None:
        headers.append(("content-length", str(outgoing.length)))
    url = URL.build(scheme="http", host=target.host, port=target.port, path=target.path + outgoing.rest, encoded=True)
    response = await session.request(
        outgoing.method,
        url,
        headers=headers,
        data=body,
        chunked=True if body is not None and outgoing.length is None else None,
        allow_redirects=False,
        # Part of the key by which aiohttp keeps connections. It has no other meaning without TLS.
        server_hostname=f"{target.sandbox_id}.{target.generation}{target.path}",
    )
    wrong = response.status > _HIGHEST_STATUS
    if response.status == _SWITCHING:
        wrong = outgoing.upgrade is None or _protocols(response.raw_headers) != [outgoing.upgrade]
    if wrong:
        response.close()
        raise AnswerFailed(f"the answer has the status {response.status}, and that is no answer to the request")
    return Answer(response)


def _protocols(headers: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    """What the answer says that the connection speaks now."""
    return [value.strip().lower() for name, value in headers if name.lower() == b"upgrade"]


class _Stale(aiohttp.ServerDisconnectedError):
    """A kept connection ended before the first byte of the answer."""


class _Connector(aiohttp.TCPConnector):
    """Without a limit of connections, since streams have theirs; with one of those that are kept."""

    def __init__(self, *, force_close: bool) -> None:
        named: dict[str, Any] = {} if force_close else {"keepalive_timeout": KEPT_SECONDS}
        super().__init__(  # pyright: ignore[reportUnknownMemberType] - one of its parameters is a bare tuple
            limit=0, limit_per_host=0, force_close=force_close, use_dns_cache=False, **named
        )
        self._factory = partial(_Connection, loop=self._loop)

    def _release(self, key: Any, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        super()._release(key, protocol, should_close=should_close or not self._may_keep(key))

    def _may_keep(self, key: Any) -> bool:
        kept: dict[Any, Any] = self._conns
        if len(kept.get(key, ())) >= MAX_KEPT_A_TARGET:
            return False
        return len(kept) * MAX_KEPT_A_TARGET < MAX_KEPT or sum(map(len, kept.values())) < MAX_KEPT


class _Connection(ResponseHandler):
    """aiohttp's protocol of one connection, with strict heads and honest ends."""

    _requests = 0
    _head: bytes | None = None
    """What came of the present head; None = a body is read, or nothing is expected."""
    _silent = True
    """Whether nothing came since the request began."""
    _carrier: asyncio.Transport | None = None
    """The transport, also when it is lost."""
    _ahead: bytes | None = None
    """What came behind the head of a connection that has switched; None = it has not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A peer that is gone without a word is noticed after a minute."""
        super().connection_made(transport)
        self._carrier = cast("asyncio.Transport", transport)
        taken = transport.get_extra_info("socket")
        if taken is not None:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEP_ALIVE:
                taken.setsockopt(socket.IPPROTO_TCP, option, value)

    def set_response_params(self, **named: Any) -> None:
        """A request begins."""
        self._requests += 1
        self._head, self._silent = b"", True
        super().set_response_params(**named)

    def data_received(self, data: bytes) -> None:
        """Let the parser see heads that are well-formed only, and nothing that was not asked for."""
        if self._ahead is not None:
            self._ahead += data
            if len(self._ahead) > READ_BYTES and self.transport is not None:
                self.transport.pause_reading()
            return
        if data:
            self._silent = False
            wrong = self._unasked() if self._head is None else self._check(self._head + data)
            if wrong is not None:
                self.abort()
                self.set_exception(HttpProcessingError(code=502, message=wrong))
                return
        if self._ahead is None:
            super().data_received(data)
            return
        super().data_received(data[: len(data) - len(self._ahead)])
        self._upgraded = True  # otherwise aiohttp closes the connection behind an answer without a body

    def let_go(self) -> tuple[asyncio.Transport, bytes]:
        """The connection, and what came behind the head. aiohttp has nothing of it any more."""
        carrier, ahead = self._carrier, self._ahead
        assert carrier is not None, "it is connected"
        assert ahead is not None, "it has switched"
        self.transport = self._carrier = self._parser = None
        return carrier, ahead

    def _unasked(self) -> str | None:
        """Bytes behind the end of an answer would be read as the answer to the next request."""
        if self._payload is None or self._payload.is_eof():
            return "more came than one answer"
        return None

    def _check(self, head: bytes) -> str | None:
        """What is wrong with the head, as far as it is here."""
        while True:
            end = head.find(b"\r\n\r\n")
            here = head if end < 0 else head[: end + 2]
            if len(here) > MAX_HEAD_BYTES:
                return f"the head of the answer has more than {MAX_HEAD_BYTES} bytes"
            # The last byte may be one half of a line's end.
            lines = here.removesuffix(b"\r")
            if lines.count(b"\n") != lines.count(b"\r\n") or _FOLDED.search(lines):
                return "the head of the answer is not well-formed"
            if end < 0:
                self._head = head
                return None
            status = _STATUS.match(here)
            if status is None:
                return "what came is no answer of HTTP/1.1"
            if status[1] == b"101":
                self._ahead = head[end + 4 :]
            if status[1][:1] != b"1" or status[1] == b"101":
                self._head = None
                return None
            head = head[end + 4 :]  # an interim answer; the final one follows

    def set_exception(self, exc: BaseException, exc_cause: BaseException = _NO_CAUSE) -> None:
        """Say so when a kept connection had ended before it was used."""
        lost = isinstance(exc, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError)
        super().set_exception(_Stale() if lost and self._requests > 1 and self._silent else exc, exc_cause)

    def connection_lost(self, exc: BaseException | None) -> None:
        """A body without length and chunks ends with the connection, but a reset is no end."""
        if exc is not None and self._payload is not None and not self._payload.is_eof():
            self._payload.set_exception(aiohttp.ClientPayloadError(f"the connection was lost: {exc}"))
        super().connection_lost(exc)

    def close(self) -> None:
        """At once."""
        self.abort()
