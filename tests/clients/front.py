"""A small round robin before several servers, as a load balancer is: each request goes to the next one.

A server that cannot be reached is left out, so a client notices a killed server only by what was under way there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web
from yarl import URL

from tests.support.cluster import free_port

HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}


class Front:
    """Serves on a port of loopback while it is entered."""

    def __init__(self, servers: Sequence[str]) -> None:
        """`servers` are base addresses, e.g. `http://127.0.0.1:8080`."""
        self.port = free_port()
        self.served = dict.fromkeys(servers, 0)
        """How many requests each server has answered."""
        self._turn = 0
        self._left_out: set[str] = set()
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.ServerRunner | None = None

    @property
    def domain(self) -> str:
        return f"127.0.0.1:{self.port}"

    def leave_out(self, server: str) -> None:
        """It was killed. The engine may give its port to a sandbox, which would answer in its place."""
        self._left_out.add(server)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),
            # A connection that is kept may be one to a server that has been killed.
            connector=aiohttp.TCPConnector(force_close=True, limit=0),
        )
        # A client that leaves ends its request, and no stream of a client that was killed holds up the end.
        self._runner = web.ServerRunner(web.Server(self._handle, handler_cancellation=True), shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._runner is not None and self._session is not None
        await self._runner.cleanup()
        await self._session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert self._session is not None
        headers = [(name, value) for name, value in request.headers.items() if name.lower() not in HOP_BY_HOP]
        servers, troubles = [each for each in self.served if each not in self._left_out], list[str]()
        self._turn += 1
        first = self._turn % len(servers)
        for server in (*servers[first:], *servers[:first]):
            try:
                upstream = await self._session.request(
                    request.method,
                    URL(server + request.raw_path, encoded=True),
                    headers=headers,
                    skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent", "Content-Type"),
                    data=request.content if request.can_read_body else None,
                    allow_redirects=False,
                )
            except aiohttp.ClientConnectorError as error:
                troubles.append(str(error))
                continue  # nothing was sent
            self.served[server] += 1
            return await _send_back(request, upstream)
        return web.Response(status=503, text=f"no server can be reached: {troubles}")


async def _send_back(request: web.BaseRequest, upstream: aiohttp.ClientResponse) -> web.StreamResponse:
    async with upstream:
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason)
        for name, value in upstream.headers.items():
            if name.lower() not in HOP_BY_HOP:
                response.headers.add(name, value)
        await response.prepare(request)
        async for data in upstream.content.iter_any():
            await response.write(data)
        await response.write_eof()
        return response
