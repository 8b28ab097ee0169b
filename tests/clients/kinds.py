"""The two faces of the Python SDK, asynchronous and synchronous, behind one way to call them.

A life is written once, in `await`s. The synchronous SDK's calls run in threads, as programs that use it block.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

from msgspec import Struct
from opensandbox import (
    InMemoryAsyncPoolStateStore,
    InMemoryPoolStateStore,
    Sandbox,
    SandboxManager,
    SandboxManagerSync,
    SandboxPoolAsync,
    SandboxPoolManagerAsync,
    SandboxPoolManagerSync,
    SandboxPoolSync,
    SandboxSync,
)
from opensandbox.config import ConnectionConfig
from opensandbox.config.connection_sync import ConnectionConfigSync
from opensandbox.models.execd import ExecutionHandlers
from opensandbox.models.execd_sync import ExecutionHandlersSync

SERVICES = ("commands", "files", "metrics", "diagnostics")


class InThread:
    """An object of the synchronous SDK whose methods are awaited."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.real, name)
        if name in SERVICES:
            return InThread(value)
        if not callable(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            return wrapped(await asyncio.to_thread(value, *args, **kwargs))

        return call


def wrapped(value: Any) -> Any:
    """As it is awaited, if it is one of the SDK's objects."""
    return InThread(value) if isinstance(value, SandboxSync | SandboxManagerSync | SandboxPoolSync) else value


class Kind(Struct, frozen=True):
    """One face."""

    name: str
    sandbox: Any
    manager: Any
    pool: Any
    pool_manager: Any
    store: Callable[[], Any]
    config: Any
    handlers: Any

    def handler(self, call: Callable[[Any], None]) -> Any:
        """A handler of events as this face wants it."""
        if self.config is ConnectionConfigSync:
            return call

        async def handle(event: Any) -> None:
            call(event)

        return handle

    async def build(self, kind: Any, **given: Any) -> Any:
        """An object that is made by its constructor."""
        made = kind.real(**given) if isinstance(kind, InThread) else kind(**given)
        return InThread(made) if isinstance(kind, InThread) else made


ASYNC = Kind(
    "async",
    Sandbox,
    SandboxManager,
    SandboxPoolAsync,
    SandboxPoolManagerAsync,
    InMemoryAsyncPoolStateStore,
    ConnectionConfig,
    ExecutionHandlers,
)
SYNC = Kind(
    "sync",
    InThread(SandboxSync),
    InThread(SandboxManagerSync),
    InThread(SandboxPoolSync),
    InThread(SandboxPoolManagerSync),
    InMemoryPoolStateStore,
    ConnectionConfigSync,
    ExecutionHandlersSync,
)


async def pieces(stream: Any) -> AsyncIterator[bytes]:
    """Those of a download, whichever face gave it."""
    if inspect.isasyncgen(stream) or hasattr(stream, "__aiter__"):
        async for piece in stream:
            yield piece
    else:
        for piece in await asyncio.to_thread(list, stream):
            yield piece
