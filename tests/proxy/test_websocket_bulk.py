"""Large pieces wait while the lifecycle API is in use; all of them arrive, and the small ones never wait."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from uuid import UUID

from app.proxy.pace import BULK_BYTES, CHARGE_SECONDS, Pace
from tests.proxy.rig import Agent, Request, Rig, answer, calling, request, say
from tests.proxy.websockets import ACCEPTED, MIB, echo_back, echoes, handshake, opened

CHUNK = bytes(range(256)) * 4096
TOTAL = 8 * MIB


class Worked:
    """How long the thread has worked, as a test says it."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def left(pace: Pace) -> float:
    """Seconds until the next piece may go, to the millisecond."""
    return round(pace._free_at - asyncio.get_running_loop().time(), 3)


async def test_nothing_waits_while_the_api_is_not_in_use():
    worked = Worked()
    pace = Pace(worked)
    for _ in range(5):
        worked.seconds += 1
        assert not pace.must_wait(MIB)


async def test_large_pieces_wait_for_as_long_as_was_worked():
    worked = Worked()
    pace = Pace(worked)
    worked.seconds = 100
    pace.asked()
    assert not pace.must_wait(MIB), "what was worked before does not count"
    worked.seconds += 0.004
    assert not pace.must_wait(BULK_BYTES - 1)
    assert pace.must_wait(BULK_BYTES)
    assert left(pace) <= 2 * 0.004
    first = pace._free_at
    worked.seconds += 0.004
    assert pace.must_wait(BULK_BYTES)
    assert pace._free_at - first >= 0.0079, "the next one goes behind it"


async def test_an_api_that_is_never_idle_stops_no_stream():
    """Otherwise a piece would wait for twice as long as the one before, and again."""
    worked = Worked()
    pace = Pace(worked)
    for _ in range(10):
        pace.asked()
        worked.seconds += 5
        assert pace.must_wait(MIB)
        assert left(pace) <= 2 * CHARGE_SECONDS
        await pace.turn()


async def _ask_all_the_time(rig: Rig) -> None:
    while True:
        assert (await say(rig.port, request("/v1/sandboxes"))).status == 200


async def test_all_that_waits_arrives(rig: Rig, agent: Agent, sandbox: UUID):
    """Over a WebSocket both ways, and as bodies both ways, while the API is asked all the time."""
    seen: list[bytes] = []

    async def takes(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        digest = sha256()
        for _ in range(TOTAL // MIB):
            digest.update(await reader.readexactly(MIB))
        seen.append(digest.digest())
        writer.write(answer(digest.digest()))

    async def gives(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {TOTAL}\r\n\r\n".encode())
        for _ in range(TOTAL // MIB):
            writer.write(CHUNK)
            await writer.drain()

    async def answers(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\n")
        await takes(_request, reader, writer)
        await gives(_request, reader, writer)

    agent.raw["/proxy/3000/up"] = takes
    agent.handlers["/proxy/3000/down"] = gives
    agent.handlers["/proxy/3000/ws"] = answers
    expected = sha256(CHUNK * (TOTAL // MIB)).digest()
    path = f"/sandboxes/{sandbox}/proxy/3000"
    asking = asyncio.create_task(_ask_all_the_time(rig))
    for socket in (False, True):
        async with calling(rig.port) as caller:
            if socket:
                await opened(caller, handshake(sandbox))
            else:
                caller.writer.write(request(f"{path}/up", f"Content-Length: {TOTAL}", method="POST"))
            for _ in range(TOTAL // MIB):
                caller.writer.write(CHUNK)
                await caller.writer.drain()
            assert (await caller.reply()).body == expected
            if not socket:
                caller.writer.write(request(f"{path}/down"))
            head, length = await caller.head()
            assert length == TOTAL, head
            digest = sha256()
            for _ in range(TOTAL // MIB):
                digest.update(await caller.reader.readexactly(MIB))
            assert digest.digest() == expected
    assert seen == [expected] * 2
    assert not asking.done()
    asking.cancel()


async def test_a_pair_that_ends_while_it_waits(rig: Rig, agent: Agent, sandbox: UUID, echo: None):
    """Its turn comes when nothing is left of it."""
    assert agent.handlers["/proxy/3000/ws"] is echoes
    for _ in range(20):
        rig.relay.pace.asked()
        async with calling(rig.port) as caller:
            await opened(caller, handshake(sandbox))
            await echo_back(caller, b"x")
            caller.writer.write(CHUNK)
            await caller.reader.readexactly(BULK_BYTES)
        await agent.until(lambda: not agent.open)
    async with calling(rig.port) as caller:
        await opened(caller, handshake(sandbox))
        await echo_back(caller, b"x")
