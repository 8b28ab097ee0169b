"""Streams of a sandbox that is no more, or that was started again, are cut. So are those whose link was revoked.

A request finds its target when it begins, but a stream may be open for hours. The engine closes the connections of a
container that ends, though not on every network at once, and it gives the container's address to the next one. So the
streams that are open are compared with the log: twice a second with what is known of the sandbox, and the row is read
when the signal has news of it. A paused sandbox keeps its streams, since it goes on where it stopped.

Where the operator wants it (`[proxy] idle_seconds`), a stream on which no byte passes for so long is cut too.

**How it fails.** While the database is away no stream is cut because of its sandbox. A signal that was lost costs
`rows.LOST_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from app.domain.sandbox.state import Sandbox
from app.errors import StoreUnavailable
from app.proxy.limits import Stream, Streams
from app.proxy.rows import Rows

LOOK_SECONDS: Final = 0.5
_LOG = logging.getLogger(__name__)


def is_over(sandbox: Sandbox | None, stream: Stream) -> bool:
    """Whether what the stream leads to is no more."""
    if sandbox is None or stream.link_number not in (None, sandbox.link_number):
        return True
    if not stream.generation:
        return False  # it looks for its target, and is refused where there is none
    return not sandbox.may_run or sandbox.generation != stream.generation or sandbox.run != stream.run


def _cut_still(streams: Streams, idle_seconds: float) -> None:
    now = asyncio.get_running_loop().time()
    for key in streams.keys:
        for stream in streams.of(key):
            if stream.cut is not None and stream.is_still(now, idle_seconds):
                stream.cut()


async def watch(streams: Streams, rows: Rows, idle_seconds: float | None = None) -> None:
    """Cut what is over, until cancelled. `idle_seconds`: and what is still for so long."""
    while True:
        await streams.some()
        await asyncio.sleep(LOOK_SECONDS)
        if idle_seconds is not None:
            _cut_still(streams, idle_seconds)
        for key in streams.keys:
            try:
                sandbox = rows.known(key) or await rows.read(*key)
            except StoreUnavailable:
                break  # the others cannot be read either
            except Exception as error:  # noqa: BLE001 - one row says nothing of the others; a newer version wrote it, say
                _LOG.warning("streams of sandbox %s cannot be compared with the log: %r", key[0], error)
                continue
            for stream in streams.of(key):
                if stream.cut is not None and is_over(sandbox, stream):
                    stream.cut()
