"""A proxy in front of a real engine, on a Unix socket of its own: the place where a test breaks the connection.

It can hold a call before the engine sees it, lose a reply after the engine has acted, answer an error by itself, cut
event streams, and be gone altogether. Everything else passes unchanged, streams included.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from aiohttp import web

CALLS = (
    ("POST", r"containers/create", "create"),
    ("POST", r"containers/[^/]+/start", "start"),
    ("POST", r"containers/[^/]+/wait", "wait"),
    ("GET", r"containers/[^/]+/logs", "logs"),
    ("GET", r"containers/[^/]+/archive", "get_archive"),
    ("PUT", r"containers/[^/]+/archive", "put_archive"),
    ("POST", r"containers/[^/]+/pause", "pause"),
    ("POST", r"containers/[^/]+/unpause", "unpause"),
    ("GET", r"containers/[^/]+/json", "inspect"),
    ("GET", r"containers/json", "list"),
    ("DELETE", r"containers/[^/]+", "remove"),
    ("POST", r"images/create", "pull"),
    ("GET", r"images/json", "images"),
    ("GET", r"images/.+/json", "image"),
    ("POST", r"images/load", "load"),
    ("DELETE", r"images/.+", "drop_image"),
    ("POST", r"commit", "commit"),
    ("GET", r"events", "events"),
    ("POST", r"volumes/create", "make_volume"),
    ("GET", r"volumes/.+", "mark"),
    ("GET", r"version", "version"),
    ("GET", r"info", "info"),
)
TAKEN = "driver failed programming external connectivity: listen tcp4 127.0.0.1:40001: bind: address already in use"
PER_CONNECTION = {"connection", "transfer-encoding", "content-length", "content-encoding", "host", "keep-alive"}


def call_name(method: str, path: str) -> str:
    bare = re.sub(r"^/(v[\d.]+/)?", "", path)
    return next((name for verb, shape, name in CALLS if verb == method and re.fullmatch(shape, bare)), bare)


class Gate:
    """Holds a call: `reached` fires when it stands there, `open()` lets it go on."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._open = asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self._open.wait()

    def open(self) -> None:
        self._open.set()


@dataclass(frozen=True)
class Refusal:
    """What is answered instead of the engine's answer."""

    status: int
    message: str = "refused by the test"
    headers: dict[str, str] = field(default_factory=dict)
    is_json: bool = True

    def answer(self) -> web.Response:
        if self.is_json:
            return web.json_response({"message": self.message}, status=self.status, headers=self.headers)
        return web.Response(text=self.message, status=self.status, headers=self.headers, content_type="text/html")


class EngineProxy:
    def __init__(self, engine: str) -> None:
        self.calls: Counter[str] = Counter()
        self.gates: dict[str, Gate] = {}
        """Before the engine sees the call."""
        self.late_gates: dict[str, Gate] = {}
        """When the engine has acted, before anybody hears of it."""
        self.sent: Counter[str] = Counter()
        """Bytes that the engine answered."""
        self.lost: Counter[str] = Counter()
        self.scarce: Counter[str] = Counter()
        """How many of these calls the engine is not asked any more, since a port is taken."""
        self.refusals: dict[str, Refusal | int] = {}
        """What calls are answered with by the proxy itself; a number stands for a status with plain words."""
        self.canned: dict[str, list[dict[str, object]]] = {}
        """Answers that are given instead of the engine's, one after the other, as long as there are any."""
        self.answers: dict[str, bytes] = {}
        """JSON that is answered in the engine's place, each time."""
        self.versions: list[str] = []
        """API versions that the calls named, in their order."""
        self.streams: dict[int, web.Request] = {}
        """Event streams that the engine has answered."""
        self._engine = engine
        self._folder = Path(tempfile.mkdtemp(prefix="sl-"))
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def address(self) -> str:
        return f"unix://{self._folder}/s"

    async def up(self) -> None:
        is_socket = self._engine.startswith("unix://")
        connector = aiohttp.UnixConnector(self._engine.removeprefix("unix://")) if is_socket else None
        self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        await web.UnixSite(self._runner, f"{self._folder}/s").start()

    async def down(self) -> None:
        """As when the engine stops: connections die, new ones are refused."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def close(self) -> None:
        for gate in (*self.gates.values(), *self.late_gates.values()):
            gate.open()
        await self.down()
        shutil.rmtree(self._folder)

    def drop_streams(self) -> None:
        for request in list(self.streams.values()):
            abort(request)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = call_name(request.method, request.path)
        self.calls[call] += 1
        if gate := self.gates.get(call):
            await gate.pass_through()
        if (named := re.match(r"/(v[\d.]+)/", request.path)) is not None:
            self.versions.append(named[1])
        if self.scarce[call]:
            self.scarce[call] -= 1
            return Refusal(500, TAKEN).answer()
        if refusal := self.refusals.get(call):
            return (Refusal(refusal) if isinstance(refusal, int) else refusal).answer()
        if answer := self.answers.get(call):
            return web.Response(body=answer, content_type="application/json")
        if canned := self.canned.get(call):
            return web.json_response(canned.pop(0))
        return await self._forward(call, request)

    async def _forward(self, call: str, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        base = "http://engine" if self._engine.startswith("unix://") else self._engine.replace("tcp://", "http://")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in PER_CONNECTION}
        body = await request.read()
        async with self._session.request(
            request.method, base + request.raw_path, headers=headers, data=body or None
        ) as answer:
            if late := self.late_gates.get(call):
                await answer.read()
                await late.pass_through()
            if self.lost[call]:
                self.lost[call] -= 1
                await answer.read()
                abort(request)
                return web.Response()
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in PER_CONNECTION}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            if call == "events":
                self.streams[id(request)] = request
            try:
                async for chunk in answer.content.iter_any():
                    self.sent[call] += len(chunk)
                    await response.write(chunk)
                await response.write_eof()
            finally:
                self.streams.pop(id(request), None)
            return response


def abort(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()
