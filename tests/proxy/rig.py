"""A stand-in agent on a raw socket, which records bytes; a server in front of it; a client that sends bytes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeAlias
from uuid import UUID, uuid4

from app.agent.token import agent_token
from app.api.app import create_app
from app.api.auth import built_in
from app.api.context import ApiContext
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.address import Way
from app.domain.sandbox.links import LinkKey
from app.domain.sandbox.observed import Address, Exit, Observed, Part, Power
from app.domain.sandbox.spec import SandboxSpec
from app.domain.tenants import ANY_TENANT
from app.proxy.activity import Activity
from app.proxy.decide import Decider
from app.proxy.http import Relay
from app.proxy.options import Options
from app.proxy.resolve import Access, Resolver
from app.server.front import Before, Doors, Front, admission
from app.server.listener import domain_of, uvicorn_server
from app.service.sandboxes import Service
from app.settings import Settings
from app.views.current import CurrentView
from tests.api.conftest import WORKER
from tests.support import nginx

TOKEN_KEY = b"t" * 32
LINKS = LinkKey(b"l" * 32)
VIA = "sandledger-0198f000"
WITHIN_SECONDS = 30
SECRET = "5ec" * 20
through: str = "direct"
"""How callers reach a server: `direct`, or through `nginx`."""
RST = b"\x01\x00\x00\x00\x00\x00\x00\x00"
"""Linger for no time: a close is a reset."""


class Request:
    """One request as it came."""

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head = head
        self.body = body
        line, *lines = head.split(b"\r\n")
        self.method, self.target, self.version = (part.decode("latin-1") for part in line.split(b" "))
        self.pairs = [(name.lower(), value.strip()) for name, _, value in (each.partition(b":") for each in lines)]

    def all(self, name: str) -> list[str]:
        return [value.decode("latin-1") for each, value in self.pairs if each == name.encode()]

    def one(self, name: str) -> str | None:
        found = self.all(name)
        assert len(found) <= 1, found
        return found[0] if found else None


Handler: TypeAlias = Callable[[Request, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = b"{}", status: str = "200 OK", headers: str = "") -> bytes:
    """A whole answer."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


class Agent:
    """Answers `/ping`, asks for its token, serves `/proxy/{port}`. `handlers` are by the path, without the query."""

    def __init__(self) -> None:
        self.token = ""
        self.requests: list[Request] = []
        self.connections = 0
        """Ever made."""
        self.open: set[asyncio.StreamWriter] = set()
        self.handlers: dict[str, Handler] = {}
        self.raw: dict[str, Handler] = {}
        """The same before the body is read."""
        self.address = ""
        self.changed = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self._server = await asyncio.start_server(self._serve, host, port, limit=2**20, backlog=2048)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self.open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for connections and requests to change until this holds."""
        async with asyncio.timeout(WITHIN_SECONDS):
            while not true():
                self.changed.clear()
                await self.changed.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        self.changed.set()
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self.open.discard(writer)
            self.changed.set()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
        request = Request(head, b"")
        path = request.target.partition("?")[0]
        raw = self.raw.get(path)
        if raw is None:
            request.body = await body_of(request, reader)
        self.requests.append(request)
        self.changed.set()
        handler = raw or self.handlers.get(path)
        if self.token and request.all("x-execd-access-token") != [self.token]:
            writer.write(answer(b"secret of another sandbox", "401 Unauthorized"))
        elif handler is not None:
            await handler(request, reader, writer)
        else:
            whole = answer(json.dumps({"target": request.target}).encode())
            writer.write(whole[: whole.index(b"{")] if request.method == "HEAD" else whole)
        await writer.drain()
        return request.one("connection") != "close" and not writer.is_closing()


async def body_of(request: Request, reader: asyncio.StreamReader) -> bytes:
    """Strictly one framing."""
    lengths, codings = request.all("content-length"), request.all("transfer-encoding")
    assert len(lengths) + len(codings) <= 1, request.head
    if codings:
        assert codings == ["chunked"]
        found = b""
        while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
            found += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        assert await reader.readexactly(2) == b"\r\n"
        return found
    return await reader.readexactly(int(lengths[0])) if lengths else b""


class Holding:
    """Begins an answer and says no more until it is told."""

    def __init__(self, begin: bytes) -> None:
        self.begin = begin
        self.go = asyncio.Event()
        self.rest = b""
        self.breaks = False

    async def __call__(self, _request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.begin)
        await writer.drain()
        going = asyncio.create_task(self.go.wait())
        ending = asyncio.create_task(_read_all(reader))
        await asyncio.wait([going, ending], return_when=asyncio.FIRST_COMPLETED)
        going.cancel()
        ending.cancel()
        writer.write(self.rest)
        await writer.drain()
        if self.breaks:
            taken = writer.get_extra_info("socket")
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
            writer.transport.abort()
        else:
            writer.close()


async def _read_all(reader: asyncio.StreamReader) -> None:
    while await reader.read(2**20):
        pass


@asynccontextmanager
async def agent(port: int = 0, host: str = "127.0.0.1") -> AsyncGenerator[Agent]:
    made = Agent()
    await made.start(port, host)
    try:
        yield made
    finally:
        await made.stop()


class Rig:
    """A server with a relay, on a loopback port."""

    def __init__(self, port: int, relay: Relay | None, service: Service) -> None:
        self.port = port
        self.relay = relay
        self.service = service

    async def pending(self, tenant: str = "default") -> UUID:
        """A sandbox that nobody has provided yet."""
        sandbox = uuid4()
        spec = SandboxSpec("img", ("sleep", "1"), {})
        await self.service.create(sandbox, tenant, ev.Requested(spec, "f", timeout_s=3600), None, WORKER)
        return sandbox

    async def runs(self, sandbox: UUID, ports: dict[str, str] | None, generation: int = 1, **seen: Any) -> None:
        """Record what an engine would say of it."""
        shown = Observed(
            sandbox,
            (Part("main", f"rt-{sandbox}-{generation}", f"sandbox-{sandbox}"),),
            seen.pop("power", Power.RUNNING),
            generation=generation,
            address=None if ports is None else Address("bridge", "172.17.0.2", ports),
            **seen,
        )
        await self.service.execute(sandbox, ANY_TENANT, cmd.RecordSeen(shown), WORKER)

    async def running(self, at: Agent, tenant: str = "default") -> UUID:
        """A sandbox whose agent this is."""
        sandbox = await self.pending(tenant)
        at.token = agent_token(TOKEN_KEY, sandbox, 1)
        await self.runs(sandbox, {"44772": at.address, "8080": "127.0.0.1:1"})
        return sandbox

    async def exits(self, sandbox: UUID, code: int) -> None:
        await self.runs(sandbox, None, power=Power.EXITED, exit=Exit(code))

    async def paused(self, sandbox: UUID) -> None:
        await self.service.execute(sandbox, ANY_TENANT, cmd.Pause(), WORKER)
        await self.runs(sandbox, None, power=Power.PAUSED)


@asynccontextmanager
async def serving(
    context: ApiContext,
    *,
    options: Options | None = None,
    pending_seconds: float = 20,
    is_open: bool = False,
    has_agents: bool = False,
    allowed_origins: Collection[str] = (),
    settings: Settings | None = None,
    view: CurrentView | None = None,
    way: Way | None = None,
    way_of_links: Way | None = None,
) -> AsyncGenerator[Rig]:
    """As a server process puts it together."""
    authenticate = context.authenticate or built_in(context.api_key, context.sealer)
    resolver = Resolver(
        view or context.service.view,
        context.signal,
        Access(TOKEN_KEY, way or Way(), has_agents=has_agents, way_of_links=way_of_links),
        context.stopping,
        pending_seconds=pending_seconds,
    )
    identify = admission(authenticate, Doors(context.loopback_only, is_open, LINKS, frozenset(allowed_origins)))
    options = options or Options(
        VIA, adds_token=not is_open, cors=authenticate is not None and not is_open, links=LINKS
    )
    relay = Relay(identify, resolver, options, Activity(context.database))
    settings = settings or Settings()
    domain = domain_of(settings.proxy.wildcard)
    before = Before(Decider(identify, resolver, options, domain.encode()), SECRET.encode())
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(2048)
    server = uvicorn_server(settings, Front(create_app(context), relay, before))
    running = asyncio.create_task(server.serve([listener]))
    port = listener.getsockname()[1]
    try:
        with nginx.running(port, SECRET, domain) if through == "nginx" else nullcontext() as front:
            yield Rig(port if front is None else front.port, relay, context.service)
    finally:
        context.stopping.set()
        server.leave()
        await running
        await relay.close()


class Reply:
    """One answer as it came."""

    def __init__(self, head: bytes, body: bytes) -> None:
        line, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(line.split()[1])
        self.pairs = [(name.lower(), value) for name, _, value in (each.partition(": ") for each in lines)]
        self.body = body

    def all(self, name: str) -> list[str]:
        return [value for each, value in self.pairs if each == name]

    def one(self, name: str) -> str | None:
        found = self.all(name)
        assert len(found) <= 1, found
        return found[0] if found else None

    @property
    def code(self) -> str:
        """Of an error of ours."""
        code = json.loads(self.body)["code"]
        assert self.one("sandledger-error") == code
        return code


class Caller:
    """One connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> tuple[bytes, int | None]:
        head = (await self.reader.readuntil(b"\r\n\r\n"))[:-4]
        lengths = [
            int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")
        ]
        return head, lengths[0] if lengths else None

    async def reply(self, *, bodiless: bool = False) -> Reply:
        """The next answer, whole."""
        async with asyncio.timeout(WITHIN_SECONDS):
            head, length = await self.head()
            if bodiless or b" 204 " in head[:16] or b" 304 " in head[:16]:
                return Reply(head, b"")
            if length is not None:
                return Reply(head, await self.reader.readexactly(length))
            assert b"transfer-encoding: chunked" in head.lower()
            body = b""
            while piece := await self.chunk():
                body += piece
            return Reply(head, body)

    async def chunk(self) -> bytes:
        """The next one; empty = the last."""
        async with asyncio.timeout(WITHIN_SECONDS):
            size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
            piece = await self.reader.readexactly(size)
            assert await self.reader.readexactly(2) == b"\r\n"
            return piece


@asynccontextmanager
async def calling(port: int) -> AsyncGenerator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        yield Caller(reader, writer)
    finally:
        writer.transport.abort()


def request(target: str, *headers: str, method: str = "GET", host: str = "127.0.0.1", key: str | None = None) -> bytes:
    """The bytes of a head."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *headers]
    if key is not None:
        lines.append(f"OPEN-SANDBOX-API-KEY: {key}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def say(port: int, sent: bytes, *, bodiless: bool = False) -> Reply:
    """One request on a connection of its own."""
    async with calling(port) as caller:
        caller.writer.write(sent)
        return await caller.reply(bodiless=bodiless)
