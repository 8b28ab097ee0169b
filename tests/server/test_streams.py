"""Streams to sandboxes in server processes: what they cost, what another process does to them, and the stop."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest

from app.service.sandboxes import Service
from tests.chaos.harness import KEY, ServerProcess, body, until, write_config
from tests.proxy.rig import Agent, Caller, Holding, Request, Rig, agent, answer, calling, request
from tests.proxy.websockets import ACCEPTED, MIB, echo_back, echoes, ended, handshake, opened
from tests.support.hold import held
from tests.support.sql import connected

NONE = "unix:///nonexistent/engine.sock"
LARGE = 200 * MIB
OF_OTHERS = 20
"""Files that a server may have opened meanwhile for other reasons: connections to its database, and of other clients."""
EVENTS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n"


@pytest.fixture
def home() -> Iterator[Path]:
    """Where servers of one database have their key."""
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@contextmanager
def server(home: Path, dsn: str, name: str = "server", proxy: str = "", **tables: str) -> Iterator[ServerProcess]:
    made = ServerProcess(write_config(home, dsn, NONE, name, more=f"[proxy]\n{proxy}", **tables), role="api")
    try:
        yield made.start()
    finally:
        made.kill()


def port_of(server: ServerProcess) -> int:
    port = urlsplit(server.base).port
    assert port is not None
    return port


@pytest.fixture
async def theirs() -> AsyncIterator[Agent]:
    async with agent() as made:
        made.handlers["/proxy/3000/ws"] = echoes
        yield made


async def runs_at(service: Service, at: Agent) -> UUID:
    """A sandbox whose agent does not look at the token: the key of the installation is the server's."""
    sandbox = await Rig(0, None, service).running(at)
    at.token = ""
    return sandbox


def memory(server: ServerProcess) -> int:
    """Resident bytes."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


async def test_a_thousand_idle_websockets(home: Path, dsn: str, service: Service, theirs: Agent):
    """They cost at most 8 KiB each, and none of them is left when their clients are gone."""
    with server(home, dsn) as one:
        async with AsyncExitStack() as stack:

            async def open_some(count: int) -> list[Caller]:
                sandbox = await runs_at(service, theirs)
                callers = [await stack.enter_async_context(calling(port_of(one))) for _ in range(count)]
                for caller in callers:
                    await opened(caller, handshake(sandbox, key=KEY))
                return callers

            await open_some(300)
            before = memory(one)
            callers = [*await open_some(500), *await open_some(500)]
            each = (memory(one) - before) / len(callers)
            for caller in callers:
                await echo_back(caller, b"x")
        await theirs.until(lambda: not theirs.open)
        assert "Traceback" not in one.log.read_text()
    assert each <= 8 * 1024, f"{each:.0f} bytes"


@pytest.mark.proof
async def test_large_bodies_cost_no_memory(home: Path, dsn: str, service: Service, theirs: Agent):
    """200 MiB down to a reader that stops again and again, up to a program that does, and over a WebSocket both ways."""

    async def takes(_request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in range(LARGE // MIB):
            await reader.readexactly(MIB)
            await asyncio.sleep(0.01 if number % 20 == 0 else 0)  # the pace of this program
        writer.write(answer(b"taken"))

    async def gives(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n".encode())
        for _ in range(LARGE // MIB):
            writer.write(bytes(MIB))
            await writer.drain()

    async def both(got: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ACCEPTED + b"\r\n")
        await takes(got, reader, writer)
        await gives(got, reader, writer)

    theirs.raw["/proxy/3000/up"], theirs.handlers["/proxy/3000/down"] = takes, gives
    theirs.handlers["/proxy/3000/both"] = both
    sandbox = await runs_at(service, theirs)
    path = f"/sandboxes/{sandbox}/proxy/3000"
    with server(home, dsn) as one:
        peak = 0
        async with calling(port_of(one)) as caller, calling(port_of(one)) as other:
            caller.writer.write(request(f"{path}/a", key=KEY))
            await caller.reply()
            before = memory(one)
            caller.writer.write(request(f"{path}/up", f"Content-Length: {LARGE}", method="POST", key=KEY))
            await opened(other, handshake(sandbox, "both", key=KEY))
            for each in (caller, other):
                for _ in range(LARGE // MIB):
                    each.writer.write(bytes(MIB))
                    await each.writer.drain()
                    peak = max(peak, memory(one))
                assert (await each.reply()).body == b"taken"
            caller.writer.write(request(f"{path}/down", key=KEY))
            for each in (caller, other):
                await each.head()
                for number in range(LARGE // MIB):
                    await each.reader.readexactly(MIB)
                    await asyncio.sleep(0.01 if number % 20 == 0 else 0)  # the pace of this reader
                    peak = max(peak, memory(one))
    assert peak - before <= 8 * MIB, f"{(peak - before) / MIB:.1f} MiB"


@pytest.mark.proof
async def test_a_thousand_of_both_kinds_leave_nothing(home: Path, dsn: str, service: Service, theirs: Agent):
    """1,000 WebSockets and 1,000 event streams, all silent, whose clients leave at once without a word."""
    theirs.handlers["/proxy/3000/events"] = Holding(EVENTS)
    with server(home, dsn) as one:
        files = Path(f"/proc/{one.pid}/fd")
        async with calling(port_of(one)) as caller, one.client() as client:
            sandboxes = [await runs_at(service, theirs) for _ in range(5)]
            caller.writer.write(request(f"/sandboxes/{sandboxes[0]}/proxy/3000/a", key=KEY))
            await caller.reply()
            before = len(list(files.iterdir()))
            async with AsyncExitStack() as stack:
                for number in range(2000):
                    sandbox = sandboxes[number % 5]
                    each = await stack.enter_async_context(calling(port_of(one)))
                    if number < 1000:
                        await opened(each, handshake(sandbox, key=KEY))
                    else:
                        each.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/events", key=KEY))
                        await each.head()
                assert len(theirs.open) >= 2000
                assert (await client.post("/sandboxes", json=body("image:1"))).status_code == 202
            await theirs.until(lambda: len(theirs.open) <= 1)

            async def closed() -> bool:
                return len(list(files.iterdir())) <= before + OF_OTHERS

            await until(closed, "the server has closed its sockets")


async def test_a_delete_in_one_process_cuts_what_another_carries(home: Path, dsn: str, service: Service, theirs: Agent):
    sandbox, other = await runs_at(service, theirs), await runs_at(service, theirs)
    with server(home, dsn, "one") as one, server(home, dsn, "two") as two:
        async with calling(port_of(one)) as caller, calling(port_of(one)) as others, two.client() as client:
            await opened(caller, handshake(sandbox, key=KEY))
            await opened(others, handshake(other, key=KEY))
            assert (await client.delete(f"/sandboxes/{sandbox}")).status_code == 204
            assert await ended(caller) == b""
            await echo_back(others, b"still there")


async def test_a_stop_lets_streams_go_on_and_not_requests_of_the_api(
    home: Path, dsn: str, service: Service, theirs: Agent
):
    """A request of the API that hangs gets its own time, a second. The streams live on after that, until they end."""
    sandbox = await runs_at(service, theirs)
    events = theirs.handlers["/proxy/3000/events"] = Holding(EVENTS)
    with server(home, dsn, proxy="drain_seconds = 600", server="timeout_graceful_shutdown = 1") as one:
        port = port_of(one)
        async with calling(port) as caller, calling(port) as reading, one.client() as client:
            await opened(caller, handshake(sandbox, key=KEY))
            reading.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/events", key=KEY))
            await reading.head()
            made = (await client.post("/sandboxes", json=body("image:1"))).json()["id"]
            async with held(dsn, UUID(made)) as hold:
                deleting = asyncio.create_task(client.delete(f"/sandboxes/{made}"))
                await until(hold.keeps_waiting(1), "the delete waits for its row")
                one.send(signal.SIGTERM)
                with pytest.raises(httpx.HTTPError):
                    (await deleting).raise_for_status()
                await hold.let_go()
            with pytest.raises(OSError):
                async with calling(port):
                    pass
            await echo_back(caller, b"still there")
            events.rest = b"1\r\n!\r\n0\r\n\r\n"
            events.go.set()
            assert [await reading.chunk() for _ in range(3)] == [b".", b"!", b""]
            await echo_back(caller, b"still there")
        assert await asyncio.to_thread(one.wait, 30) == 0
    async with connected(dsn) as reader:
        moved = await reader.fetchrow(
            "SELECT requests, bytes_in, bytes_out FROM activity WHERE sandbox_id = $1", sandbox
        )
    assert tuple(moved) == (2, 22, 24), "a stop writes the last marks"


async def test_a_stop_cuts_what_is_left(home: Path, dsn: str, service: Service, theirs: Agent):
    sandbox = await runs_at(service, theirs)
    theirs.handlers["/proxy/3000/events"] = Holding(EVENTS)
    with server(home, dsn, proxy="drain_seconds = 1") as one:
        port = port_of(one)
        async with calling(port) as caller, calling(port) as reading:
            await opened(caller, handshake(sandbox, key=KEY))
            reading.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/events", key=KEY))
            await reading.head()
            one.send(signal.SIGTERM)
            assert await ended(caller) == b""
            assert await ended(reading) == b"1\r\n.\r\n", "no last chunk: what was sent was not all"
            await theirs.until(lambda: not theirs.open)
        assert await asyncio.to_thread(one.wait, 30) == 0
        assert "Traceback" not in one.log.read_text()


async def test_a_killed_server_leaves_nothing_open(home: Path, dsn: str, service: Service, theirs: Agent):
    sandbox = await runs_at(service, theirs)
    with server(home, dsn) as one:
        async with calling(port_of(one)) as caller:
            await opened(caller, handshake(sandbox, key=KEY))
            one.kill()
            assert await ended(caller) == b""
        await theirs.until(lambda: not theirs.open)


@pytest.mark.proof
async def test_two_servers_of_which_one_is_killed(home: Path, dsn: str, service: Service, theirs: Agent):
    """Both write what moved by themselves. What the killed one had written stays, and the other adds to it."""
    sandbox = await runs_at(service, theirs)

    async def counted() -> tuple[int, int]:
        async with connected(dsn) as reader:
            row = await reader.fetchrow("SELECT bytes_in, bytes_out FROM activity WHERE sandbox_id = $1", sandbox)
        return (0, 0) if row is None else tuple(row)

    async def is_ten() -> bool:
        return await counted() == (10, 10)

    with server(home, dsn, "one") as one, server(home, dsn, "two") as two:
        async with calling(port_of(one)) as caller, calling(port_of(two)) as other:
            for each in (caller, other):
                await opened(each, handshake(sandbox, key=KEY))
                await echo_back(each, b"12345")
            await until(is_ten, "both servers have written")
            one.kill()
            await echo_back(other, b"123")
            two.send(signal.SIGTERM)
        assert await asyncio.to_thread(two.wait, 30) == 0
    assert await counted() == (13, 13)
