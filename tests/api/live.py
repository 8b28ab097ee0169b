"""The application on production's listener, on a loopback port, in a thread with an event loop of its own, for real clients."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from app.api.app import create_app
from app.api.context import ApiContext, EndpointParts
from app.domain.sandbox.links import LinkKey
from app.runtime.fake import FakeDriver, FakeEngine
from app.server.listener import Listener, uvicorn_server
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.settings import Settings
from app.store.database.pool import Database
from app.store.log.refusals import Refusals
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from app.views.listing import Listing
from tests.conftest import INSTALLATION, SIGHTING, STATION

T = TypeVar("T")


class Live:
    """A running server. `run` executes a coroutine on its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, context: ApiContext, server: Listener, port: int) -> None:
        self._loop = loop
        self.context = context
        self.server = server
        self.port = port
        self.base = f"http://127.0.0.1:{port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


@contextmanager
def serving(dsn: str, **changes: Any) -> Iterator[Live]:
    """Until the block ends."""
    ready = threading.Event()
    made: list[Live] = []
    failures: list[BaseException] = []

    async def main() -> None:
        database = Database(dsn)
        signal = Signal(database)
        service = Service(database, signal)
        await Engines(database, signal, INSTALLATION, service.engines).register(SIGHTING, STATION)
        parts: dict[str, Any] = {
            "service": service,
            "listing": Listing(database),
            "refusals": Refusals(database),
            "sealer": Sealer(os.urandom(32)),
            "signal": signal,
            "database": database,
            "driver": FakeDriver(FakeEngine(), INSTALLATION),
            "endpoints": EndpointParts(b"k" * 32, LinkKey(b"l" * 32), wait_seconds=0.1),
        }
        context = ApiContext(**(parts | changes))
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn_server(Settings(), create_app(context), context.waiters)
        hearing = asyncio.create_task(signal.run())
        serving = asyncio.create_task(server.serve([listener]))
        made.append(Live(asyncio.get_running_loop(), context, server, listener.getsockname()[1]))
        ready.set()
        try:
            await serving
        finally:
            hearing.cancel()
            await asyncio.gather(hearing, return_exceptions=True)
            await database.close()

    def thread() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            ready.set()

    runner = threading.Thread(target=thread, name="live-api")
    runner.start()
    ready.wait(30)
    try:
        assert made, failures
        yield made[0]
    finally:
        if made:
            made[0].context.stopping.set()
            made[0].server.leave()
        runner.join(30)
    assert not failures, failures
