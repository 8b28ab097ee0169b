"""A keep-alive HTTP/1.1 client on bare streams, so that the client is not what is measured."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import msgspec


class Client:
    """One connection."""

    def __init__(self, base: str) -> None:
        parts = urlsplit(base)
        assert parts.hostname and parts.port
        self._host, self._port = parts.hostname, parts.port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(self, method: str, path: str, body: object = None, headers: str = "") -> tuple[int, bytes]:
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        data = b"" if body is None else msgspec.json.encode(body)
        kind = "Content-Type: application/json\r\n" if body is not None else ""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n{kind}{headers}Content-Length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        status = int(answer[9:12])
        lower = answer.lower()
        start = lower.find(b"content-length:")
        length = 0 if start < 0 else int(lower[start + 15 : lower.index(b"\r\n", start)])
        return status, await self._reader.readexactly(length) if length else b""

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


Call = Callable[[Client], Awaitable[object]]


async def latencies(base: str, call: Call, count: int, warmup: int = 20) -> list[float]:
    """Seconds a call, one client, one after another."""
    client = Client(base)
    times: list[float] = []
    for n in range(count + warmup):
        began = time.perf_counter()
        await call(client)
        if n >= warmup:
            times.append(time.perf_counter() - began)
    await client.close()
    return times


async def throughput(base: str, call: Call, count: int, clients: int) -> float:
    """Calls a second with so many clients."""
    connections = [Client(base) for _ in range(clients)]

    async def work(client: Client) -> None:
        for _ in range(count // clients):
            await call(client)

    for client in connections:
        await call(client)
    began = time.perf_counter()
    await asyncio.gather(*map(work, connections))
    spent = time.perf_counter() - began
    for client in connections:
        await client.close()
    return (count // clients) * clients / spent


def p50(times: list[float]) -> float:
    return statistics.median(times)
