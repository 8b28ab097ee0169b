"""WebSockets: what is refused before the upgrade, and what passes after it, byte by byte."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import aiohttp
import pytest
from aiohttp import web

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.proxy.client import MAX_HEAD_BYTES
from app.proxy.limits import Limits
from app.proxy.options import Options
from app.server.protocol import MAX_AHEAD_BYTES
from tests.api.conftest import KEY, WORKER, MakeContext
from tests.proxy.rig import (
    VIA,
    Agent,
    Holding,
    Request,
    Rig,
    answer,
    calling,
    request,
    say,
    serving,
)
from tests.proxy.test_states import PRINCIPALS, streams_are
from tests.proxy.websockets import (
    ACCEPTED,
    HIDDEN,
    MIB,
    NONCE,
    ended,
    handshake,
    opened,
    refused,
)

# What passes


@pytest.mark.parametrize("mount", ["", "/v1"])
async def test_the_head_is_passed_on_and_then_bytes(make_context: MakeContext, agent: Agent, echo: None, mount: str):
    async with serving(make_context()) as rig, calling(rig.port) as caller:
        sandbox = await rig.running(agent)
        reply = await opened(
            caller,
            handshake(
                sandbox,
                "ws?a=%2F",
                "Sec-WebSocket-Protocol: chat, superchat",
                "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
                "Origin: http://page.example",
                "Cookie: a=b",
                "X-Forwarded-For: 1.2.3.4",
                mount=mount,
                key=KEY,
            ),
        )
        assert (reply.one("connection") or "").lower() == "upgrade"
        assert reply.one("upgrade") == "websocket"
        assert reply.one("sec-websocket-accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert reply.all("content-length") == reply.all("transfer-encoding") == []
        asked = agent.requests[-1]
        assert (asked.method, asked.target) == ("GET", "/proxy/3000/ws?a=%2F")
        assert (asked.one("connection"), asked.one("upgrade")) == ("Upgrade", "websocket")
        assert asked.one("sec-websocket-key") == NONCE
        assert asked.one("sec-websocket-version") == "13"
        assert asked.one("sec-websocket-protocol") == "chat, superchat"
        assert asked.one("sec-websocket-extensions") == "permessage-deflate; client_max_window_bits"
        assert asked.one("origin") == "http://page.example"
        assert asked.one("x-execd-access-token") == agent.token
        assert asked.one("x-forwarded-for") == "127.0.0.1"
        assert asked.all("cookie") == asked.all("open-sandbox-api-key") == []
        for piece in (b"\x81\x85", bytes(range(256)), HIDDEN, os.urandom(100_000)):
            caller.writer.write(piece)
            assert await caller.reader.readexactly(len(piece)) == piece
    await agent.until(lambda: not agent.open)
    await streams_are(rig, 0)


@pytest.fixture
async def real(rig: Rig) -> AsyncIterator[tuple[str, list[str]]]:
    """A program with a library's WebSockets, as the agent at its address. Gives the URL and what the program noted."""
    noted: list[str] = []

    async def serve(asked: web.Request) -> web.WebSocketResponse:
        made = web.WebSocketResponse(protocols=("chat",), max_msg_size=0, autoping=False)
        await made.prepare(asked)
        async for message in made:
            if message.type is aiohttp.WSMsgType.PING:
                await made.pong(message.data)
            elif message.type is aiohttp.WSMsgType.TEXT and message.data.startswith("close "):
                code = int(message.data.split()[1])
                await made.close(code=code, message=b"because")
            elif message.type is aiohttp.WSMsgType.TEXT:
                await made.send_str(message.data)
            elif message.type is aiohttp.WSMsgType.BINARY:
                await made.send_bytes(message.data)
        noted.append(f"closed {made.close_code}")
        return made

    app = web.Application()
    app.router.add_get("/proxy/3000/ws", serve)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    sandbox = await rig.pending()
    await rig.runs(sandbox, {"44772": f"127.0.0.1:{runner.addresses[0][1]}"})
    yield f"http://127.0.0.1:{rig.port}/sandboxes/{sandbox}/proxy/3000/ws", noted
    await runner.cleanup()


@pytest.mark.parametrize("compress", [0, 15])
async def test_messages_of_any_size(real: tuple[str, list[str]], compress: int):
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(real[0], compress=compress, max_msg_size=0, protocols=("other", "chat")) as opened,
    ):
        assert opened.protocol == "chat"
        assert opened.compress == compress
        for size in (0, 1, 125, 126, 65535, 65536, 16 * MIB):
            data = random.randbytes(size)
            await opened.send_bytes(data)
            assert await opened.receive_bytes(timeout=60) == data
            await opened.send_str("é" * (size // 2))
            assert await opened.receive_str(timeout=60) == "é" * (size // 2)


async def test_pings_and_pongs_are_not_ours(real: tuple[str, list[str]]):
    async with aiohttp.ClientSession() as session, session.ws_connect(real[0], autoping=False) as opened:
        await opened.ping(b"there?")
        pong = await opened.receive(timeout=30)
        assert (pong.type, pong.data) == (aiohttp.WSMsgType.PONG, b"there?")


async def test_close_codes_pass_both_ways(real: tuple[str, list[str]]):
    url, noted = real
    async with aiohttp.ClientSession() as session:
        for code in (1000, 1001, 1008, 1011, 3000, 4000, 4999):
            async with session.ws_connect(url) as opened:
                await opened.send_str(f"close {code}")
                said = await opened.receive(timeout=30)
                assert (said.type, said.data, said.extra) == (aiohttp.WSMsgType.CLOSE, code, "because")
            async with session.ws_connect(url) as opened:
                noted.clear()
                assert await opened.close(code=code)
            assert noted == [f"closed {code}"]


async def test_what_comes_with_a_head_comes_first(rig: Rig, agent: Agent, sandbox: UUID):
    """The client's first bytes behind its head, and the program's behind its own."""

    async def greets(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\nhello ")
        writer.write(await reader.readexactly(len(b"first second")))
        await reader.read()
        writer.close()

    agent.handlers["/proxy/3000/ws"] = greets
    async with calling(rig.port) as caller:
        await opened(caller, handshake(sandbox) + b"first ")
        caller.writer.write(b"second")
        assert await caller.reader.readexactly(18) == b"hello first second"


async def test_a_program_that_accepts_and_ends_at_once(rig: Rig, agent: Agent, sandbox: UUID):
    async def ends(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\n\x88\x02\x03\xe8")
        await writer.drain()
        writer.close()

    agent.handlers["/proxy/3000/ws"] = ends
    for _ in range(20):
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            assert await ended(caller) == b"\x88\x02\x03\xe8"
    await streams_are(rig, 0)


# What is refused before the upgrade


async def test_refusals_are_answers_of_http(make_context: MakeContext, agent: Agent, echo: None):
    async with serving(make_context(authenticate=PRINCIPALS.get)) as rig:
        sandbox = await rig.running(agent, tenant="tenant-owner")
        gone = await rig.pending("tenant-owner")
        await rig.service.execute(gone, ANY_TENANT, cmd.Terminate(), WORKER)
        bare = await rig.pending("tenant-owner")
        await rig.runs(bare, {})
        exited = await rig.pending("tenant-owner")
        await rig.runs(exited, {"44772": agent.address})
        await rig.exits(exited, 1)
        for given, port, headers, key, expected in (
            (sandbox, 3000, (), None, (401, "MISSING_API_KEY")),
            (sandbox, 3000, (), "nobody", (401, "INVALID_API_KEY")),
            (sandbox, 3000, (), "stranger", (404, "DOCKER::SANDBOX_NOT_FOUND")),
            (uuid4(), 3000, (), "owner", (404, "DOCKER::SANDBOX_NOT_FOUND")),
            (gone, 3000, (), "owner", (404, "DOCKER::SANDBOX_NOT_FOUND")),
            (exited, 3000, (), "owner", (409, "DOCKER::SANDBOX_NOT_RUNNING")),
            (bare, 3000, (), "owner", (502, "PROXY::ADDRESS_NOT_PROVEN")),
            (sandbox, 0, (), "owner", (400, "DOCKER::INVALID_PORT")),
            (sandbox, 3000, ("Sandledger-Generation: 2",), "owner", (410, "SANDBOX::ENDPOINT_REPLACED")),
            (sandbox, 3000, ("Sandledger-Generation: x",), "owner", (400, "GENERAL::INVALID_HEADER")),
            (sandbox, 3000, ("Host: b",), "owner", (400, "GENERAL::INVALID_HEADER")),
        ):
            named = {} if key is None else {"key": key}
            assert await refused(rig, handshake(given, "ws", *headers, port=port, **named)) == expected
        assert agent.requests == []
        agent.token = "of-another"
        assert await refused(rig, handshake(sandbox, key="owner")) == (502, "PROXY::ADDRESS_NOT_PROVEN")
        await agent.stop()
        assert await refused(rig, handshake(sandbox, key="owner")) == (502, "BACKEND_CONNECTION_FAILED")
        assert rig.relay.streams.open == 0


async def test_a_page_of_another_origin_gets_none_without_a_key(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    assert await refused(rig, handshake(sandbox, "ws", "Origin: http://evil.example")) == (
        403,
        "SANDLEDGER::ORIGIN_NOT_ALLOWED",
    )
    assert agent.requests == []
    async with calling(rig.port) as caller:
        await opened(caller, handshake(sandbox, "ws", "Origin: http://127.0.0.1"))


async def test_a_place_is_taken_until_the_end(make_context: MakeContext, agent: Agent, echo: None):
    async with serving(make_context(api_key=None), options=Options(VIA, limits=Limits(9, 9, 1))) as rig:
        sandbox = await rig.running(agent)
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            assert await refused(rig, handshake(sandbox)) == (503, "PROXY::BUSY")
        await streams_are(rig, 0)
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))


async def test_a_program_that_does_not_accept_is_heard(rig: Rig, agent: Agent, sandbox: UUID):
    """Its answer is passed on as it is, whatever it found wrong in the handshake, and the connection ends."""

    async def refuses(asked: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        if asked.one("sec-websocket-version") != "13":
            writer.write(answer(b"which?", "426 Upgrade Required", "Sec-WebSocket-Version: 13\r\n"))
        else:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n")

    agent.handlers["/proxy/3000/ws"] = refuses
    for wrong, status, body in (
        (("Sec-WebSocket-Version: 13", "Sec-WebSocket-Version: 7"), 426, b"which?"),
        ((f"Sec-WebSocket-Key: {NONCE}", "Sec-WebSocket-Key: short"), 400, b"no"),
        ((f"Sec-WebSocket-Key: {NONCE}", "X-A: b"), 400, b"no"),
    ):
        async with calling(rig.port) as caller:
            caller.writer.write(handshake(sandbox).replace(wrong[0].encode(), wrong[1].encode()) + HIDDEN)
            reply = await caller.reply()
            assert (reply.status, reply.body, reply.one("connection")) == (status, body, "close")
            assert reply.one("sandledger-error") is None
            assert await ended(caller) == b""
    assert [each for each in agent.requests if "hidden" in each.target] == []
    assert len(agent.requests) == 3
    await agent.until(lambda: not agent.open)


BROKEN = {
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "nothing": b"",
    "half a head": ACCEPTED,
    "bare LF": ACCEPTED.replace(b"\r\n", b"\n") + b"\n",
    "a fold": ACCEPTED + b"X-A: b\r\n c\r\n\r\n",
    "no protocol": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n",
    "another protocol": ACCEPTED.replace(b"websocket", b"h2c") + b"\r\n",
    "two protocols": ACCEPTED + b"Upgrade: h2c\r\n\r\n",
    "a list of protocols": ACCEPTED.replace(b"websocket", b"websocket, h2c") + b"\r\n",
    "a control character": ACCEPTED + b"X-A: a\x01b\r\n\r\n",
    "HTTP/2": ACCEPTED.replace(b"HTTP/1.1", b"HTTP/2.0") + b"\r\n",
    "a huge head": ACCEPTED + b"X-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
    "a status beyond": b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
}


async def test_what_is_no_answer_is_502(rig: Rig, agent: Agent, sandbox: UUID):
    for name, raw in BROKEN.items():

        async def handler(_request: Request, _reader: object, writer: asyncio.StreamWriter, raw: bytes = raw) -> None:
            writer.write(raw)
            await writer.drain()
            writer.close()

        agent.handlers["/proxy/3000/ws"] = handler
        assert await refused(rig, handshake(sandbox)) == (502, "BACKEND_RESPONSE_FAILED"), name
    await agent.until(lambda: not agent.open)
    await streams_are(rig, 0)


async def test_a_program_that_says_nothing_is_504(make_context: MakeContext, agent: Agent):
    async with serving(make_context(api_key=None), options=Options(VIA, idle_seconds=0.3)) as rig:
        agent.handlers["/proxy/3000/ws"] = Holding(b"HTTP/1.1 101 Switching")
        assert await refused(rig, handshake(await rig.running(agent))) == (504, "BACKEND_TIMEOUT")


async def test_101_that_was_not_asked_for_is_no_answer(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    reply = await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/ws"))
    assert (reply.status, reply.code) == (502, "BACKEND_RESPONSE_FAILED")


# What is no handshake


async def test_other_upgrades_are_requests_without_one(rig: Rig, agent: Agent, sandbox: UUID):
    """And what follows them on the connection is a request of its own."""
    plain, other = handshake(sandbox), HIDDEN.replace(b"/hidden", b"/health").replace(b"Host: a", b"Host: localhost")
    for sent, body in (
        (plain.replace(b"websocket", b"h2c"), b""),
        (plain.replace(b"Upgrade: websocket", b"Upgrade: websocket, h2c"), b""),
        (plain.replace(b"Upgrade: websocket", b"Upgrade: websocket\r\nUpgrade: h2c"), b""),
        (plain.replace(b"Upgrade: websocket", b"Upgrade: websocket\r\nContent-Length: 4"), b"body"),
        (
            plain.replace(b"Upgrade: websocket", b"Upgrade: websocket\r\nTransfer-Encoding: chunked"),
            b"4\r\nbody\r\n0\r\n\r\n",
        ),
        (
            plain.replace(b"GET", b"POST").replace(b"Upgrade: websocket", b"Upgrade: websocket\r\nContent-Length: 4"),
            b"body",
        ),
        (plain.replace(b"GET", b"POST"), b""),
    ):
        async with calling(rig.port) as caller:
            caller.writer.write(sent + body + other)
            assert (await caller.reply()).status == 200
            assert (await caller.reply()).status == 200
        asked = agent.requests[-1]
        assert (asked.body, asked.all("upgrade")) == (b"body" if body else b"", [])
    assert len(agent.requests) == 7


async def test_a_handshake_of_http_1_0_is_none(rig: Rig, agent: Agent, sandbox: UUID):
    async with calling(rig.port) as caller:
        caller.writer.write(handshake(sandbox).replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await caller.reply()).status == 200
    assert agent.requests[-1].all("upgrade") == []


async def test_a_handshake_to_the_api_is_a_request(rig: Rig):
    sent = request("/v1/sandboxes", "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {NONCE}")
    async with calling(rig.port) as caller:
        for _ in range(2):
            caller.writer.write(sent)
            assert (await caller.reply()).status == 200


async def test_two_handshakes_in_one_piece_are_one(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    """The second is what the WebSocket carries."""
    sent = handshake(sandbox)
    async with calling(rig.port) as caller:
        await opened(caller, sent + sent)
        assert await caller.reader.readexactly(len(sent)) == sent
    assert len(agent.requests) == 1


async def test_a_handshake_behind_a_request_under_way_is_none(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    """Its connection has another answer to carry first. When that is through, it is one."""
    plain = request(f"/sandboxes/{sandbox}/proxy/3000/a")
    async with calling(rig.port) as caller:
        caller.writer.write(plain + handshake(sandbox, "a") + plain)
        assert [(await caller.reply()).status for _ in range(3)] == [200] * 3
        assert [each.all("upgrade") for each in agent.requests] == [[]] * 3
        await opened(caller, handshake(sandbox))
        caller.writer.write(b"x")
        assert await caller.reader.readexactly(1) == b"x"


async def test_a_head_in_pieces_is_a_head(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    async with calling(rig.port) as caller:
        for at in handshake(sandbox) + b"behind":
            caller.writer.write(bytes([at]))
            await caller.writer.drain()
        await opened(caller, b"")
        assert await caller.reader.readexactly(6) == b"behind"
    async with calling(rig.port) as caller:
        caller.writer.write(handshake(sandbox, "ws", "X-A: " + "a" * MIB))
        assert (await caller.reply()).status == 431
    async with calling(rig.port) as caller:
        caller.writer.write(handshake(sandbox)[:-2])
    await streams_are(rig, 0)
    assert len(agent.requests) == 1


async def test_more_than_a_client_may_send_before_the_answer(rig: Rig, agent: Agent, sandbox: UUID):
    silent = agent.handlers["/proxy/3000/ws"] = Holding(b"")
    async with calling(rig.port) as caller:
        caller.writer.write(handshake(sandbox) + b"a" * MAX_AHEAD_BYTES)
        await agent.until(lambda: len(agent.requests) == 1)
        assert rig.relay.streams.open == 1
        caller.writer.write(b"a" * MAX_AHEAD_BYTES)
        assert await ended(caller) == b""
    await agent.until(lambda: not agent.open)
    await streams_are(rig, 0)
    silent.go.set()
