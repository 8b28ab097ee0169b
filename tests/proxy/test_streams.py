"""Bodies as streams, both ways: memory, back-pressure, ends in the middle, clients that leave."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID
from weakref import WeakSet

import pytest

from app.proxy.limits import Limits, with_descriptors
from app.proxy.options import Options
from app.settings import Settings
from app.settings.schema import ServerSettings
from tests.api.conftest import MakeContext
from tests.proxy.rig import VIA, Agent, Caller, Holding, Request, Rig, answer, calling, request, say, serving
from tests.proxy.websockets import echo_back, echoes, ended, handshake, opened

PIECE = bytes(range(256)) * 256
MIB = 1024 * 1024
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def get(sandbox: UUID, path: str, *headers: str, method: str = "GET") -> bytes:
    return request(f"/sandboxes/{sandbox}/proxy/3000/{path}", *headers, method=method)


async def head_of(caller: Caller) -> bytes:
    async with asyncio.timeout(30):
        return (await caller.head())[0]


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_the_first_event_comes_at_once(rig: Rig, agent: Agent, sandbox: UUID):
    """The answer has not ended, and its second piece waits for the first to have arrived."""
    events = agent.handlers["/proxy/3000/events"] = Holding(EVENTS + b"9\r\ndata: 1\n\n\r\n")
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "events"))
        assert b"text/event-stream" in await head_of(caller)
        assert await caller.chunk() == b"data: 1\n\n"
        events.rest = b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"
        events.go.set()
        assert await caller.chunk() == b"data: 2\n\n"
        assert await caller.chunk() == b""


async def test_a_head_comes_before_any_of_its_body(rig: Rig, agent: Agent, sandbox: UUID):
    agent.handlers["/proxy/3000/events"] = Holding(EVENTS)
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "events"))
        assert b"text/event-stream" in await head_of(caller)


@pytest.fixture
async def wide(make_context: MakeContext) -> AsyncIterator[Rig]:
    """A server with room for a thousand streams of one sandbox, and for ten requests of the API."""
    limits = with_descriptors(Limits(2000, 2000, 2000))
    settings = Settings(server=ServerSettings(limit_concurrency=10))
    async with serving(make_context(api_key=None), options=Options(VIA, limits=limits), settings=settings) as rig:
        yield rig


async def test_a_thousand_silent_streams(wide: Rig, agent: Agent):
    """They take no place of the API. When their clients have left, no connection to the sandbox is left: a relay that
    waits for the sandbox only would keep all of them.
    """
    sandbox = await wide.running(agent)
    agent.handlers["/proxy/3000/events"] = Holding(EVENTS + b"1\r\n.\r\n")
    before = memory()
    callers = [calling(wide.port) for _ in range(1000)]
    entered = [await caller.__aenter__() for caller in callers]
    for caller in entered:
        caller.writer.write(get(sandbox, "events"))
    for caller in entered:
        await head_of(caller)
    assert (len(agent.open), wide.relay.streams.open) == (1000, 1000)
    assert (memory() - before) / 1000 < 200 * 1024, "server, sandbox and clients are in this process"
    assert (await say(wide.port, request("/v1/sandboxes"))).status == 200, "the API has its own places"
    for caller in callers:
        await caller.__aexit__(None, None, None)
    await agent.until(lambda: not agent.open)
    assert wide.relay.streams.open == 0


async def test_the_api_at_its_limit_takes_no_place_of_streams(wide: Rig, agent: Agent):
    sandbox = await wide.running(agent)
    callers = [calling(wide.port) for _ in range(10)]
    pending = str(await wide.pending())
    for caller in callers:
        entered = await caller.__aenter__()
        entered.writer.write(
            request(f"/v1/sandboxes/{pending}/pause", "Content-Length: 5", method="POST")  # its body never comes
        )
    assert (await say(wide.port, get(sandbox, "a"))).status == 200
    for caller in callers:
        await caller.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("limits", "what"), [(Limits(1, 9, 9), b"server"), (Limits(9, 1, 9), b"tenant"), (Limits(9, 9, 1), b"sandbox")]
)
async def test_more_streams_than_allowed(make_context: MakeContext, agent: Agent, limits: Limits, what: bytes):
    async with serving(make_context(api_key=None), options=Options(VIA, limits=limits)) as rig:
        sandbox = await rig.running(agent)
        agent.handlers["/proxy/3000/events"] = Holding(EVENTS)
        async with calling(rig.port) as caller:
            caller.writer.write(get(sandbox, "events"))
            await head_of(caller)
            reply = await say(rig.port, get(sandbox, "a"))
            assert (reply.status, reply.code, reply.one("retry-after")) == (503, "PROXY::BUSY", "1")
            assert what in reply.body
        await agent.until(lambda: not agent.open)
        assert (await say(rig.port, get(sandbox, "a"))).status == 200


def test_descriptors_are_enough_for_the_streams_or_the_streams_are_fewer():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        assert with_descriptors(Limits(300, 200, 100)) == Limits(300, 200, 100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 2 * 300 + 512 or soft < 1112
        assert with_descriptors(Limits(hard, 200, 100)).in_process == (hard - 512) // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Large bodies


SIZE = 200 * MIB


async def _sends(_request: Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode())
    for _ in range(SIZE // len(PIECE)):
        writer.write(PIECE)
        await writer.drain()


async def _takes(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    left = SIZE
    while left:
        left -= len(await reader.read(min(left, MIB)))
    writer.write(answer(b"taken"))


async def _taken(caller: Caller, size: int) -> int:
    """Read so much; the highest resident size on the way."""
    peak = 0
    while size:
        piece = await caller.reader.read(min(size, MIB))
        assert piece, "the answer ended early"
        size -= len(piece)
        peak = max(peak, memory())
    return peak


async def test_200_mib_down_and_up_with_flat_memory(rig: Rig, agent: Agent, sandbox: UUID):
    agent.handlers["/proxy/3000/big"] = _sends
    agent.raw["/proxy/3000/up"] = _takes
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "a"))
        await caller.reply()
        before = memory()
        caller.writer.write(get(sandbox, "big"))
        await head_of(caller)
        peak = await _taken(caller, SIZE)
        caller.writer.write(get(sandbox, "up", f"Content-Length: {SIZE}", method="POST"))
        for _ in range(SIZE // len(PIECE)):
            caller.writer.write(PIECE)
            await caller.writer.drain()
            peak = max(peak, memory())
        assert (await caller.reply()).body == b"taken"
    assert peak - before < 16 * MIB, "server, sandbox and client are in this process"


async def test_a_reader_that_does_not_read_holds_the_sandbox_back(rig: Rig, agent: Agent, sandbox: UUID):
    written = 0
    stuck = asyncio.Event()

    async def handler(_request: Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode())
        while written < SIZE:
            writer.write(PIECE)
            written += len(PIECE)
            draining = asyncio.create_task(writer.drain())
            done, _ = await asyncio.wait([draining], timeout=1)
            if not done:
                stuck.set()
            await draining

    agent.handlers["/proxy/3000/big"] = handler
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "big"))
        await head_of(caller)
        async with asyncio.timeout(30):
            await stuck.wait()
        assert written < 64 * MIB, "what sockets and buffers hold, and no more"
    await agent.until(lambda: not agent.open)


async def test_a_sandbox_that_does_not_read_holds_the_client_back(rig: Rig, agent: Agent, sandbox: UUID):
    go = asyncio.Event()

    async def deaf(_request: Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        writer.close()

    agent.raw["/proxy/3000/up"] = deaf
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "up", f"Content-Length: {SIZE}", method="POST"))
        sent, stuck = 0, False
        while sent < SIZE and not stuck:
            caller.writer.write(PIECE)
            sent += len(PIECE)
            try:
                async with asyncio.timeout(1):
                    await caller.writer.drain()
            except TimeoutError:
                stuck = True
        assert stuck
        assert sent < 64 * MIB
    go.set()


# Ends in the middle


CUTS = {
    "a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", False),
    "a length, reset": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", True),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", False),
    "chunks, reset": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", True),
    "the connection's end, reset": (b"HTTP/1.1 200 OK\r\n\r\n", True),
}


async def test_a_cut_body_is_seen_to_be_cut(rig: Rig, agent: Agent, sandbox: UUID, caplog: pytest.LogCaptureFixture):
    """At every place: no byte of the body, some, all but one, and between the last chunk and the end. It is no fault of
    the server, so its log has no error.
    """
    for name, (head, breaks) in CUTS.items():
        bodies = (
            [b"", b"x", b"y" * 999]
            if b"Length" in head
            else [b"", b"5\r\nhel", b"5\r\nhello\r\n", b"5\r\nhello\r\n0\r\n"]
        )
        for body in bodies if head.count(b":") else [b"some"]:
            holding = agent.handlers["/proxy/3000/cut"] = Holding(head + body)
            holding.breaks = breaks
            async with calling(rig.port) as caller:
                caller.writer.write(get(sandbox, "cut"))
                got, length = await caller.head()
                if body == b"some":  # otherwise the reset could overtake what was sent before it
                    assert await caller.chunk() == body
                holding.go.set()
                rest = await _until_end(caller)
                assert length is None or len(rest) < length, name
                assert not (length is None and rest.endswith(b"0\r\n\r\n")), f"{name}: {got!r} {rest!r}"
    assert (await say(rig.port, get(sandbox, "a"))).status == 200
    assert [each for each in caplog.records if each.levelname == "ERROR"] == []


async def test_a_body_that_ends_with_the_connection_is_whole(rig: Rig, agent: Agent, sandbox: UUID):
    holding = agent.handlers["/proxy/3000/a"] = Holding(b"HTTP/1.0 200 OK\r\n\r\nall of it")
    holding.go.set()
    assert (await say(rig.port, get(sandbox, "a"))).body == b"all of it"


async def test_a_client_of_http_1_0_sees_a_cut_too(rig: Rig, agent: Agent, sandbox: UUID):
    """Its answer is framed too: the end of the connection alone would look like the end of the body."""
    holding = agent.handlers["/proxy/3000/cut"] = Holding(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n"
    )
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "cut").replace(b"HTTP/1.1", b"HTTP/1.0"))
        await head_of(caller)
        holding.go.set()
        assert not (await _until_end(caller)).endswith(b"0\r\n\r\n")


async def _until_end(caller: Caller) -> bytes:
    found = b""
    async with asyncio.timeout(30):
        try:
            while piece := await caller.reader.read(65536):
                found += piece
        except ConnectionError:
            pass
    return found


async def test_a_client_that_leaves_ends_the_sandboxs_work(rig: Rig, agent: Agent, sandbox: UUID):
    """While the head is waited for, while a body is on its way, and in the middle of an answer."""
    silent = agent.handlers["/proxy/3000/silent"] = Holding(b"")
    agent.raw["/proxy/3000/up"] = silent
    for sent in (
        get(sandbox, "silent"),
        get(sandbox, "silent", "Content-Length: 2", method="POST") + b"ab",
        get(sandbox, "up", "Content-Length: 20", method="POST") + b"ab",
        get(sandbox, "up", "Transfer-Encoding: chunked", method="POST") + b"2\r\nab\r\n",
    ):
        count = len(agent.requests)
        async with calling(rig.port) as caller:
            caller.writer.write(sent)
            await agent.until(lambda count=count: len(agent.requests) > count)
        await agent.until(lambda: not agent.open)
    assert rig.relay.streams.open == 0


# Bodies and early answers


async def test_an_answer_before_the_body_is_passed_on_at_once(rig: Rig, agent: Agent, sandbox: UUID):
    async def refuses(_request: Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"too much", "413 Content Too Large"))
        await writer.drain()
        writer.close()

    agent.raw["/proxy/3000/up"] = refuses
    for framing in ("Content-Length: 100000000", "Transfer-Encoding: chunked"):
        async with calling(rig.port) as caller:
            caller.writer.write(get(sandbox, "up", framing, method="POST") + b"2\r\nab\r\n")
            reply = await caller.reply()
            assert (reply.status, reply.body, reply.one("connection")) == (413, b"too much", "close")
            caller.writer.write_eof()
            assert await _until_end(caller) == b""
    await agent.until(lambda: not agent.open)


async def test_both_bodies_at_once(rig: Rig, agent: Agent, sandbox: UUID):
    """A program may answer while it reads, as an echo does."""

    async def echoes(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while (line := await reader.readuntil(b"\r\n")) != b"0\r\n":
            writer.write(line + await reader.readexactly(int(line, 16) + 2))
            await writer.drain()
        assert await reader.readexactly(2) == b"\r\n"
        writer.write(b"0\r\n\r\n")

    agent.raw["/proxy/3000/echo"] = echoes
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "echo", "Transfer-Encoding: chunked", method="POST"))
        await head_of(caller)
        for word in (b"one", b"two", b"three"):
            caller.writer.write(b"%x\r\n%b\r\n" % (len(word), word))
            assert await caller.chunk() == word
        caller.writer.write(b"0\r\n\r\n")
        assert await caller.chunk() == b""


async def test_100_continue_comes_from_a_sandbox_that_is_there(rig: Rig, agent: Agent, sandbox: UUID):
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "up", "Content-Length: 4", "Expect: 100-continue", method="POST"))
        assert (await head_of(caller)) == b"HTTP/1.1 100 Continue"
        caller.writer.write(b"body")
        assert (await caller.reply()).status == 200
    assert agent.requests[-1].body == b"body"
    assert agent.requests[-1].all("expect") == []
    await agent.stop()
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "up", "Content-Length: 4", "Expect: 100-continue", method="POST"))
        assert (await caller.reply()).code == "BACKEND_CONNECTION_FAILED", "and no 100 before it"


async def test_a_refusal_reaches_a_client_that_still_sends(rig: Rig):
    sandbox = await rig.pending()
    await rig.runs(sandbox, None)
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "up", f"Content-Length: {4 * MIB}", method="POST"))
        for _ in range(4 * MIB // len(PIECE)):
            caller.writer.write(PIECE)
            await caller.writer.drain()
        reply = await caller.reply()
        assert (reply.code, reply.one("connection")) == ("PROXY::ADDRESS_NOT_PROVEN", "close")


async def test_a_sandbox_that_says_nothing_is_504(make_context: MakeContext, agent: Agent):
    async with serving(make_context(api_key=None), options=Options(VIA, idle_seconds=0.3)) as rig:
        sandbox = await rig.running(agent)
        agent.handlers["/proxy/3000/silent"] = Holding(b"")
        agent.handlers["/proxy/3000/events"] = events = Holding(EVENTS + b"1\r\n.\r\n")
        async with calling(rig.port) as caller:
            caller.writer.write(get(sandbox, "events"))
            await head_of(caller)
            reply = await say(rig.port, get(sandbox, "silent"))
            assert (reply.status, reply.code) == (504, "BACKEND_TIMEOUT")
            reply = await say(rig.port, get(sandbox, "a", "Content-Length: 2", method="POST") + b"a")
            assert (reply.status, reply.code) == (504, "BACKEND_TIMEOUT"), "a body that stops is the same"
            assert await caller.chunk() == b"."
            events.rest = b"1\r\n!\r\n"
            events.go.set()
            assert await caller.chunk() == b"!", "between two bytes of an answer there is no limit"
    assert not agent.open


async def test_a_stream_that_stands_still_is_cut_where_the_operator_wants_it(make_context: MakeContext, agent: Agent):
    """A body, a silent answer and a silent WebSocket. Those on which bytes pass, in either direction, stay."""
    options = Options(VIA, stream_idle_seconds=0.5)
    async with serving(make_context(api_key=None), options=options) as rig:
        sandbox = await rig.running(agent)
        agent.handlers["/proxy/3000/events"] = agent.raw["/proxy/3000/up"] = Holding(EVENTS + b"1\r\n.\r\n")
        agent.handlers["/proxy/3000/ws"] = echoes
        async with (
            calling(rig.port) as silent,
            calling(rig.port) as still,
            calling(rig.port) as moving,
            calling(rig.port) as sending,
        ):
            silent.writer.write(get(sandbox, "events"))
            assert b"event-stream" in await head_of(silent)
            sending.writer.write(get(sandbox, "up", "Transfer-Encoding: chunked", method="POST"))
            assert b"event-stream" in await head_of(sending)
            await opened(still, handshake(sandbox))
            await opened(moving, handshake(sandbox))
            cut = asyncio.create_task(asyncio.wait([asyncio.create_task(ended(each)) for each in (silent, still)]))
            while not cut.done():
                await echo_back(moving, b"x")
                sending.writer.write(b"1\r\n.\r\n")
            assert [each.result() for each in (await cut)[0] if each.result()] == [b"1\r\n.\r\n"], "no last chunk"
            await echo_back(moving, b"still there")
            assert rig.relay.streams.open == 2
        await agent.until(lambda: not agent.open)


async def test_a_slow_head_has_an_end(rig: Rig, agent: Agent, sandbox: UUID):
    """A piece at a time is a head all the same."""
    async with calling(rig.port) as caller:
        for at in get(sandbox, "a", "X-A: b"):
            caller.writer.write(bytes([at]))
            await caller.writer.drain()
        assert (await caller.reply()).status == 200
    async with calling(rig.port) as caller:
        caller.writer.write(get(sandbox, "a", "X-A: " + "a" * (1024 * 1024)))
        assert (await caller.reply()).status == 431
    assert len(agent.requests) == 1


# Kept connections

ROUNDS = 300


async def test_reads_keep_a_connection_and_writes_do_not(rig: Rig, agent: Agent, sandbox: UUID):
    for _ in range(5):
        await say(rig.port, get(sandbox, "a"))
    assert agent.connections == 1
    for _ in range(5):
        await say(rig.port, get(sandbox, "a", method="POST"))
    assert agent.connections == 6


async def test_connections_are_not_shared_between_ports_and_sandboxes(rig: Rig, agent: Agent, sandbox: UUID):
    await say(rig.port, get(sandbox, "a"))
    await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/44772/a"))
    await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3001/a"))
    assert agent.connections == 3


async def test_a_kept_connection_that_had_ended_costs_nothing(rig: Rig, agent: Agent, sandbox: UUID):
    """The sandbox closes each connection when the next request comes on it, as a server does whose time was over.

    A read is asked again, once. What may act arrives exactly once: it never uses a kept connection.
    """
    served: WeakSet[asyncio.StreamWriter] = WeakSet()
    closed = 0

    async def closes(_request: Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal closed
        if writer in served:
            closed += 1
            writer.transport.abort()
        else:
            served.add(writer)
            writer.write(answer(b"served"))

    agent.handlers["/proxy/3000/a"] = closes
    async with calling(rig.port) as caller:
        for _ in range(ROUNDS):
            for method, body in (("GET", b""), ("POST", b"x"), ("PUT", b""), ("DELETE", b"")):
                caller.writer.write(get(sandbox, "a", f"Content-Length: {len(body)}", method=method) + body)
                assert (await caller.reply()).body == b"served"
    for method in ("POST", "PUT", "DELETE"):
        assert sum(each.method == method for each in agent.requests) == ROUNDS
    assert closed > ROUNDS / 3, "there were connections that had ended"


async def test_a_new_connection_that_ends_is_not_tried_again(rig: Rig, agent: Agent, sandbox: UUID):
    async def ends(_request: Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    agent.handlers["/proxy/3000/ends"] = ends
    for method in ("GET", "PUT", "DELETE", "POST"):
        assert (await say(rig.port, get(sandbox, "ends", method=method))).code == "BACKEND_RESPONSE_FAILED"
    assert [each.method for each in agent.requests] == ["GET", "PUT", "DELETE", "POST"]
