"""The HTTP parser's protocol, with four manners that uvicorn's lacks.

* A request's head is bounded. Parts of a header are joined as they come, so an endless one costs time with the square
  of its length and memory with its length, of a caller who has shown no key. Beyond `MOST_HEAD` bytes the connection
  ends with 431. The bound is looked at once per read, so a head that arrives in one piece may be longer by one read
  (256 KiB); it is a bound on harm, not a measure.
* A head has `head_within_s` seconds. Half a head, or a connection that says nothing, would otherwise be kept for ever,
  and as many of them as `limit_concurrency` allows would shut everybody else out.
* What follows an answer is bounded too: the rest of a body that nobody reads, such as that of a request without a key,
  and trailers, which are headers again. Beyond `MOST_SPILT` bytes the connection ends without a word.
* What is no HTTP is refused in the shape of every other error, with a request id (nothing of the caller's is read:
  what would have been their id is in a head that could not be parsed).

h11, the other parser that the settings allow, bounds a head at 64 KiB by itself.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import Problem

MOST_HEAD: Final = 64 * 1024
MOST_SPILT: Final = 1024 * 1024
_MALFORMED: Final = Problem(400, "GENERAL::BAD_REQUEST", "The request is not well-formed HTTP.")
_TOO_LARGE: Final = Problem(
    431, "GENERAL::HEADERS_TOO_LARGE", f"Request line and headers may have at most {MOST_HEAD} bytes."
)
_REASONS: Final = {400: "Bad Request", 431: "Request Header Fields Too Large"}


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    head_within_s = 30.0
    _head: int | None = 0
    """Bytes read of a head that is not complete; None while a body is read."""
    _spilt: int = 0
    """Bytes read of a body whose request has been answered."""

    _deadline: asyncio.TimerHandle | None = None
    """Until when the present head has to be complete; between requests it is uvicorn's keep-alive that ends it."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The first head is awaited."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._end_head()
        super().connection_lost(exc)

    def _begin_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_within_s, self.transport.close)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def data_received(self, data: bytes) -> None:
        """A read."""
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._head is not None:
            if self._head > MOST_HEAD:
                self.logger.warning("A request with more than %s bytes of headers was refused.", MOST_HEAD)
                self._refuse(_TOO_LARGE)
            elif self._head > 0:
                self._begin_head()
        elif self.cycle.response_complete:
            self._spilt += len(data)
            if self._spilt > MOST_SPILT:
                self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is over."""
        self._end_head()
        self._head, self._spilt = None, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next head begins."""
        self._head = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - theirs
        """What came is no HTTP."""
        self._refuse(_MALFORMED)

    def _refuse(self, problem: Problem) -> None:
        body = problem.body
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"x-request-id", uuid.uuid4().hex.encode()),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(
            f"HTTP/1.1 {problem.status} {_REASONS[problem.status]}\r\n".encode() + head + b"\r\n" + body
        )
        self.transport.close()
