"""What a container wrote, as the engine keeps it.

The engine sends the output of a container without a terminal in frames: one byte for the stream, three of nothing, four
for the length, and the bytes (API reference, "attach"). A frame is one entry of the log. An entry holds a line, or, of
a line of more than 16 KiB, a piece: then it does not end with a line feed, and the next entry of the same stream goes
on with the line. Where times are asked for, each entry begins with its own.

A log may have any length, and so may a line. So the engine is asked for the last entries only, and of these only as
many bytes are kept as are wanted, from the end.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from http import HTTPStatus
from typing import Final

import aiohttp

from app.domain.sandbox.diagnostics import LogLine
from app.runtime.docker.engine import Engine, Refused, trouble
from app.runtime.driver import Logs

_FRAME = struct.Struct(">BxxxI")
_MAX_TIME_BYTES: Final = 40
_GONE: Final = (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)
"""There is no such container, or it is dead or being removed."""


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


async def last(engine: Engine, runtime_id: str, tail: int, most: int, since: datetime | None = None) -> Logs | None:
    """The last lines, with their times. None = there is no such container, or its log is gone."""
    params = {"stdout": "1", "stderr": "1", "timestamps": "1", "tail": str(tail)}
    if since is not None:
        params["since"] = f"{since.timestamp():.6f}"
    timeout = aiohttp.ClientTimeout(total=engine.times.inspect)
    window = Window(most)
    try:
        async with engine.open("GET", f"containers/{runtime_id}/logs", params=params, timeout=timeout) as response:
            async for stream, entry in _entries(response):
                window.add(stream, entry)
    except Refused as refused:
        if refused.status in _GONE:
            return None
        raise trouble("show a log", refused) from None
    return window.logs(more=window.entries >= tail)


async def _entries(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[int, bytes]]:
    """Stream and payload of each frame."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        rest += chunk
        at = 0
        while len(rest) - at >= _FRAME.size:
            stream, length = _FRAME.unpack_from(rest, at)
            end = at + _FRAME.size + length
            if end > len(rest):
                break
            yield stream, bytes(rest[at + _FRAME.size : end])
            at = end
        del rest[:at]


class _Line:
    """A line of which more may come."""

    __slots__ = ("at", "begins", "text")

    def __init__(self, at: str, *, begins: bool) -> None:
        self.at = at
        self.begins = begins
        self.text = bytearray()


class Window:
    """The last bytes of a log, by lines. Holds little more than `most` bytes for each stream."""

    def __init__(self, most: int) -> None:
        self.entries = 0
        self._most = most
        self._lines: deque[tuple[int, LogLine]] = deque()
        """With their bytes."""
        self._size = 0
        self._dropped = False
        self._open: dict[int, _Line] = {}
        """By stream: a line that has not ended yet."""
        self._begun: set[int] = set()

    def add(self, stream: int, entry: bytes) -> None:
        """The next entry of the log."""
        self.entries += 1
        at, text = _split(entry)
        line = self._open.get(stream)
        if line is None:
            # What the engine shows first of a stream may be the rest of a long line.
            line = self._open[stream] = _Line(at, begins=stream in self._begun)
            self._begun.add(stream)
        line.text += text
        if len(line.text) > self._most:
            del line.text[: len(line.text) - self._most]
            line.begins = False
        if text.endswith(b"\n"):
            del self._open[stream]
            self._keep(line, ends=True)

    def _keep(self, line: _Line, *, ends: bool) -> None:
        text = bytes(line.text).removesuffix(b"\n").removesuffix(b"\r")
        size = len(text) + 1
        self._lines.append((size, LogLine(line.at, text.decode(errors="replace"), line.begins, ends)))
        self._size += size
        while self._size - self._lines[0][0] >= self._most:
            self._size -= self._lines.popleft()[0]
            self._dropped = True

    def logs(self, *, more: bool) -> Logs:
        """What is left. `more` = the engine has older entries."""
        for line in self._open.values():
            self._keep(line, ends=False)
        self._open = {}
        return Logs(tuple(line for _, line in self._lines), more or self._dropped)


def _split(entry: bytes) -> tuple[str, bytes]:
    """The engine's time and the text."""
    head, space, text = entry.partition(b" ")
    if not space or len(head) > _MAX_TIME_BYTES:
        return "", entry
    return head.decode("ascii", errors="replace"), text
