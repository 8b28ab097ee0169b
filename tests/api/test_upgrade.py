"""Requests that ask for another protocol are answered in this one, whole, and nobody is told to install software."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from tests.api.conftest import KEY, body
from tests.api.test_review_listener import port, say

__all__ = ["port"]
UPGRADES = ["websocket", "h2c", "anything/1"]
LAST = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture(autouse=True)
def no_advice(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.DEBUG):
        yield
    assert not [line for line in caplog.messages if "pip" in line or "WebSocket" in line or "upgrade" in line.lower()]


async def statuses(port: int, *pieces: bytes) -> list[int]:
    """The statuses of all answers, until the server ends the connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", await say(port, *pieces))]


def head(method: str, path: str, upgrade: str, *more: str) -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: a", f"OPEN-SANDBOX-API-KEY: {KEY}", f"Upgrade: {upgrade}")
    return "\r\n".join(
        [*lines, "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABk", *more, "", ""]
    ).encode()


@pytest.mark.parametrize("upgrade", UPGRADES)
async def test_a_request_is_answered_as_if_it_had_not_asked(port: int, upgrade: str):
    asked = (("GET", "/health"), ("GET", "/v1/sandboxes"), ("GET", "/nowhere"), ("PUT", "/v1/sandboxes"))
    for method, path in asked:
        expected = {"/health": 200, "/nowhere": 404}.get(path, 200 if method == "GET" else 405)
        assert await statuses(port, head(method, path, upgrade), LAST) == [expected, 200], path
    many = [head(method, path, upgrade) for method, path in asked]
    assert await statuses(port, b"".join([*many, LAST])) == [200, 200, 404, 405, 200], "also in one piece"


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
async def test_its_body_is_its_body(port: int, upgrade: str, pieces: int, *, chunked: bool):
    """The body must not be lost, nor be read as the next request."""
    raw = json.dumps(body()).encode()
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(raw), raw) if chunked else raw
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(raw)}"
    begun = head("POST", "/v1/sandboxes", upgrade, "Content-Type: application/json", length)
    parts = [begun + sent] if pieces == 1 else [begun, sent]
    assert await statuses(port, *parts, LAST) == [202, 200]


async def test_a_body_that_looks_like_a_request_is_none(port: int):
    hidden = b"DELETE /v1/sandboxes/x HTTP/1.1\r\nHost: a\r\n\r\n"
    begun = head(
        "POST", "/v1/sandboxes", "websocket", "Content-Type: application/json", f"Content-Length: {len(hidden)}"
    )
    assert await statuses(port, begun, hidden, LAST) == [422, 200]


async def test_a_tunnel_is_refused(port: int):
    assert await statuses(port, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", LAST) == [400]


async def test_many_of_them_in_one_read(port: int):
    one = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    assert await statuses(port, one * 2000, LAST) == [200] * 2001
