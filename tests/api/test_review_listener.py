"""What reaches the server before there is a request: bytes on a socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager

import pytest
import uvicorn
from litestar import Litestar

from app.server.protocol import MAX_HEAD_BYTES, MAX_SPILT_BYTES, HttpProtocol
from tests.api.conftest import KEY, body

_READ = 256 * 1024
"""What a transport hands over at once, at most."""


class _Server(uvicorn.Server):
    """Signals belong to pytest."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _Hasty(HttpProtocol):
    head_within_seconds = 0.3


@asynccontextmanager
async def listening(
    app: Litestar, protocol: type[HttpProtocol] = HttpProtocol, limit_concurrency: int | None = None
) -> AsyncGenerator[int]:
    """Port of the application behind our protocol."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = _Server(
        uvicorn.Config(
            app, http=protocol, log_config=None, lifespan="off", ws="none", limit_concurrency=limit_concurrency
        )
    )
    listener.listen()
    serving = asyncio.create_task(server.serve([listener]))
    yield listener.getsockname()[1]
    server.should_exit = True
    await serving


@pytest.fixture
async def port(app: Litestar) -> AsyncIterator[int]:
    """Of the application behind our protocol."""
    async with listening(app, HttpProtocol) as taken:
        yield taken


async def say(port: int, *pieces: bytes) -> bytes:
    """Everything the server says until it ends the connection, or breaks it while we still talk."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    heard = b""
    try:
        async with asyncio.timeout(20):
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
            except ConnectionError:
                pass
            while more := await reader.read(_READ):
                heard += more
    except ConnectionError:
        pass
    finally:
        writer.close()
    return heard


def _parsed(heard: bytes) -> tuple[int, dict[str, str], dict[str, str]]:
    head, _, body = heard.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    assert int(headers["content-length"]) == len(body)
    return int(status.split()[1]), headers, json.loads(body)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /v1/\xff HTTP/1.1\r\n\r\n",
        b"FOO / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Request-ID: a\x0bb\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ",
        b"POST / HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_like_everything_else(port: int, sent: bytes):
    status, headers, problem = _parsed(await say(port, sent))
    assert (status, problem["code"]) == (400, "GENERAL::BAD_REQUEST")
    assert len(headers["x-request-id"]) == 32
    assert (headers["connection"], headers["content-type"]) == ("close", "application/json")


@pytest.mark.parametrize("start", [b"GET /", b"GET /health HTTP/1.1\r\nX-A: ", b"GET /health HTTP/1.1\r\n"])
async def test_a_head_has_an_end(port: int, start: bytes):
    more = b"a: b\r\n" * 1000 if start.endswith(b"\r\n") else b"a" * 6000
    heard = await say(port, start, *[more] * ((MAX_HEAD_BYTES + 2 * _READ) // len(more)))
    if heard:  # else our own words on the way broke the connection before theirs arrived
        status, headers, problem = _parsed(heard)
        assert (status, problem["code"]) == (431, "GENERAL::HEADERS_TOO_LARGE")
        assert "x-request-id" in headers


async def test_a_head_of_some_size_is_fine(port: int):
    sent = b"GET /health HTTP/1.1\r\nConnection: close\r\nX-A: " + b"a" * (MAX_HEAD_BYTES - 100) + b"\r\n\r\n"
    assert _parsed(await say(port, sent[:9], sent[9:]))[0] == 200


async def test_heads_are_counted_one_by_one(port: int):
    one = b"GET /health HTTP/1.1\r\nX-A: " + b"a" * (MAX_HEAD_BYTES // 2) + b"\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    assert (await say(port, one, one, one, one, last)).count(b"HTTP/1.1 200 OK") == 5


async def test_a_body_is_not_counted_as_a_head(port: int):
    long = b" " * (4 * MAX_HEAD_BYTES)
    head = f"OPEN-SANDBOX-API-KEY: {KEY}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    head += f"Content-Length: {len(long)}\r\n\r\n"
    assert _parsed(await say(port, b"POST /v1/sandboxes HTTP/1.1\r\n", head.encode(), long))[0] == 422


@pytest.mark.parametrize(
    ("head", "rest"),
    [
        (b"Content-Length: 1000000000\r\n\r\n", b"x" * 10_000),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"2710\r\n" + b"x" * 10_000 + b"\r\n"),
        (b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ", b"x" * 10_000),
    ],
)
async def test_nobody_listens_for_ever_to_who_was_refused(port: int, head: bytes, rest: bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/sandboxes HTTP/1.1\r\n" + head)
    try:
        async with asyncio.timeout(20):
            assert (await reader.read(_READ)).startswith(b"HTTP/1.1 401")
            with pytest.raises(ConnectionError):
                await _pour(writer, rest, 100 * MAX_SPILT_BYTES // len(rest))
    finally:
        writer.close()


async def _pour(writer: asyncio.StreamWriter, piece: bytes, times: int) -> None:
    for _ in range(times):
        writer.write(piece)
        await writer.drain()


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: a\r\nX-A"])
async def test_half_a_head_is_not_waited_for_for_ever(app: Litestar, sent: bytes):
    whole = b"GET /health HTTP/1.1\r\n\r\n"
    async with listening(app, _Hasty) as port:
        assert await say(port, sent) == b""
        if sent:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(20):
                writer.write(whole)
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
                writer.write(sent)
                assert await reader.read() == b""
            writer.close()


async def test_an_answer_may_take_longer_than_a_head(app: Litestar):
    sent = json.dumps(body()).encode()
    head = f"OPEN-SANDBOX-API-KEY: {KEY}\r\nContent-Length: {len(sent)}\r\nConnection: close\r\n"
    head += "Content-Type: application/json\r\nPrefer: wait=1\r\n\r\n"
    async with listening(app, _Hasty) as port:
        assert _parsed(await say(port, b"POST /v1/sandboxes HTTP/1.1\r\n" + head.encode() + sent))[0] == 202
