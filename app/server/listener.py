"""The listening socket, and uvicorn on it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from app.api.waiters import Waiters
from app.errors import SettingsError
from app.server.protocol import HttpProtocol
from app.settings import Settings

_TICK_SECONDS = 1.0


class Listener(uvicorn.Server):
    """uvicorn without its signal handlers, because this process has more to stop than a listener, and with a slower
    main loop.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

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

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals to `run`."""
        yield


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


def uvicorn_server(settings: Settings, app: Any, waiters: Waiters | None = None) -> Listener:
    """Uvicorn with our protocol on an ASGI application, not yet serving. `limit_concurrency` does not count the
    `waiters`.
    """
    server = settings.server
    # uvicorn makes the instances itself, so they find what they share in their class.
    protocol = type(HttpProtocol.__name__, (HttpProtocol,), {"waiters": waiters})
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
        )
    )
