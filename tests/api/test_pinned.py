"""Connections that a caller without a key would like to keep."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from litestar import Litestar

from app.api.context import ApiContext
from app.server.listener import uvicorn_server
from app.server.protocol import HttpProtocol
from app.settings import ServerSettings, Settings
from tests.api.conftest import KEY, body, client
from tests.api.test_review_listener import _parsed, listening, say

HUGE = b"POST /v1/sandboxes HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n"
LIMIT = 200


@pytest.fixture
async def port(app: Litestar) -> AsyncIterator[int]:
    async with listening(app, limit_concurrency=LIMIT) as taken:
        yield taken


@pytest.mark.parametrize("more", [b"", b"x"])
async def test_a_body_that_never_comes_does_not_keep_the_connection(port: int, more: bytes):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(20):
        writer.write(HUGE)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in head.lower()
        assert json.loads(await reader.readuntil(b"}"))["code"] == "MISSING_API_KEY", "the answer is whole at once"
        writer.write(more)
        assert await reader.read() == b""
    writer.close()


async def test_nor_does_one_with_the_key_to_a_path_that_takes_none(port: int):
    head = f"GET /v1/sandboxes HTTP/1.1\r\nOPEN-SANDBOX-API-KEY: {KEY}\r\nContent-Length: 5\r\n\r\n"
    status, headers, _ = _parsed(await say(port, head.encode()))
    assert (status, headers["connection"]) == (200, "close")


async def test_a_small_body_that_came_costs_nobody_the_connection(port: int):
    one = b"POST /v1/sandboxes HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
    heard = await say(port, one + HEALTH + b"Connection: close\r\n\r\n")
    assert heard.startswith(b"HTTP/1.1 401")
    assert heard.count(b"HTTP/1.1 200") == 1


async def test_who_asks_first_is_refused_without_being_told_to_begin(port: int):
    head = b"POST /v1/sandboxes HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 500\r\n\r\n"
    heard = await say(port, head)
    assert heard.startswith(b"HTTP/1.1 401")
    assert b"100 Continue" not in heard


async def test_a_client_that_sends_all_of_a_large_body_first_reads_why_it_was_refused(port: int):
    large = json.dumps(body(x="y" * 4_000_000)).encode()
    head = f"POST /v1/sandboxes HTTP/1.1\r\nHost: a\r\nContent-Length: {len(large)}\r\n\r\n"
    assert _parsed(await say(port, head.encode() + large))[0] == 401


async def test_pinned_connections_do_not_stop_an_honest_client(port: int):
    pinned = [await asyncio.open_connection("127.0.0.1", port) for _ in range(LIMIT)]
    async with asyncio.timeout(60):
        for reader, writer in pinned:
            writer.write(HUGE)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
            writer.write(b"x")  # after the answer: it used to end the time that an idle connection has
        while True:
            status, headers, problem = _parsed(await say(port, HEALTH + b"Connection: close\r\n\r\n"))
            if status == 200:
                break
            assert (status, problem["code"]) == (503, "GENERAL::TOO_MANY_CONNECTIONS")
            assert headers["retry-after"].isdecimal()
            await asyncio.sleep(0.05)
        for reader, writer in pinned:
            await reader.read()
            writer.close()


async def _wait_for(app: Litestar, port: int, count: int) -> list[asyncio.Task[bytes]]:
    """Requests that are under way: creates that wait for what nobody does."""
    sent = json.dumps(body()).encode()
    head = f"POST /v1/sandboxes HTTP/1.1\r\nHost: a\r\nOPEN-SANDBOX-API-KEY: {KEY}\r\nPrefer: wait=60\r\n"
    head += f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(sent)}\r\n\r\n"
    waiting = [asyncio.create_task(say(port, head.encode() + sent)) for _ in range(count)]
    async with asyncio.timeout(20), client(app, **{"open-sandbox-api-key": KEY}) as http:
        while (await http.get("/v1/sandboxes")).json()["pagination"]["totalItems"] < count:
            await asyncio.sleep(0.02)
    return waiting


async def test_a_full_server_refuses_like_everything_else(app: Litestar, context: ApiContext):
    async with listening(app, limit_concurrency=3) as port:
        waiting = await _wait_for(app, port, 3)
        status, headers, problem = _parsed(await say(port, HEALTH + b"\r\n"))
        assert (status, problem["code"]) == (503, "GENERAL::TOO_MANY_CONNECTIONS")
        assert headers["content-type"] == "application/json"
        assert headers["connection"] == "close"
        assert headers["retry-after"].isdecimal()
        assert len(headers["x-request-id"]) == 32
        context.stopping.set()
        assert {_parsed(heard)[0] for heard in await asyncio.gather(*waiting)} == {202}


async def test_who_says_nothing_makes_room_for_who_asks(app: Litestar, context: ApiContext):
    async with listening(app, limit_concurrency=3) as port:
        waiting = await _wait_for(app, port, 1)
        silent = await asyncio.open_connection("127.0.0.1", port)
        half = await asyncio.open_connection("127.0.0.1", port)
        half[1].write(b"GET /health HT")
        async with asyncio.timeout(20):
            for _ in range(3):
                assert _parsed(await say(port, HEALTH + b"Connection: close\r\n\r\n"))[0] == 200
            assert await silent[0].read() == b"", "it waited longest"
            context.stopping.set()
            assert _parsed(await waiting[0])[0] == 202, "a request under way is left alone"
        for _, writer in (silent, half):
            writer.close()


def test_every_parser_setting_means_the_bounded_protocol(app: Litestar):
    for http in ("auto", "httptools", "h11"):
        server = uvicorn_server(Settings(server=ServerSettings(http=http)), app)
        assert isinstance(server.config.http, type)
        assert issubclass(server.config.http, HttpProtocol)
