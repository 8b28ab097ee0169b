"""One request, as the endpoints see it: who calls, what they sent, and whether they are still there.

Header and query values are parsed on demand and strictly: what does not follow the rule is refused with the name of
the place, never with its content.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import parse_qsl
from uuid import UUID

from litestar.types import HTTPScope, Receive, ReceiveMessage

from app import __version__
from app.api.errors import INVALID_HEADER, Problem, wrong
from app.domain.sandbox.decide import unknown
from app.domain.sandbox.events import Actor, Meta
from app.errors import NotFound

API_KEY: Final = "open-sandbox-api-key"
IDEMPOTENCY_KEY: Final = "idempotency-key"
REQUEST_ID: Final = "x-request-id"
SINGLE: Final = frozenset({API_KEY, IDEMPOTENCY_KEY, REQUEST_ID, "content-type", "content-length"})
"""Headers that may stand once. Others may be repeated and then count as one list (RFC 9110, section 5.3)."""

_VISIBLE = re.compile(r"[\x21-\x7e]{1,255}")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_LINGER_BYTES = 8 * 1024 * 1024
_LINGER_S = 2.0
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


class Call:
    """Lives as long as the request."""

    __slots__ = (
        "_idle",
        "_limit",
        "_query",
        "actor",
        "command",
        "headers",
        "problem",
        "receive",
        "repeated",
        "request_id",
        "sandbox_id",
        "scope",
    )

    def __init__(self, scope: HTTPScope, receive: Receive, actor: Actor, limit: int, idle: float = 30) -> None:
        """`actor` is who it will be once the key has been found right.

        `limit` bounds the body in bytes, `idle` the seconds between two pieces of it.
        """
        self.scope = scope
        self.receive = receive
        self.actor = actor
        self.headers: dict[str, str] = {}
        self.repeated: str | None = None
        """A header that must stand once and does not."""
        self.command: str | None = None
        """Method and route of a command whose refusal is recorded; None for reads."""
        self.sandbox_id: UUID | None = None
        self.problem: Problem | None = None
        """What the answer refuses with, if it does."""
        self._limit = limit
        self._idle = idle
        self._query: dict[str, list[str]] | None = None
        headers = self.headers
        for raw_name, raw_value in scope["headers"]:
            name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
            if name in headers:
                if name in SINGLE:
                    self.repeated = name
                value = f"{headers[name]}, {value}"
            headers[name] = value
        sent = headers.get(REQUEST_ID, "").strip()
        self.request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        """The client's own if it is 1 to 128 visible ASCII characters, else a new one."""

    @property
    def prefix(self) -> str:
        """`/v1`, or nothing on the un-prefixed mount."""
        return "/v1" if self.scope["path"].startswith("/v1/") else ""

    @property
    def client(self) -> str | None:
        """Address of the socket's other end. X-Forwarded-For is not believed: anybody can write it."""
        peer = self.scope["client"]
        return peer[0] if peer else None

    def meta(self, idempotency_key: str | None = None) -> Meta:
        """What stands beside every event that this request leads to."""
        digest = None if idempotency_key is None else hashlib.sha256(idempotency_key.encode()).hexdigest()
        return Meta(self.actor, __version__, self.request_id, client=self.client, idempotency_key=digest)

    def sandbox(self) -> UUID:
        """The id in the path.

        Raises:
            NotFound: it is none, so no sandbox can have it.
        """
        if self.sandbox_id is None:
            raise NotFound(unknown("").code, "Sandbox ids are UUIDs; there is no sandbox with the id in this path.")
        return self.sandbox_id

    def find_sandbox(self, parameters: dict[str, Any]) -> None:
        """Take the id from the path, if it has one."""
        text = parameters.get("sandboxId", "")
        if _UUID.fullmatch(text):
            self.sandbox_id = UUID(text)

    def idempotency_key(self) -> str | None:
        """The key, if the client sent one."""
        key = self.headers.get(IDEMPOTENCY_KEY)
        if key is not None and not _VISIBLE.fullmatch(key):
            raise Problem(400, INVALID_HEADER, "Idempotency-Key must be 1 to 255 visible ASCII characters.")
        return key

    # Body

    async def check_length(self) -> None:
        """Refuse by the announced length, before anything is kept."""
        announced = self.headers.get("content-length")
        if announced is not None and announced.isdecimal() and int(announced[:18]) > self._limit:
            raise await self._too_large()

    async def body(self) -> bytes:
        """All of it, also when it comes in chunks of unannounced length."""
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._next_piece()
            if message["type"] != "http.request":
                raise Problem(400, "GENERAL::BAD_REQUEST", "The connection ended before the body did.")
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size > self._limit:
                raise await self._too_large(ended=not more)
            chunks.append(chunk)
            if not more:
                return b"".join(chunks)

    async def _next_piece(self) -> ReceiveMessage:
        try:
            async with asyncio.timeout(self._idle):
                return await self.receive()
        except TimeoutError:
            raise Problem(
                408,
                "GENERAL::REQUEST_TIMEOUT",
                f"Nothing of the body came for {self._idle:g} s.",
                headers=[("connection", "close")],
            ) from None

    async def _too_large(self, *, ended: bool = False) -> Problem:
        """413. A socket that is closed while the client still sends is reset, and the answer may never be read; so
        what is not absurdly large is read first, and thrown away.
        """
        try:
            async with asyncio.timeout(_LINGER_S):
                ended = ended or await self._thrown_away(_LINGER_BYTES)
        except TimeoutError:
            pass
        return Problem(
            413,
            "GENERAL::BODY_TOO_LARGE",
            f"A body may have at most {self._limit} bytes.",
            headers=[] if ended else [("connection", "close")],
        )

    async def _thrown_away(self, most: int) -> bool:
        """Read on. Says whether that was all."""
        size = 0
        while size <= most:
            message = await self.receive()
            if message["type"] != "http.request":
                return False
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                return True
        return False

    async def disconnected(self) -> None:
        """Return when the client has gone. Only after the body was read, or where there is none."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    # Query

    @property
    def query(self) -> dict[str, list[str]]:
        """Decoded; 422 when it is no UTF-8."""
        if self._query is None:
            self._query = {}
            raw = self.scope["query_string"]
            if raw:
                try:
                    pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=1000)
                except ValueError:
                    raise wrong("query", rule="must be percent-encoded UTF-8 with at most 1000 fields") from None
                for name, value in pairs:
                    self._query.setdefault(name, []).append(value)
        return self._query

    def many(self, name: str) -> Sequence[str] | None:
        """A repeatable parameter; None when absent."""
        return self.query.get(name)

    def one(self, name: str) -> str | None:
        """A parameter that may stand once."""
        values = self.query.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise wrong("query", name, rule="may be given once")
        return values[0]

    def flag(self, name: str) -> bool:
        """A boolean parameter, false when absent."""
        text = self.one(name)
        if text is None:
            return False
        if (value := _TRUTH.get(text.lower())) is None:
            raise wrong("query", name, rule="must be true or false")
        return value

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        """A whole number within bounds."""
        text = self.one(name)
        if text is None:
            return default
        if not _WHOLE.fullmatch(text) or not low <= int(text) <= high:
            raise wrong("query", name, rule=f"must be a whole number from {low} to {high}")
        return int(text)
