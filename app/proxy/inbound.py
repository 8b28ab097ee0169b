"""The client's side of a stream: what it sends, and whether it is still there.

The relay needs more of the server than ASGI has words for, so it works behind our own protocol only
(`app.server.protocol`). That the client has left is told by the protocol itself: `receive()` is busy while a body is on
its way, and would cost each request a task that waits.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, TypeAlias

from app.proxy.heads import Headers
from app.proxy.pace import Passing
from app.proxy.refusals import invalid_header, malformed
from app.proxy.route import Route

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
EXTENSION: Final = "sandledger.exchange"
"""Where the scope of a request has its `Exchange`, when our own protocol serves it."""
_READS: Final = ("GET", "HEAD")
_LINGER_SECONDS: Final = 2.0
_LINGER_BYTES: Final = 8 * 1024 * 1024
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_LENGTH = re.compile(rb"[0-9]{1,18}")


class Exchange(Protocol):
    """What our server knows of one request and ASGI has no word for."""

    on_left: Callable[[], None] | None
    """Called when the client's connection is lost."""

    @property
    def route(self) -> Route:
        """Where the request goes."""
        ...

    @property
    def upgrade(self) -> bytes | None:
        """The protocol that the client asks for; None = HTTP only. Such a request has no body, and no other request
        follows on its connection.
        """
        ...

    def switch(self, head: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send the head of the answer that accepts. The connection leaves the server with what the client sent behind
        its own head.
        """
        ...

    @property
    def own_headers(self) -> Sequence[tuple[bytes, bytes]]:
        """What every answer of the server itself has. Those of a program have none of it."""
        ...

    @property
    def gone(self) -> bool:
        """Whether the client's connection is closed."""
        ...

    def abort(self) -> None:
        """Break the client's connection, so that what it has is seen to be no whole answer."""
        ...


def exchange_of(scope: Scope) -> Exchange | None:
    """None = the request is not for a sandbox."""
    extensions: dict[str, Any] | None = scope.get("extensions")
    return None if extensions is None else extensions.get(EXTENSION)


def value_of(headers: Headers, name: bytes) -> bytes:
    """The value of a header; empty = it is not there."""
    return next((value.strip() for each, value in headers if each == name), b"")


def request_id_of(headers: Headers) -> str:
    """The client's, or a new one."""
    sent = value_of(headers, b"x-request-id")
    return sent.decode() if _REQUEST_ID.fullmatch(sent) else os.urandom(16).hex()


class Inbound:
    """The client's side of a stream."""

    def __init__(self, exchange: Exchange, scope: Scope, receive: Receive, passing: Passing) -> None:
        self.exchange = exchange
        self.passing = passing
        self.scope = scope
        self.headers: Headers = scope["headers"]
        self.is_read = scope["method"] in _READS and exchange.upgrade is None
        """Whether it asks for a page or a file, and no more."""
        self.has_body = any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
            for name, value in self.headers
        )
        self.length: int | None = None
        self.ended = not self.has_body
        """Whether the whole body has come."""
        self.on_move: Callable[[], None] = _nothing
        """Called when a piece of the body came."""
        self._receive = receive
        self.request_id = request_id_of(self.headers)

    def one(self, name: bytes) -> bytes:
        """The value of a header; empty = it is not there."""
        return value_of(self.headers, name)

    def frame(self) -> None:
        """Find out how long the body is.

        Raises:
            Refusal: the server's parser takes it, but it could not be passed on as the same one request.
        """
        if sum(name == b"host" for name, _ in self.headers) > 1:
            raise invalid_header("The header host must not be repeated.")
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        lengths = [value.strip() for name, value in self.headers if name == b"content-length"]
        if codings and (lengths or codings != [b"chunked"] or self.scope["http_version"] != "1.1"):
            raise malformed("Transfer-Encoding must be chunked, alone, and without Content-Length.")
        if lengths:
            if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
                raise malformed("Content-Length must be one whole number.")
            self.length = int(lengths[0])

    async def body(self) -> AsyncGenerator[bytes]:
        """The pieces of the body. The first one is asked for when the sandbox is connected: that sends `100 Continue`
        to a client which waits for it.

        Before that comes an empty one. aiohttp holds the head back until there is a piece, and a program may answer a
        head whose body comes later, or never.
        """
        yield b""
        while not self.ended:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ConnectionResetError("the client left")
            self.ended = not message.get("more_body", False)
            self.on_move()
            if piece := message["body"]:
                await self.passing.into(len(piece))
                yield piece

    def still(self) -> None:
        """Nobody wants to know any more when a piece comes."""
        self.on_move = _nothing

    async def linger(self) -> None:
        """Throw away what comes of the body, within bounds, after the answer and before the connection is closed.

        A socket that is closed while the client still sends is reset, and the client may never read the answer. A
        client that waits for `100 Continue` sends nothing.
        """
        if self.one(b"expect"):
            return
        size = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self.ended and size <= _LINGER_BYTES:
                    message = await self._receive()
                    self.ended = message["type"] != "http.request" or not message.get("more_body", False)
                    size += len(message.get("body", b""))


def _nothing() -> None:
    """Until somebody wants to know."""
