"""WebSockets: their ends, what holds a side back, and the sandbox that they belong to."""

from __future__ import annotations

import asyncio
import socket
from datetime import UTC, datetime, timedelta
from uuid import UUID

from msgspec.structs import replace

from app.agent.token import agent_token
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Desired, Failure, Sandbox
from app.domain.tenants import ANY_TENANT, AnyTenant
from app.errors import StoreUnavailable
from app.proxy.limits import Limits, Streams
from app.proxy.options import Options
from app.proxy.watch import is_over
from app.store.log.signal import Signal
from app.views.current import CurrentView
from tests.api.conftest import WORKER, MakeContext
from tests.proxy.rig import (
    RST,
    TOKEN_KEY,
    VIA,
    Agent,
    Holding,
    Request,
    Rig,
    calling,
    request,
    serving,
)
from tests.proxy.test_states import streams_are
from tests.proxy.websockets import (
    ACCEPTED,
    MIB,
    echo_back,
    echoes,
    ended,
    handshake,
    opened,
    pour,
    within_a_second,
)
from tests.support.sql import connected
from tests.support.stream import Stream as Running

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


async def test_a_row_of_a_newer_version_keeps_no_other_stream_alive(
    rig: Rig, agent: Agent, sandbox: UUID, echo: None, dsn: str, signal: Signal
):
    """It cannot be read here. Its stream goes on, and those of the sandboxes that are compared after it are cut."""
    other = await rig.pending()
    await rig.runs(other, {"44772": agent.address})
    agent.token = ""
    async with calling(rig.port) as newer, calling(rig.port) as mine, connected(dsn, owner=True) as owner:
        await opened(newer, handshake(sandbox))
        await opened(mine, handshake(other))
        await owner.execute("SET session_replication_role = replica")  # versions need not rise
        known = await owner.fetchval("SELECT desired FROM sandboxes WHERE id = $1", sandbox)
        await owner.execute("UPDATE sandboxes SET desired = 'dreaming' WHERE id = $1", sandbox)
        try:
            signal.poke(sandbox)
            await rig.service.execute(other, ANY_TENANT, cmd.Terminate(), WORKER)
            assert await ended(mine) == b""
            await echo_back(newer, b"x")
        finally:
            await owner.execute("UPDATE sandboxes SET desired = $2 WHERE id = $1", sandbox, known)


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
