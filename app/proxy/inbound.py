"""The client's side of a stream: what it sends, and whether it is still there.

`receive()` has one reader at a time. While a body is on its way that is whoever sends the body on; before, where there
is none, and after it, `watch` reads and only waits for the end of the connection.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any, Final, Protocol, TypeAlias

from app.proxy.heads import Headers
from app.proxy.refusals import invalid_header, malformed

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
EXTENSION: Final = "sandledger.exchange"
"""Where the scope of a request has its `Exchange`, when our own protocol serves it."""
_LINGER_SECONDS: Final = 2.0
_LINGER_BYTES: Final = 8 * 1024 * 1024
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_LENGTH = re.compile(rb"[0-9]{1,18}")


class Exchange(Protocol):
    """What the server knows of one request and ASGI has no word for."""

    @property
    def target(self) -> bytes:
        """The request target as it came."""
        ...

    @property
    def gone(self) -> bool:
        """Whether the client's connection is closed."""
        ...

    def abort(self) -> None:
        """Break the client's connection, so that what it has is seen to be no whole answer."""
        ...


def exchange_of(scope: Scope) -> Exchange | None:
    """None where another server than ours serves the request."""
    extensions: dict[str, Any] | None = scope.get("extensions")
    return None if extensions is None else extensions.get(EXTENSION)


class Inbound:
    """The client's side of a stream."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.scope = scope
        self.headers: Headers = scope["headers"]
        self.exchange: Exchange | None = exchange_of(scope)
        self.has_body = any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
            for name, value in self.headers
        )
        self.length: int | None = None
        self.ended = not self.has_body
        """Whether the whole body has come."""
        self.left = False
        """Whether the client has."""
        self.on_move: Callable[[], None] = _nothing
        """Called when a piece of the body came."""
        self.on_left: Callable[[], None] = _nothing
        self._receive = receive
        self._closed = False
        self._watch: asyncio.Task[None] | None = None
        sent = self.one(b"x-request-id")
        self.request_id = sent.decode() if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex

    def one(self, name: bytes) -> bytes:
        """The value of a header; empty = it is not there."""
        return next((value.strip() for each, value in self.headers if each == name), b"")

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

    def watch(self) -> None:
        """Notice from now on when the client leaves."""
        if not self._closed:
            self._watch = asyncio.create_task(self._until_left())

    async def _until_left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._note_left()

    def _note_left(self) -> None:
        self.left = True
        self.on_left()

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
                self._note_left()
                raise ConnectionResetError("the client left")
            self.ended = not message.get("more_body", False)
            self.on_move()
            if message["body"]:
                yield message["body"]
        self.watch()

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

    def close(self) -> None:
        """Stop watching."""
        self._closed = True
        self.on_left = self.on_move = _nothing
        if self._watch is not None:
            self._watch.cancel()


def _nothing() -> None:
    """Until somebody wants to know."""
