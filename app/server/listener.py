"""The listening socket, and uvicorn on it.

**Stop**: nothing more is accepted, idle connections are closed, and requests under way get their time: those of the
lifecycle API `timeout_graceful_shutdown`, those to sandboxes `[proxy] drain_seconds`. What is left then is broken off.
WebSockets are not uvicorn's any more when they are open; the relay ends them (`app.proxy.http.Relay.drain`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from app.api.waiters import Waiters
from app.errors import SettingsError
from app.server.protocol import HttpProtocol, streams_of
from app.settings import Settings

_TICK_SECONDS = 1.0
_LOOK_SECONDS = 0.05
"""How often a stop looks for what is still open."""
_LOG = logging.getLogger(__name__)


class Listener(uvicorn.Server):
    """uvicorn without its signal handlers, because this process has more to stop than a listener, with a slower main
    loop, and with two times for what is under way at the stop.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float) -> None:
        super().__init__(config)
        self._drain_seconds = drain_seconds
        self._leaving = asyncio.Event()
        self.is_quiet = asyncio.Event()
        """Set at the stop, when no request of the lifecycle API is left."""

    def leave(self) -> None:
        """Finish the requests under way and end."""
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        """Renew the `Date` header once a second until `leave`.

        uvicorn's own loop checks ten times a second whether it should end. That was a third of the CPU time of an idle
        server.
        """
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(_TICK_SECONDS):
                    await self._leaving.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in the order that the module's docstring gives."""
        state, streams = self.server_state, streams_of(self.server_state)
        until = asyncio.get_running_loop().time() + self._drain_seconds
        for each in (*self.servers, *(sockets or ())):
            each.close()
        for connection in list(state.connections):
            connection.shutdown()
        await _settle(
            self.config.timeout_graceful_shutdown or 0,
            lambda: state.connections - streams.keys(),
            lambda: state.tasks.difference(streams.values()),
        )
        self.is_quiet.set()
        await _settle(until - asyncio.get_running_loop().time(), lambda: state.connections, lambda: state.tasks)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to `run`."""
        yield


async def _settle(
    seconds: float, connections: Callable[[], Collection[Any]], tasks: Callable[[], Collection[asyncio.Task[Any]]]
) -> None:
    """Wait until there are none of both, and cancel the tasks that are left then."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0, seconds)):
            while connections() or tasks():  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(_LOOK_SECONDS)
    left = tasks()
    if left:
        _LOG.warning("the time to stop is over, and %s requests under way are broken off", len(left))
    for task in left:
        task.cancel()


def listen(settings: Settings) -> socket.socket:
    """The listening socket.

    Raises:
        SettingsError: the address is taken or not ours; says what to change.
    """
    host, port = settings.server.host, settings.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror}; set [server] host and port, or stop what listens there"
        ) from error
    listener.set_inheritable(False)
    return listener


def domain_of(wildcard: str) -> str:
    """The domain of `[proxy] wildcard`, as hosts are compared with it; empty = there is none."""
    return wildcard.removeprefix("*.").partition(":")[0].lower()


def uvicorn_server(settings: Settings, app: Any, waiters: Waiters | None = None) -> Listener:
    """Uvicorn with our protocol on an ASGI application, not yet serving. `limit_concurrency` does not count the
    `waiters`.
    """
    server = settings.server
    # uvicorn makes the instances itself, so they find what they share in their class.
    shared = {"waiters": waiters, "domain": domain_of(settings.proxy.wildcard).encode()}
    protocol = type(HttpProtocol.__name__, (HttpProtocol,), shared)
    return Listener(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=settings.log.file_enabled or settings.log.level == "DEBUG",
            timeout_keep_alive=server.timeout_keep_alive,
            limit_concurrency=server.limit_concurrency or None,
            backlog=server.backlog,
            timeout_graceful_shutdown=server.timeout_graceful_shutdown,
            # Whatever `server.http` names: only this protocol bounds heads, in bytes and in time.
            http=protocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,  # a local caller could otherwise forge the client address in the log
        ),
        settings.proxy.drain_seconds,
    )
