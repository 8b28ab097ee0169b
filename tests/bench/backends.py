"""What stands beside the proxy when it is measured: a backend on a raw protocol, and the bare proxy that is the floor.

`python -m tests.bench.backends agent`, `... bare TARGET` and, for what only makes load, `... pour BASE PATH`.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from base64 import b64encode
from hashlib import sha1
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import uvloop
from aiohttp import web

SMALL = b"x" * 100
PIECE = b"\x00" * 65536
LENGTH = b"content-length: "
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %b\r\n\r\n"
)
KEY = b"sec-websocket-key: "
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""Of RFC 6455."""


class Backend(asyncio.Protocol):
    """Answers `.../small`, `.../down?bytes`, `.../events`, echoes on `.../ws`, takes any body. Asks for no token."""

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0
        """Bytes of a body that have not come."""
        self._to_send = 0
        self._transport: Any = None
        self._paused = False
        self._echoes = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._send()

    def data_received(self, data: bytes) -> None:
        if self._echoes:
            self._transport.write(data)
            return
        if self._left:
            taken = min(self._left, len(data))
            self._left -= taken
            data = data[taken:]
            if not self._left:
                self._answer(SMALL)
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._request(head.lower(), head)

    def _request(self, head: bytes, sent: bytes) -> None:
        path = head.split(b" ", 2)[1]
        if b"/down?" in path:
            self._to_send = int(path.partition(b"?")[2])
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % self._to_send)
            self._send()
        elif b"/ws" in path:
            self._echoes = True
            at = head.index(KEY) + len(KEY)
            key = sent[at:].split(b"\r\n")[0]
            self._transport.write(SWITCHED % b64encode(sha1(key + GUID, usedforsecurity=False).digest()))
        elif b"/events" in path:
            self._transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n")
        elif LENGTH in head and (length := int(head.partition(LENGTH)[2].split(b"\r\n")[0])):
            self._left = length - len(self._buffer)
            self._buffer = b""
            if not self._left:
                self._answer(SMALL)
        else:
            self._answer(SMALL)

    def _answer(self, body: bytes) -> None:
        self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    def _send(self) -> None:
        while self._to_send and not self._paused and not self._transport.is_closing():
            piece = PIECE[: self._to_send]
            self._to_send -= len(piece)
            self._transport.write(piece)


async def agent() -> None:
    server = await asyncio.get_running_loop().create_server(Backend, "127.0.0.1", 0, backlog=2048)
    print(f"API http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await asyncio.Event().wait()


async def bare(target: str) -> None:
    """As short as such a proxy can be on aiohttp: no key, no headers looked at, no limits."""
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    )

    async def relay(request: web.Request) -> web.StreamResponse:
        async with session.request(
            request.method,
            target + request.raw_path,
            headers=request.headers,
            data=request.content if request.body_exists else None,
            allow_redirects=False,
        ) as found:
            headers = {"Content-Length": found.headers["Content-Length"]}
            response = web.StreamResponse(status=found.status, headers=headers)
            await response.prepare(request)
            async for piece in found.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", relay)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"API http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await asyncio.Event().wait()


def pour(base: str, path: str) -> None:
    """Four downloads, again and again, as fast as they go."""
    parts = urlsplit(base)

    def one() -> None:
        buffer = bytearray(1024 * 1024)
        while True:
            with socket.create_connection((parts.hostname, parts.port)) as taken:
                taken.sendall(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                while taken.recv_into(buffer):
                    pass

    for _ in range(4):
        threading.Thread(target=one, daemon=True).start()
    print("API pours", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["agent"]:
            uvloop.run(agent())
        case ["bare", target]:
            uvloop.run(bare(target))
        case [_, base, path]:
            pour(base, path)
