"""WebSockets: what is refused before the upgrade, and what passes after it, byte by byte."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import aiohttp
import pytest
from aiohttp import web
from msgspec.structs import replace

from app.agent.token import agent_token
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Desired, Failure, Sandbox
from app.domain.tenants import ANY_TENANT, AnyTenant
from app.errors import StoreUnavailable
from app.proxy.client import MAX_HEAD_BYTES
from app.proxy.http import Options
from app.proxy.limits import Limits, Streams
from app.proxy.watch import is_over
from app.server.protocol import MAX_AHEAD_BYTES
from app.views.current import CurrentView
from tests.api.conftest import KEY, WORKER, MakeContext
from tests.proxy.rig import (
    RST,
    TOKEN_KEY,
    VIA,
    Agent,
    Caller,
    Holding,
    Reply,
    Request,
    Rig,
    answer,
    calling,
    request,
    say,
    serving,
)
from tests.proxy.test_states import PRINCIPALS, streams_are
from tests.support.stream import Stream as Running

NONCE = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
)
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
MIB = 1024 * 1024


def handshake(sandbox: UUID, path: str = "ws", *headers: str, port: int = 3000, mount: str = "", **named: str) -> bytes:
    return request(
        f"{mount}/sandboxes/{sandbox}/proxy/{port}/{path}",
        "Connection: keep-alive, Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {NONCE}",
        *headers,
        **named,
    )


async def echoes(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Accepts, and sends back what comes, to the end."""
    writer.write(ACCEPTED + b"\r\n")
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


@pytest.fixture
def echo(agent: Agent) -> None:
    agent.handlers["/proxy/3000/ws"] = echoes


async def opened(caller: Caller, sent: bytes) -> Reply:
    """The answer that accepts."""
    caller.writer.write(sent)
    async with asyncio.timeout(30):
        head, _ = await caller.head()
    reply = Reply(head, b"")
    assert reply.status == 101, head
    return reply


async def echo_back(caller: Caller, piece: bytes) -> None:
    """Send it, and get it back."""
    caller.writer.write(piece)
    async with asyncio.timeout(30):
        assert await caller.reader.readexactly(len(piece)) == piece


async def pour(caller: Caller, size: int) -> None:
    for _ in range(size // MIB):
        caller.writer.write(bytes(MIB))
        await caller.writer.drain()


async def within_a_second(act: Awaitable[object]) -> bool:
    """Whether it is done then."""
    try:
        async with asyncio.timeout(1):
            await act
    except TimeoutError:
        return False
    return True


async def ended(caller: Caller) -> bytes:
    """What still comes, and then the end, clean or not."""
    found = b""
    async with asyncio.timeout(30):
        try:
            while piece := await caller.reader.read(65536):
                found += piece
        except ConnectionError:
            pass
    return found


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
        assert reply.one("connection") == "Upgrade"
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


async def refused(rig: Rig, sent: bytes) -> tuple[int, str]:
    """The refusal, which is the last thing on its connection."""
    async with calling(rig.port) as caller:
        caller.writer.write(sent + b"\x81\x80aaaa" + HIDDEN)
        reply = await caller.reply()
        assert reply.one("connection") == "close"
        assert await ended(caller) == b"", "nothing behind the head is a request"
        return reply.status, reply.code


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


# Ends


async def test_an_end_on_one_side_is_one_on_the_other(rig: Rig, agent: Agent, sandbox: UUID):
    """In the middle of a frame too: clean or broken, from the program or from the client."""
    for breaks in (False, True):
        holding = agent.handlers["/proxy/3000/ws"] = Holding(ACCEPTED + b"\r\n\x82\x7e\x10\x00half")
        holding.breaks = breaks
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            assert await caller.reader.readexactly(8) == b"\x82\x7e\x10\x00half"
            holding.go.set()
            assert await ended(caller) == b""
        await streams_are(rig, 0)
    for breaks in (False, True):
        agent.handlers["/proxy/3000/ws"] = echoes
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            caller.writer.write(b"\x82\xfe\x10\x00")
            await caller.reader.readexactly(4)
            if breaks:
                caller.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        await agent.until(lambda: not agent.open)
        await streams_are(rig, 0)


async def test_a_client_that_leaves_before_the_answer(rig: Rig, agent: Agent, sandbox: UUID):
    agent.handlers["/proxy/3000/ws"] = Holding(b"")
    for behind in (b"", b"some"):
        async with calling(rig.port) as caller:
            caller.writer.write(handshake(sandbox) + behind)
            await agent.until(lambda: len(agent.open) == 1)
        await agent.until(lambda: not agent.open)
    await streams_are(rig, 0)


async def test_half_an_end_leaves_the_other_direction(rig: Rig, agent: Agent, sandbox: UUID):
    async def sums(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\n")
        writer.write(b"%d" % len(await reader.read()))
        writer.close()

    agent.handlers["/proxy/3000/ws"] = sums
    async with calling(rig.port) as caller:
        await opened(caller, handshake(sandbox))
        caller.writer.write(b"a" * MIB)
        caller.writer.write_eof()
        assert await ended(caller) == b"%d" % MIB
    await streams_are(rig, 0)


async def test_a_program_that_ignores_the_end_is_left(make_context: MakeContext, agent: Agent):
    """Its client has left. Nothing would ever come, and the place would stay taken."""
    async with serving(make_context(api_key=None), options=Options(VIA, half_closed_seconds=0.2)) as rig:
        sandbox = await rig.running(agent)
        silent = asyncio.Event()

        async def ignores(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
            writer.write(ACCEPTED + b"\r\n")
            await silent.wait()
            writer.close()

        agent.handlers["/proxy/3000/ws"] = ignores
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            caller.writer.write_eof()
            assert await ended(caller) == b""
        await streams_are(rig, 0)
        silent.set()


async def test_a_side_that_does_not_read_holds_the_other_back(rig: Rig, agent: Agent, sandbox: UUID):
    """And when it reads again, all arrives."""
    go, total = asyncio.Event(), 64 * MIB

    async def deaf(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\n")
        await go.wait()
        left = total
        while left:
            left -= len(await reader.read(MIB))
        while left < total:
            writer.write(bytes(MIB))
            left += MIB
            await writer.drain()
        sent.set()
        writer.close()

    sent = asyncio.Event()
    agent.handlers["/proxy/3000/ws"] = deaf
    async with calling(rig.port) as caller:
        await opened(caller, handshake(sandbox))
        pouring = asyncio.create_task(pour(caller, total))
        assert not await within_a_second(asyncio.shield(pouring)), "they do not fit into sockets and buffers"
        go.set()
        await pouring
        assert not await within_a_second(sent.wait())
        got = 0
        async with asyncio.timeout(60):
            while piece := await caller.reader.read(MIB):
                got += len(piece)
        assert got == total


async def test_a_side_that_takes_nothing_is_given_up(make_context: MakeContext, agent: Agent):
    """Its client has left, which cannot be seen: nothing is read from it, so its end waits behind its bytes."""

    async def deaf(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\n")
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    agent.handlers["/proxy/3000/ws"] = deaf
    async with serving(make_context(api_key=None), options=Options(VIA, idle_seconds=1)) as rig:
        sandbox = await rig.running(agent)
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            assert not await within_a_second(pour(caller, 64 * MIB))
        await streams_are(rig, 0)
        gone.set()


async def test_a_side_that_takes_little_is_not_given_up(make_context: MakeContext, agent: Agent):
    """For longer than the time that one which takes nothing has."""
    total = 48 * MIB

    async def slow(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\n")
        left, pieces = total, 0
        while left:
            left -= len(await reader.read(MIB))
            pieces += 1
            if pieces % 10 == 0:
                await asyncio.sleep(0.1)  # the pace of this reader
        writer.write(b"all")
        writer.close()

    agent.handlers["/proxy/3000/ws"] = slow
    async with serving(make_context(api_key=None), options=Options(VIA, idle_seconds=0.4)) as rig:
        sandbox = await rig.running(agent)
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            await pour(caller, total)
            assert await ended(caller) == b"all"


# Which sandbox


async def test_the_end_of_a_sandbox_cuts_its_streams(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    """The engine has closed nothing. A stream of HTTP and a WebSocket are cut, and those of another sandbox are not."""
    other = await rig.pending()
    await rig.runs(other, {"44772": agent.address})
    agent.token = ""
    agent.handlers["/proxy/3000/events"] = Holding(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n")
    async with calling(rig.port) as mine, calling(rig.port) as reading, calling(rig.port) as others:
        await opened(mine, handshake(sandbox))
        await opened(others, handshake(other))
        reading.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/events"))
        await reading.head()
        await rig.service.execute(sandbox, ANY_TENANT, cmd.Terminate(), WORKER)
        assert await ended(mine) == b""
        assert not (await ended(reading)).endswith(b"0\r\n\r\n")
        others.writer.write(b"x")
        assert await others.reader.readexactly(1) == b"x"
    await streams_are(rig, 0)


async def test_another_start_cuts_the_streams_of_the_last(rig: Rig, agent: Agent, echo: None):
    """The container was started again from outside, at the same address. No exit was seen."""
    sandbox, began = await rig.pending(), datetime.now(UTC)
    agent.token = agent_token(TOKEN_KEY, sandbox, 1)
    await rig.runs(sandbox, {"44772": agent.address}, started_at=began)
    async with calling(rig.port) as caller:
        await opened(caller, handshake(sandbox))
        await rig.runs(sandbox, {"44772": agent.address}, started_at=began + timedelta(seconds=1))
        assert await ended(caller) == b""
    await streams_are(rig, 0)
    async with calling(rig.port) as caller:
        await opened(caller, handshake(sandbox))


def test_what_is_over():
    running = Running().observe(Power.RUNNING).sandbox
    stream = Streams(Limits()).enter("default", running.id)
    stream.generation, stream.run = running.generation, running.run
    assert not is_over(running, stream)
    assert is_over(None, stream)
    assert is_over(replace(running, generation=running.generation + 1), stream)
    assert is_over(replace(running, run=running.run + 1), stream)
    assert is_over(replace(running, failure=Failure("fetch", "LOST", "gone")), stream)
    assert not is_over(replace(running, desired=Desired.PAUSED), stream)


async def test_a_pause_leaves_its_streams(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    """Another sandbox ends after the pause, and its stream is cut: so the pause was looked at."""
    other = await rig.pending()
    await rig.runs(other, {"44772": agent.address})
    agent.token = ""
    async with calling(rig.port) as caller, calling(rig.port) as others:
        await opened(caller, handshake(sandbox))
        await opened(others, handshake(other))
        await rig.paused(sandbox)
        await rig.service.execute(other, ANY_TENANT, cmd.Terminate(), WORKER)
        assert await ended(others) == b""
        await rig.service.execute(sandbox, ANY_TENANT, cmd.Resume(), WORKER)
        await rig.runs(sandbox, {"44772": agent.address})
        caller.writer.write(b"x")
        assert await caller.reader.readexactly(1) == b"x"


class Away(CurrentView):
    """A view whose database may be away."""

    is_away = False

    async def load(self, sandbox_id: UUID, tenant: str | AnyTenant) -> tuple[Sandbox, datetime] | None:
        if self.is_away:
            raise StoreUnavailable("away")
        return await super().load(sandbox_id, tenant)


async def test_streams_live_while_the_database_is_away(make_context: MakeContext, agent: Agent, echo: None):
    """The sandbox has ended, which can be known only when the row can be read again."""
    context = make_context(api_key=None)
    view = Away(context.database)
    async with serving(context, view=view) as rig, calling(rig.port) as caller:
        sandbox = await rig.running(agent)
        await opened(caller, handshake(sandbox))
        view.is_away = True
        await rig.service.execute(sandbox, ANY_TENANT, cmd.Terminate(), WORKER)
        assert not await within_a_second(caller.reader.read(1))
        view.is_away = False
        assert await ended(caller) == b""
