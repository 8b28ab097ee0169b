"""The protocol of one connection: what uvicorn's lacks, before there is a request.

* A request's head is bounded. Parts of a header are joined as they come, so an endless one costs time with the square
  of its length and memory with its length, of a caller who has shown no key. Beyond `MAX_HEAD_BYTES` the connection
  ends with 431. The bound is checked once per read, so a head that arrives in one piece may be longer by one read
  (256 KiB); it bounds the harm and is no exact measure.
* A head has `head_within_seconds`. Half a head, or a connection that sends nothing, would otherwise be kept for ever,
  and as many of them as `limit_concurrency` allows would shut everybody else out.
* What frames a body is bounded as a head is: sizes of chunks with their extensions, and trailers. A connection that
  sends more than `MAX_HEAD_BYTES` of them without a byte of the body is cut. Trailers are thrown away; uvicorn would
  add them to the headers of the request.
* What follows an answer is bounded too, in case that something else than our application answered: beyond
  `MAX_SPILT_BYTES` the connection ends without a word. (Our application closes such connections itself, see
  `app.api.edge`.)
* What is no HTTP is refused in the shape of every other error, with a request id (nothing of the caller's is read:
  what would have been their id is in a head that could not be parsed).
* A request with `Upgrade` is answered as if it had none (RFC 9110, section 7.8: a server may ignore it). Some clients
  send it with the first request of a connection (`h2c`). The parser would take its body for bytes of the other
  protocol, and lose it or read it as the next request. So the head is parsed once more, without `Upgrade`.
* Only the handshake of a WebSocket to a sandbox is one: a GET of HTTP/1.1 without a body, for `websocket` alone, on a
  connection where no other request is under way. What follows its head is never parsed. It is held until the program
  has accepted, and then goes to it; otherwise the connection is closed after the answer. A client has to wait for the
  answer, so one that sends more than `MAX_AHEAD_BYTES` before it is cut off.
* A request beyond `limit_concurrency` first takes the place of a connection that has no request: one whose head is not
  complete, or an idle one. Otherwise callers without a key could shut everybody out by opening connections and saying
  nothing. When every other connection has a request, the answer is 503 with `Retry-After`, in the same shape. Requests
  that only wait are not counted; they have a limit of their own (`app.api.waiters`).
* Requests to sandboxes are streams that may stay open for hours. They are counted apart, and the relay has limits of
  its own for them (`app.proxy.limits`). So thousands of them take no place of the lifecycle API, and the API takes none
  of theirs. The relay gets what ASGI has no word for in an `Exchange`: where it goes, when the client leaves, and a
  way to break the connection.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from app.api.errors import Problem
from app.api.waiters import Waiters
from app.proxy.inbound import EXTENSION
from app.proxy.links import taken
from app.proxy.route import Route, route

MAX_HEAD_BYTES: Final = 64 * 1024
MAX_SPILT_BYTES: Final = 1024 * 1024
MAX_AHEAD_BYTES: Final = 64 * 1024
WEBSOCKET: Final = b"websocket"
MAX_STREAMS: Final = 10_000
"""More than the relay carries: it also has to answer those that it refuses."""
_KEEP_ALIVE: Final = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
_MALFORMED: Final = Problem(400, "GENERAL::BAD_REQUEST", "The request is not well-formed HTTP.")
_TOO_LARGE: Final = Problem(
    431, "GENERAL::HEADERS_TOO_LARGE", f"Request line and headers may have at most {MAX_HEAD_BYTES} bytes."
)
_CROWDED: Final = Problem(
    503,
    "GENERAL::TOO_MANY_CONNECTIONS",
    "The server has too many connections; try again.",
    headers=[("retry-after", "1")],
)
_REASONS: Final = {400: "Bad Request", 431: "Request Header Fields Too Large"}


def streams_of(state: ServerState) -> dict[HttpProtocol, asyncio.Task[Any] | None]:
    """The connections of a server that have a stream, with the task that serves it once it has begun."""
    return vars(state).setdefault("streams", {})


class HttpProtocol(HttpToolsProtocol):
    """One connection: uvicorn's protocol with the bounds that the module's docstring names."""

    head_within_seconds = 30.0
    waiters: ClassVar[Waiters | None] = None
    """The requests of this process that only wait."""
    domain: ClassVar[bytes] = b""
    """Of the hosts that name a sandbox and a port; empty = there are none."""
    idle_since: float = 0.0
    _head: int | None = 0
    """Bytes read of a head that is not complete; None while a body is read."""
    _framing: int = 0
    """Bytes read since the last byte of a body."""
    _spilt: int = 0
    """Bytes read of a body whose request has been answered."""

    ahead: bytearray | None = None
    """What came behind the head of a handshake; None = there was none."""
    _exchange: _Exchange | None = None
    """The stream that is served now. uvicorn marks the last request of a connection when it is lost, and that may be
    another one, which waits behind this."""
    _prepared = False
    _deadline: asyncio.TimerHandle | None = None
    """Until when the present head has to be complete; between requests it is uvicorn's keep-alive that ends it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """As uvicorn makes it. uvicorn's own limit is switched off, because its refusal is plain text."""
        super().__init__(*arguments, **named)
        self._limit, self.limit_concurrency = self.limit_concurrency, None
        self._served = cast("Any", self).app
        self._streams = streams_of(self.server_state)
        self._unread: deque[memoryview] = deque()
        """What the parser has yet to be given of the present read."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """The first head is awaited."""
        super().connection_made(transport)
        self.idle_since = asyncio.get_running_loop().time()
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited any more."""
        self._end_head()
        self._streams.pop(self, None)
        super().connection_lost(exc)
        if self._exchange is not None:
            self._exchange.leave()

    def _begin_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.head_within_seconds, self.transport.close)

    def _end_head(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def data_received(self, data: bytes) -> None:
        """Take what the client sent."""
        if self.ahead is not None:
            self.ahead += data
            if len(self.ahead) > MAX_AHEAD_BYTES:
                self.transport.abort()
            return
        if self._head is not None:
            self._head += len(data)
        self._framing += len(data)
        self._unread.append(memoryview(data))
        while self._unread and not self.transport.is_closing():
            self._reading = self._unread.popleft()
            super().data_received(cast("bytes", self._reading))  # the parser takes any buffer
        if self.transport.is_closing():
            return
        if self._head is not None:
            if self._head > MAX_HEAD_BYTES:
                self.logger.warning("A request with more than %s bytes of headers was refused.", MAX_HEAD_BYTES)
                self._refuse(_TOO_LARGE)
            elif self._head > 0:
                self._begin_head()
        elif self._framing > MAX_HEAD_BYTES:
            self.transport.abort()
        elif self.cycle.response_complete:
            self._spilt += len(data)
            if self._spilt > MAX_SPILT_BYTES:
                self.transport.close()

    def _should_upgrade(self) -> bool:
        """Whether the head that was parsed last asks for another protocol, so that it has to be parsed again.

        CONNECT is none of these: its target is no path, so it is refused as malformed.
        """
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def handle_websocket_upgrade(self) -> None:
        """Give the parser the head without `Upgrade`, and then what came behind it. uvicorn calls this in its handler
        of the parser's exception, which knows where the head ended.
        """
        ended = cast("httptools.HttpParserUpgrade", sys.exception()).args[0]
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode(), b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                head += [name, b": ", value, b"\r\n"]
        behind = self._reading[ended:]
        if self._is_handshake():
            self.ahead = bytearray(behind)
        else:
            self._unread.appendleft(behind)
        self._unread.appendleft(memoryview(b"".join([*head, b"\r\n"])))
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own

    def _route(self) -> Route | None:
        host = next((value for name, value in self.headers if name == b"host"), b"") if self.domain else b""
        return route(self.url, host.strip(), self.domain)

    def _is_handshake(self) -> bool:
        """Whether the head that was parsed last begins a WebSocket to a sandbox."""
        named = [(name, value.strip().lower()) for name, value in self.headers]
        has_body = any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in named
        )
        return (
            self.is_idle
            and not has_body
            and (self.parser.get_method(), self.parser.get_http_version()) == (b"GET", "1.1")
            and [value for name, value in named if name == b"upgrade"] == [WEBSOCKET]
            and self._route() is not None
        )

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, and no trailer."""
        if self._head is not None:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Pass it on."""
        self._framing = 0
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Stop the timer of the head; the request begins."""
        if self._should_upgrade():
            return
        self._end_head()
        self._head, self._framing, self._spilt = None, 0, 0
        found = self._route()
        if found is None:
            self.app: Any = _crowded if self._is_crowded() else self._served
            super().on_headers_complete()
        else:
            self._begin_stream(found)
        # What the access log shows of a request, also of one that names no sandbox.
        self.scope["query_string"] = taken(self.scope["query_string"])[0]

    def _begin_stream(self, found: Route) -> None:
        self.app = _crowded if len(self._streams) >= MAX_STREAMS else self._stream
        if self.is_idle and self.app == self._stream:
            self._streams[self] = None  # now: its task, which is counted already, begins later
        super().on_headers_complete()
        cycle = self.cycle
        if self.app == self._stream:
            cycle.default_headers = []  # the program in the sandbox has its own Date
        cycle.keep_alive = cycle.keep_alive and self.ahead is None
        cast("Any", self.scope)["extensions"] = {EXTENSION: _Exchange(found, self, cycle)}

    def let_go(self) -> bytes:
        """The connection is another's from now on. What the client sent behind the head of its handshake."""
        assert self.ahead is not None, "there was a handshake"
        self.connections.discard(self)
        self._streams.pop(self, None)
        # What names this object in a circle would stay in memory until the garbage collector comes by.
        bare: Any = self
        bare.app = bare.parser = bare.cycle = bare.scope = None
        return bytes(self.ahead)

    async def _stream(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve the request, counted among the streams."""
        self._streams[self] = asyncio.current_task()
        exchange = self._exchange = scope["extensions"][EXTENSION]
        if not self._prepared:
            self._prepared = True
            _prepare(self.transport)
        try:
            await self._served(scope, receive, send)
        except asyncio.CancelledError:
            # The server stops. uvicorn would log a traceback for each stream, and end what is half sent as if it was
            # whole.
            exchange.abort()
        finally:
            self._exchange = None
            self._streams.pop(self, None)
            del scope["extensions"]  # the exchange and the scope name each other, see `let_go`

    def _is_crowded(self) -> bool:
        if self._limit is None:
            return False
        limit = self._limit + len(self._streams) + (0 if self.waiters is None else self.waiters.count)
        if len(self.connections) <= limit and len(self.tasks) < limit:
            return False
        return len(self.tasks) >= limit or not self._take_a_place()

    def _take_a_place(self) -> bool:
        """Close the connection that has waited longest without a request, if there is one."""
        others = [each for each in cast("set[HttpProtocol]", self.connections) if each is not self]
        idle = [each for each in others if each.is_idle and not each.transport.is_closing()]
        if not idle:
            return False
        min(idle, key=lambda each: each.idle_since).transport.close()
        return True

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way on this connection."""
        cycle: Any = self.cycle  # None before the first request
        return cycle is None or bool(cycle.response_complete)

    def on_response_complete(self) -> None:
        """Idle again, unless another request waits already."""
        self.idle_since = asyncio.get_running_loop().time()
        super().on_response_complete()

    def on_message_complete(self) -> None:
        """The next head begins."""
        if self._should_upgrade():
            return
        self._head = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - theirs
        """Answer 400 to bytes that are not HTTP."""
        self._refuse(_MALFORMED)

    def _refuse(self, problem: Problem) -> None:
        headers = [*self.server_state.default_headers, *_headers(problem)]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(
            f"HTTP/1.1 {problem.status} {_REASONS[problem.status]}\r\n".encode() + head + b"\r\n" + problem.body
        )
        self.transport.close()
        if not self.is_idle:
            self.cycle.disconnected = True  # else uvicorn reports that there was no answer


class _Exchange:
    """One request, as the relay sees the server (`app.proxy.inbound.Exchange`)."""

    __slots__ = ("_cycle", "_protocol", "_transport", "on_left", "route", "upgrade")

    def __init__(self, found: Route, protocol: HttpProtocol, cycle: Any) -> None:
        self.route = found
        self.upgrade = None if protocol.ahead is None else WEBSOCKET
        self.on_left: Callable[[], None] | None = None
        self._protocol = protocol
        self._transport = protocol.transport
        self._cycle = cycle

    @property
    def own_headers(self) -> Sequence[tuple[bytes, bytes]]:
        """`Date` and `Server`."""
        return self._protocol.server_state.default_headers

    @property
    def gone(self) -> bool:
        """Whether the client's connection is closed."""
        return self._transport.is_closing()

    def switch(self, head: bytes) -> tuple[asyncio.Transport, bytes]:
        """Send the head, and let go of the connection."""
        self._cycle.disconnected = True  # else uvicorn reports that there was no answer
        self._transport.write(head)
        return self._transport, self._protocol.let_go()

    def leave(self) -> None:
        """The client's connection is lost."""
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self.on_left is not None:
            self.on_left()

    def abort(self) -> None:
        """Break the connection. What the kernel has already is still sent; the framing shows that it is not all."""
        self._cycle.disconnected = True  # else uvicorn reports an answer that was not completed
        self._transport.abort()


def _prepare(transport: asyncio.Transport) -> None:
    """Make a connection fit for a stream.

    Each piece goes out at once: asyncio leaves that to the kernel for sockets that do not name their protocol, and the
    kernel waits for the peer, 40 ms, before it sends the second of two pieces. And a client that is gone without a word
    is noticed after a minute: nothing else tells it of a stream that is open and silent.
    """
    taken = transport.get_extra_info("socket")
    if taken is not None and taken.family in (socket.AF_INET, socket.AF_INET6):
        taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            taken.setsockopt(socket.IPPROTO_TCP, option, value)


def _headers(problem: Problem) -> list[tuple[bytes, bytes]]:
    return [
        *((name.encode(), value.encode()) for name, value in problem.headers),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(problem.body)).encode()),
        (b"x-request-id", uuid.uuid4().hex.encode()),
        (b"connection", b"close"),
    ]


async def _crowded(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": _CROWDED.status, "headers": _headers(_CROWDED)})
    await send({"type": "http.response.body", "body": _CROWDED.body, "more_body": False})
