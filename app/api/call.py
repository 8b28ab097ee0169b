"""One request from its head to its answer: what the outer layer and the handlers both need to know of it.

A `Call` is made by `app.api.edge` before any routing, so it exists for every answer, also for one to a path that does
not exist. It counts what arrives of the body: an answer may only leave the connection open when the whole body has
arrived, because the next request begins where the body ends.

When the process is asked to stop, nobody waits for bodies any more: a request whose body is not here is answered 503 at
once. Otherwise slow clients would hold up the stop until uvicorn cancels their requests, which they see as 500.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol, cast
from uuid import UUID

from litestar.types import HTTPScope, Receive, ReceiveMessage, Scope, WebSocketScope

from app import __version__
from app.api.auth import API_KEY, Principal
from app.api.errors import STOPPING, Problem
from app.domain.stream import Meta

REQUEST_ID: Final = "x-request-id"
SINGLE: Final = frozenset({API_KEY, "idempotency-key", REQUEST_ID, "content-type", "content-length", "host"})
"""Headers that must not be repeated. Others may be, and then count as one list (RFC 9110, section 5.3)."""
KEY: Final = "sandledger.call"
"""Where the scope holds the call."""
LINGER_SECONDS: Final = 2.0
LINGER_BYTES: Final = 8 * 1024 * 1024
_PENDING_BYTES = 64 * 1024
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Limits(Protocol):
    """What a body may have: bytes, and seconds on its way."""

    @property
    def body_limit(self) -> int:
        """Most bytes of a body."""
        ...

    @property
    def body_idle_seconds(self) -> float:
        """Between two pieces of it."""
        ...

    @property
    def body_total_seconds(self) -> float:
        """Longest time from the first byte of a body to its last."""
        ...

    @property
    def stopping(self) -> asyncio.Event:
        """Set when the process is asked to stop; no body is waited for then."""
        ...


class Call:
    """Lives as long as the request."""

    __slots__ = (
        "_receive",
        "ended",
        "headers",
        "joined",
        "limits",
        "principal",
        "problem",
        "repeated",
        "request_id",
        "sandbox_id",
        "scope",
        "stalled",
    )

    def __init__(self, scope: HTTPScope | WebSocketScope, receive: Receive, limits: Limits) -> None:
        """Reads the head only."""
        self.limits = limits
        self.scope = scope
        self._receive = receive
        self.headers: dict[str, str] = {}
        self.repeated: str | None = None
        """A header of `SINGLE` that stands more than once."""
        self.joined = False
        """Whether another header was repeated, so that `headers` says it differently than the scope."""
        self.principal: Principal | None = None
        """Who calls; None until the gate has let the request in, and on open paths."""
        self.problem: Problem | None = None
        """What the answer refuses with, if it does."""
        self.sandbox_id: UUID | None = None
        """The sandbox that an earlier create with this Idempotency-Key made; other commands name theirs in the path."""
        self.stalled = False
        """Whether the rest of the body is not waited for: it stopped coming, or the process stops."""
        headers = self.headers
        for raw_name, raw_value in scope["headers"]:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            if name in headers:
                if name in SINGLE:
                    self.repeated = name
                self.joined = True
                value = f"{headers[name]}, {value}"
            headers[name] = value
        sent = headers.get(REQUEST_ID, "").strip()
        self.request_id = sent if sent and _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        """The client's own if it is 1 to 128 visible ASCII characters, else a new one."""
        self.ended = "transfer-encoding" not in headers and headers.get("content-length", "0").strip() == "0"
        """Whether the whole body has arrived."""

    @property
    def who(self) -> Principal:
        """Who calls. Only behind the gate, and not on open paths."""
        assert self.principal is not None, "the gate lets nobody through without a principal"
        return self.principal

    @property
    def client(self) -> str | None:
        """Address of the socket's other end. X-Forwarded-For is not believed: anybody can write it."""
        peer = self.scope["client"]
        return peer[0] if peer else None

    def meta(self, idempotency_key: str | None = None) -> Meta:
        """What is stored beside every event that this request leads to."""
        digest = None if idempotency_key is None else hashlib.sha256(idempotency_key.encode()).hexdigest()
        return Meta(self.who.actor, __version__, self.request_id, client=self.client, idempotency_key=digest)

    # Body

    async def receive(self) -> ReceiveMessage:
        """ASGI's `receive`, noting the end of the body."""
        message = await self._receive()
        self.ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def read(self) -> bytes:
        """The whole body.

        Raises:
            Problem: 413, 408, 503 when the process stops, or 400 when the client leaves.
        """
        chunks: list[bytes] = []
        size = 0
        limit = self.limits.body_limit
        until = asyncio.get_running_loop().time() + self.limits.body_total_seconds
        while True:
            message = await self._piece(until)
            if message["type"] != "http.request":
                raise Problem(400, "GENERAL::BAD_REQUEST", "The connection ended before the body did.")
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise too_large(limit)
            chunks.append(chunk)
            if self.ended:
                return b"".join(chunks)

    async def _piece(self, until: float) -> ReceiveMessage:
        now, idle = asyncio.get_running_loop().time(), self.limits.body_idle_seconds
        try:
            async with self._waiting(min(now + idle, until)):
                return await self.receive()
        except TimeoutError:
            self.stalled = True
            if self.limits.stopping.is_set():
                raise _stopping() from None
            total = self.limits.body_total_seconds
            raise Problem(
                408,
                "GENERAL::REQUEST_TIMEOUT",
                f"The body did not arrive in time: {idle:g} s for each piece, {total:g} s in all.",
            ) from None

    @asynccontextmanager
    async def _waiting(self, until: float) -> AsyncGenerator[None]:
        """Wait for bytes of the client: until that time of the loop, or until the process is asked to stop.

        Raises:
            TimeoutError: for either. What has arrived already is taken also when the process stops.
        """
        async with asyncio.timeout_at(until) as timer:
            watch = asyncio.create_task(_expire(timer, self.limits.stopping))
            try:
                yield
            finally:
                watch.cancel()

    async def arrived(self) -> bool:
        """Take what of the body is here already, without waiting. Says whether that was the rest of it.

        A client that sent a small body is refused without losing its connection. One that waits for `100 Continue` has
        sent none; taking a piece would ask it to begin.
        """
        if not self.ended and not self.stalled and "expect" not in self.headers:
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await self._discard(_PENDING_BYTES)
        return self.ended

    async def linger(self) -> None:
        """Throw the rest of the body away, within bounds, after the answer and before the connection is closed.

        A socket that is closed while the client still sends is reset, and the client may never read the answer.
        """
        if not self.stalled:
            with suppress(TimeoutError):
                async with self._waiting(asyncio.get_running_loop().time() + LINGER_SECONDS):
                    await self._discard(LINGER_BYTES)

    async def _discard(self, most: int) -> None:
        size = 0
        while not self.ended and size <= most:
            message = await self.receive()
            size += len(message.get("body", b"")) if message["type"] == "http.request" else 0

    async def disconnected(self) -> None:
        """Return when the client has gone. Only after the body was read, or where there is none."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def _expire(timer: asyncio.Timeout, stopping: asyncio.Event) -> None:
    """End a wait when the process is asked to stop."""
    await stopping.wait()
    if not timer.expired():
        timer.reschedule(asyncio.get_running_loop().time())


def _stopping() -> Problem:
    return Problem(
        503,
        STOPPING,
        "The server stops, and the body of the request has not arrived; send it again.",
        headers=[("retry-after", "1")],
    )


def uuid_in(text: str) -> UUID | None:
    """The sandbox id that a path names; None when it is none."""
    return UUID(text) if _UUID.fullmatch(text) else None


def too_large(limit: int) -> Problem:
    """413, for a body that has, or announces, more bytes than `limit`."""
    return Problem(413, "GENERAL::BODY_TOO_LARGE", f"A body may have at most {limit} bytes.")


def call_of(scope: Scope) -> Call:
    """The call that a request inside the router belongs to."""
    return cast("dict[str, Call]", cast("object", scope))[KEY]
