"""Clients and programs that mean harm, through sockets: what they send in pieces, in a circle, or behind the end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.settings import ProxySettings, Settings
from app.settings.schema import ServerSettings
from tests.api.conftest import MakeContext
from tests.proxy.rig import VIA, Agent, Holding, Request, Rig, answer, calling, request, say, serving
from tests.proxy.test_states import streams_are

MIB = 1024 * 1024
WILDCARD = Settings(proxy=ProxySettings(wildcard="*.boxes.test"), server=ServerSettings(limit_concurrency=20))


@pytest.fixture
async def wild(make_context: MakeContext) -> AsyncIterator[Rig]:
    """Both forms, and few places of the API."""
    async with serving(make_context(api_key=None), settings=WILDCARD) as made:
        yield made


def memory() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Behind the body


async def test_extensions_of_chunks_and_trailers_go_nowhere(rig: Rig, agent: Agent, sandbox: UUID):
    """A server that took a trailer for a header would take a forged one."""
    body = b"2;a=b\r\nab\r\n1;x\r\nc\r\n0;last\r\nX-Forwarded-For: 6.6.6.6\r\nCookie: a=b\r\nHost: evil\r\n\r\n"
    async with calling(rig.port) as caller:
        for _ in range(2):
            caller.writer.write(
                request(f"/sandboxes/{sandbox}/proxy/3000/a", "Transfer-Encoding: chunked", method="POST") + body
            )
            assert (await caller.reply()).status == 200
    assert [each.body for each in agent.requests] == [b"abc"] * 2
    for each in agent.requests:
        assert b"6.6.6.6" not in each.head
        assert each.all("cookie") == []
        assert each.all("host") == ["127.0.0.1"]


async def test_those_of_answers_neither(rig: Rig, agent: Agent, sandbox: UUID):
    async def handler(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Set-Cookie\r\n\r\n"
            b"2;a=b\r\nab\r\n0;last\r\nSet-Cookie: a=b; Domain=evil\r\nSandledger-Error: forged\r\n\r\n"
        )

    agent.handlers["/proxy/3000/a"] = handler
    async with calling(rig.port) as caller:
        for _ in range(2):
            caller.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/a"))
            reply = await caller.reply()
            assert (reply.status, reply.body) == (200, b"ab")
            for name in ("set-cookie", "sandledger-error", "trailer"):
                assert reply.all(name) == []


@pytest.mark.parametrize("endless", [b"X-A: " + b"a" * 8000 + b"\r\n", b"a" * 8000], ids=["many", "one"])
@pytest.mark.parametrize("to_sandbox", [True, False], ids=["sandbox", "api"])
async def test_trailers_without_end_cost_no_memory(
    rig: Rig, agent: Agent, sandbox: UUID, endless: bytes, to_sandbox: bool
):
    path = f"/sandboxes/{sandbox}/proxy/3000/a" if to_sandbox else "/v1/sandboxes"
    before = memory()
    async with calling(rig.port) as caller:
        caller.writer.write(
            request(path, "Transfer-Encoding: chunked", "Content-Type: application/json", method="POST")
            + b"2\r\n{}\r\n0\r\nX-B: "
        )
        sent = 0
        try:
            while sent < 64 * MIB:
                caller.writer.write(endless)
                await caller.writer.drain()
                sent += len(endless)
        except ConnectionError:
            pass
    assert memory() - before < 16 * MIB
    assert sent < 64 * MIB, "the connection ends"
    assert (await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/a"))).status == 200


# Forged


TO_SANDBOX = {
    "X-Forwarded-For": "127.0.0.1",
    "X-Forwarded-Proto": "http",
    "X-Forwarded-Host": None,
    "X-Real-IP": "127.0.0.1",
    "Forwarded": None,
    "X-EXECD-ACCESS-TOKEN": None,
    "OPENSANDBOX-EGRESS-AUTH": "",
    "OpenSandbox-Secure-Access": "",
    "OpenSandbox-Access-Renew": "",
    "Sandledger-Anything": "",
    "Proxy-Authorization": "",
    "TE": "",
    "Keep-Alive": "",
    "Expect-Not": "forged",
}
"""What the program sees instead of `forged`: empty = nothing, None = something of ours."""
TO_CLIENT = {
    "Sandledger-Error": False,
    "Sandledger-Generation": False,
    "Keep-Alive": False,
    "Proxy-Connection": False,
    "Upgrade": False,
    "Server": False,
    "X-Accel-Redirect": False,
    "X-Sendfile": False,
    "X-App": True,
    "Date": True,
    "ETag": True,
}
"""Whether the client sees what the program says."""


@pytest.mark.parametrize("by_host", [False, True], ids=["path", "host"])
async def test_every_header_that_may_be_forged(wild: Rig, agent: Agent, by_host: bool):
    """Each in its own writing and with `_` for `-`, twice; both forms; both directions."""
    sandbox = await wild.running(agent)
    named = {"host": f"3000-{sandbox}.boxes.test"} if by_host else {}
    path = "/a" if by_host else f"/sandboxes/{sandbox}/proxy/3000/a"

    async def handler(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(headers="".join(f"{name}: said\r\n" for name in TO_CLIENT)))

    agent.handlers["/proxy/3000/a"] = handler
    for name, expected in TO_SANDBOX.items():
        for written in (name, name.upper(), name.replace("-", "_")):
            reply = await say(wild.port, request(path, f"{written}: forged", f"{written}: forged", **named))
            assert reply.status == 200, (written, reply.body)
            got = agent.requests[-1]
            if expected == "forged":
                assert got.all(written.lower()) == ["forged"] * 2
                continue
            assert b"forged" not in got.head, written
            found = got.all(name.lower())
            assert len(found) == (0 if expected == "" else 1), written
            if expected:
                assert found == [expected]
    for name, passes in TO_CLIENT.items():
        assert reply.all(name.lower()) == (["said"] if passes else []), name


LINE = st.one_of(
    st.binary(min_size=1, max_size=30),
    st.builds(
        lambda name, colon, value: name + colon + value,
        st.sampled_from([b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Via", b"X-A", b"Cookie"]),
        st.sampled_from([b": ", b":", b" : ", b"\t:"]),
        st.sampled_from([b"chunked", b"0", b"5", b"-1", b"close", b"x-execd-access-token", b"\x00", b"a\x7f", b"\xff"]),
    ),
)


async def test_any_head_is_one_request_or_none(rig: Rig, agent: Agent, sandbox: UUID):
    """Whatever stands in it. What arrives has our token and one framing, and nothing of it becomes a second request."""
    target = f"/sandboxes/{sandbox}/proxy/3000/a".encode()

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(LINE, max_size=6), st.sampled_from([b"\r\n", b"\n"]))
    def check(lines: list[bytes], end: bytes) -> None:
        before = len(agent.requests)
        with socket.create_connection(("127.0.0.1", rig.port)) as taken:
            taken.settimeout(20)
            head = end.join([b"POST " + target + b" HTTP/1.1", b"Host: a", *lines, b"", b""])
            taken.sendall(head + b"0\r\n\r\n")
            taken.shutdown(socket.SHUT_WR)
            while taken.recv(65536):
                pass
        arrived = agent.requests[before:]
        assert len([each for each in arrived if each.target == "/proxy/3000/a"]) <= 1
        assert len(arrived) <= 1
        for each in arrived:
            assert each.all("x-execd-access-token") == [agent.token]
            assert len(each.all("host")) == len(each.all("x-forwarded-for")) == 1
            assert each.all("cookie") == []

    await asyncio.to_thread(check)
    assert (await say(rig.port, request(target.decode()))).status == 200


# In a circle


async def test_a_sandbox_that_calls_itself_is_stopped(rig: Rig, agent: Agent, sandbox: UUID):
    """It passes on what it got, as a proxy does. Otherwise one request would take all places there are."""
    path = f"/sandboxes/{sandbox}/proxy/3000/a"

    async def calls_itself(got: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        via = [f"Via: {value}" for value in got.all("via")]
        reply = await say(rig.port, request(path, *via))
        writer.write(answer(reply.body, f"{reply.status} Passed On"))

    agent.handlers["/proxy/3000/a"] = calls_itself
    reply = await say(rig.port, request(path))
    assert (reply.status, b"PROXY::LOOP" in reply.body) == (508, True)
    assert [len(each.all("via")) for each in agent.requests] == [1, 2, 3, 4]
    assert agent.requests[0].all("via") == [f"1.1 {VIA}"]
    await streams_are(rig, 0)


# Slow


async def test_slow_clients_harm_nobody_else(wild: Rig, agent: Agent):
    """Heads and bodies that never end, to the API and to a sandbox, more of them than the API has places. Others are
    answered, and when the slow ones have left nothing of them is left.
    """
    slow, other = await wild.running(agent), await wild.pending()
    await wild.runs(other, {"44772": agent.address})
    agent.raw["/proxy/3000/up"] = Holding(b"")
    agent.token = ""  # one agent stands for both
    up = request(f"/sandboxes/{slow}/proxy/3000/up", "Content-Length: 100", method="POST")
    async with AsyncExitStack() as stack:

        async def begin(sent: bytes, count: int) -> None:
            for _ in range(count):
                caller = await stack.enter_async_context(calling(wild.port))
                caller.writer.write(sent)

        await begin(up + b"a", 40)
        await agent.until(lambda: len(agent.requests) == 40)
        await begin(up[:-4], 40)
        await begin(b"GET /v1/sand", 40)
        for at in (slow, other):
            # Not a GET, whose connection would be kept for the next one.
            assert (await say(wild.port, request(f"/sandboxes/{at}/proxy/3000/a", method="POST"))).status == 200
        assert (await say(wild.port, request("/v1/sandboxes"))).status == 200
        assert wild.relay.streams.open == 40
    await agent.until(lambda: not agent.open)
    await streams_are(wild, 0)
