"""WebSockets as bytes: a handshake, programs behind it, and what a client reads."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from uuid import UUID

from tests.proxy.rig import (
    Caller,
    Reply,
    Request,
    Rig,
    calling,
    request,
)

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


async def refused(rig: Rig, sent: bytes) -> tuple[int, str]:
    """The refusal, which is the last thing on its connection."""
    async with calling(rig.port) as caller:
        caller.writer.write(sent + b"\x81\x80aaaa" + HIDDEN)
        reply = await caller.reply()
        assert reply.one("connection") == "close"
        assert await ended(caller) == b"", "nothing behind the head is a request"
        return reply.status, reply.code
