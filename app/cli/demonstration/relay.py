"""A relay in front of the engine, on a Unix socket of its own: here the demo makes the engine refuse a pause.

Everything else passes unchanged, streams included.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

_PAUSE = re.compile(r"(/v[\d.]+)?/containers/[^/]+/pause")
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "content-encoding", "host", "keep-alive"}
REFUSAL = "cgroup: the freezer of this machine is busy"


class Relay:
    """One engine behind it."""

    def __init__(self, engine: str, session: aiohttp.ClientSession) -> None:
        """`engine` is its address, `session` reaches it."""
        self._base = "http://engine" if engine.startswith("unix://") else engine.replace("tcp://", "http://")
        self._session = session
        self.refuses_pause = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Refuse, or forward."""
        if self.refuses_pause and request.method == "POST" and _PAUSE.fullmatch(request.path):
            return web.json_response({"message": REFUSAL}, status=500)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        body = await request.read()
        async with self._session.request(
            request.method, self._base + request.raw_path, headers=headers, data=body or None
        ) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP_BY_HOP}
            relayed = web.StreamResponse(status=answer.status, headers=kept)
            await relayed.prepare(request)
            async for chunk in answer.content.iter_any():
                await relayed.write(chunk)
            await relayed.write_eof()
            return relayed


@asynccontextmanager
async def relay(engine: str, socket: Path) -> AsyncGenerator[Relay]:
    """Listen until the end of the block."""
    connector = aiohttp.UnixConnector(engine.removeprefix("unix://")) if engine.startswith("unix://") else None
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        made = Relay(engine, session)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", made.handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        try:
            await web.UnixSite(runner, str(socket)).start()
            yield made
        finally:
            await runner.cleanup()
