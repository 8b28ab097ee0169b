"""Requests to a sandbox through the proxy, beside the same requests sent directly and through a bare proxy on aiohttp.

The sandbox is a process that answers on a raw protocol, so that it is not what is measured. All of a case is one run on
one machine, in turns.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import aiohttp

from app.domain.engine.decide import Sighting
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Address, Observed, Part, Power
from app.domain.sandbox.spec import SandboxSpec
from app.domain.tenants import ANY_TENANT
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.installation import read_installation
from app.store.database.pool import Database
from app.store.log.signal import Signal
from tests.bench.figures import Figure, at_least, at_most, ms
from tests.bench.http import Client, latencies, p50, throughput
from tests.bench.servers import memory_mib, running
from tests.bench.stage import LARGE, LIMITS, META, Bench

COUNT = 20_000 if LARGE else 6_000
BULK_BYTES = 1024 * 1024 * 1024 if LARGE else 256 * 1024 * 1024
ROUNDS = 5
STREAMS = 500
"""Of one sandbox 512 are allowed."""
_MODULE = "tests.bench.backends"


class Ways:
    """Three ways to the same program: base URL and path before its own."""

    def __init__(self, direct: str, bare: str, ours: str, sandbox: UUID, pid: int, config: str) -> None:
        self.server, self.pid, self.config = ours, pid, config
        self.sandbox = sandbox
        own = "/proxy/3000"
        self.ways = {
            "direct": (direct, own),
            "bare": (bare, own),
            "ours": (ours, f"/v1/sandboxes/{sandbox}{own}"),
        }


@asynccontextmanager
async def ways(bench: Bench) -> AsyncGenerator[Ways]:
    """A server, a bare proxy, and a sandbox that the log says runs at the backend's address."""
    dsn = await bench.fresh()
    config = bench.config(dsn)
    with (
        running(["agent"], _MODULE) as (direct, _),
        running(["bare", direct], _MODULE) as (bare, _),
        running([config, "api", "fake"]) as (ours, pid),
    ):
        yield Ways(direct, bare, ours, await _sandbox(dsn, urlsplit(direct).netloc), pid, config)


async def _sandbox(dsn: str, address: str) -> UUID:
    database = Database(dsn)
    signal = Signal(database)
    service = Service(database, signal)
    sighting = Sighting("default", "fake", "bench", "bench", "1", "1")
    installation = (await read_installation(database)).id
    await Engines(database, signal, installation, service.engines).register(sighting, META)
    sandbox = uuid4()
    requested = ev.Requested(SandboxSpec("img", ("sleep", "1"), LIMITS), "f", timeout_s=3600)
    await service.create(sandbox, "default", requested, None, META)
    parts = (Part("main", "bench", "bench"),)
    shown = Observed(sandbox, parts, Power.RUNNING, address=Address("bridge", "172.17.0.2", {"44772": address}))
    await service.execute(sandbox, ANY_TENANT, cmd.RecordSeen(shown), META)
    await database.close()
    return sandbox


def asking(prefix: str) -> Callable[[Client], Awaitable[None]]:
    async def ask(client: Client) -> None:
        status, data = await client.request("GET", f"{prefix}/small")
        assert (status, len(data)) == (200, 100), data

    return ask


async def small(bench: Bench) -> Sequence[Figure]:
    """Small requests: the rate at 32 connections, and the time that is added on one."""
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    times: dict[str, list[float]] = {"direct": [], "bare": [], "ours": []}
    async with ways(bench) as three:
        for _ in range(ROUNDS):
            for name, into in rates.items():
                base, prefix = three.ways[name]
                into.append(await throughput(base, asking(prefix), COUNT // ROUNDS, 32))
            for name in times:
                base, prefix = three.ways[name]
                times[name] += await latencies(base, asking(prefix), 200)
    mine, floor = p50(rates["ours"]), p50(rates["bare"])
    added = {name: p50(times[name]) - p50(times["direct"]) for name in ("bare", "ours")}
    return [
        at_least("proxied small requests, 32 connections", f"{mine:.0f}/s", f"bare {floor:.0f}/s", mine / floor, 0.65),
        at_most(
            "added by the proxy, 1 connection, p50",
            ms(added["ours"]),
            f"added by the bare proxy {ms(added['bare'])}",
            added["ours"] / added["bare"],
            1.0,
        ),
    ]


def _connect(base: str) -> socket.socket:
    parts = urlsplit(base)
    assert parts.hostname and parts.port
    return socket.create_connection((parts.hostname, parts.port))


def _down(base: str, prefix: str, size: int) -> float:
    """Seconds of a download, on a blocking socket."""
    with _connect(base) as taken:
        began = time.perf_counter()
        taken.sendall(f"GET {prefix}/down?{size} HTTP/1.1\r\nHost: {urlsplit(base).netloc}\r\n\r\n".encode())
        buffer = bytearray(1024 * 1024)
        got = taken.recv_into(buffer)
        left = size + bytes(buffer[:got]).index(b"\r\n\r\n") + 4 - got
        while left:
            left -= (got := taken.recv_into(buffer))
            assert got, "the answer ended early"
        return time.perf_counter() - began


def _up(base: str, prefix: str, size: int) -> float:
    """Seconds of an upload, until its answer."""
    piece = bytes(256 * 1024)
    with _connect(base) as taken:
        began = time.perf_counter()
        host = urlsplit(base).netloc
        taken.sendall(f"POST {prefix}/up HTTP/1.1\r\nHost: {host}\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(size // len(piece)):
            taken.sendall(piece)
        assert taken.recv(4096).startswith(b"HTTP/1.1 200")
        return time.perf_counter() - began


async def bulk(bench: Bench) -> Sequence[Figure]:
    """One large body in each direction, and what four of them do to the API."""
    spent: dict[tuple[str, str], list[float]] = {}
    async with ways(bench) as three:
        for _ in range(ROUNDS):
            for name, (base, prefix) in three.ways.items():
                for kind, act in (("down", _down), ("up", _up)):
                    took = await asyncio.to_thread(act, base, prefix, BULK_BYTES)
                    spent.setdefault((kind, name), []).append(took)
        idle, loaded = await _beside(three)
    rate = {key: BULK_BYTES / min(took) / 1e6 for key, took in spent.items()}

    def figure(kind: str, floor: str, target: float) -> Figure:
        mine, other = rate[kind, "ours"], rate[kind, floor]
        what = {"down": "download", "up": "upload"}[kind]
        return at_least(
            f"{what} through the proxy", f"{mine:.0f} MB/s", f"{floor} {other:.0f} MB/s", mine / other, target
        )

    return [
        figure("down", "direct", 0.7),
        figure("up", "bare", 0.9),
        at_most("GET by id under 4 bulk streams, p50", ms(loaded), f"idle {ms(idle)}", loaded / idle, 3),
    ]


async def _beside(three: Ways) -> tuple[float, float]:
    """(p50 of the API while nothing else happens, the same under four downloads by another process)."""

    async def one(client: Client) -> None:
        status, data = await client.request("GET", f"/v1/sandboxes/{three.sandbox}")
        assert status == 200, data

    idle = p50(await latencies(three.server, one, 200))
    base, prefix = three.ways["ours"]
    with running(["pour", base, f"{prefix}/down?{BULK_BYTES // 4}"], _MODULE):
        await asyncio.sleep(1)  # until the downloads run at their full rate
        return idle, p50(await latencies(three.server, one, 200))


async def _close(writers: Sequence[asyncio.StreamWriter]) -> None:
    """And wait: a server that is stopped would wait for them, while nothing here runs that closes them."""
    for writer in writers:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for writer in writers))


async def streams(bench: Bench) -> Sequence[Figure]:
    """What an event stream costs that is open and silent."""
    async with ways(bench) as three:
        base, prefix = three.ways["ours"]
        parts = urlsplit(base)
        await throughput(base, asking(prefix), 1000, 32)
        before = memory_mib(three.pid)
        writers: list[asyncio.StreamWriter] = []
        for _ in range(STREAMS):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(f"GET {prefix}/events HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
            await reader.readuntil(b".\r\n")
            writers.append(writer)
        kib = (memory_mib(three.pid) - before) * 1024 / len(writers)
        await _close(writers)
    return [Figure("memory of a silent event stream", f"{kib:.1f} KiB", target="<= 24 KiB", met=kib <= 24)]


ECHOES = 40_000 if LARGE else 12_000
MESSAGE = bytes(64)


async def _echo_rate(base: str, prefix: str, connections: int, count: int) -> float:
    """Echoes a second, as a client on aiohttp sees them. The backend sends back what it reads, byte by byte."""
    each = count // connections

    async def work(opened: aiohttp.ClientWebSocketResponse) -> None:
        for _ in range(each):
            await opened.send_bytes(MESSAGE)
            await opened.receive_bytes()

    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        url = f"{base}{prefix}/ws"
        made = [await stack.enter_async_context(session.ws_connect(url)) for _ in range(connections)]
        began = time.perf_counter()
        await asyncio.gather(*map(work, made))
        return each * connections / (time.perf_counter() - began)


async def _idle_websocket(three: Ways) -> float:
    """KiB that each of many costs the server."""
    base, prefix = three.ways["ours"]
    parts = urlsplit(base)
    before = memory_mib(three.pid)
    writers: list[asyncio.StreamWriter] = []
    for _ in range(STREAMS):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(
            f"GET {prefix}/ws HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        writers.append(writer)
    kib = (memory_mib(three.pid) - before) * 1024 / len(writers)
    await _close(writers)
    return kib


async def websockets(bench: Bench) -> Sequence[Figure]:
    """Echoes of small messages beside a direct connection, and what an idle WebSocket costs."""
    rates: dict[tuple[str, int], list[float]] = {}
    async with ways(bench) as three:
        for _ in range(ROUNDS):
            for connections in (1, 32):
                for name in ("direct", "ours"):
                    rate = await _echo_rate(*three.ways[name], connections, ECHOES // ROUNDS)
                    rates.setdefault((name, connections), []).append(rate)
        kib = await _idle_websocket(three)

    def figure(connections: int, target: float) -> Figure:
        mine, direct = p50(rates["ours", connections]), p50(rates["direct", connections])
        what = f"WebSocket echoes of 64 bytes, {connections} connection{'s' * (connections > 1)}"
        return at_least(what, f"{mine:.0f}/s", f"direct {direct:.0f}/s", mine / direct, target)

    return [
        figure(1, 0.7),
        figure(32, 0.4),
        Figure("memory of an idle WebSocket", f"{kib:.1f} KiB", target="<= 8 KiB", met=kib <= 8),
    ]
