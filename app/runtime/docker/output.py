"""What a container wrote, as the engine keeps it.

The engine sends the output of a container without a terminal in frames: one byte for the stream, three of nothing, four
for the length, and the bytes (API reference, "attach").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import aiohttp

from app.runtime.docker.engine import Engine

_FRAME = struct.Struct(">BxxxI")


async def output(engine: Engine, runtime_id: str, *, lines: int) -> str:
    """The last lines of both streams. Refused when there is no such container."""
    params = {"stdout": "1", "stderr": "1", "tail": str(lines)}
    timeout = aiohttp.ClientTimeout(total=engine.times.inspect)
    async with engine.open("GET", f"containers/{runtime_id}/logs", params=params, timeout=timeout) as response:
        return b"".join(_payloads(await response.read())).decode(errors="replace")


def _payloads(frames: bytes) -> Iterator[bytes]:
    at = 0
    while at + _FRAME.size <= len(frames):
        _, length = _FRAME.unpack_from(frames, at)
        at += _FRAME.size
        yield frames[at : at + length]
        at += length
