"""Bytes both ways between two connections, once both sides speak another protocol than HTTP.

Nothing is parsed, so subprotocols, extensions, fragments, pings and close codes pass as they are. And nothing is kept
but two small objects: no task waits, and a silent pair costs what its two sockets cost.

* **Each piece is told to `Passing`**, which may have the side that sent it not be read for a moment.
* **Backpressure**: while a side does not take what is written to it, the other side is not read.
* **An end is passed on.** What came before it is written first. The other direction may go on, because a program may
  still answer, but only for `HALF_CLOSED_SECONDS`: a program that ignores the end would otherwise keep the connection
  of a client who has left. A connection that breaks breaks the other one.
* **A side that is not read cannot be seen to leave.** So a side that takes nothing while more waits for it has
  `stall_seconds`, and twice that at most; then both connections are cut.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from app.proxy.pace import Passing

HIGH_WATER_BYTES: Final = 256 * 1024
"""What is written and not taken, beyond which the other side is not read."""
HALF_CLOSED_SECONDS: Final = 30.0


def splice(
    client: tuple[asyncio.Transport, bytes],
    backend: tuple[asyncio.Transport, bytes],
    passing: Passing,
    ended: Callable[[], None],
    *,
    half_closed_seconds: float,
    stall_seconds: float,
    moved: Callable[[], None],
) -> None:
    """Join two connections; each comes with what it has sent already. `ended` is called once, when neither is left, and
    `moved` whenever bytes come. To cut a pair, abort one of the two.
    """
    pair = _Pair(passing, ended, half_closed_seconds, stall_seconds, moved)
    ends = pair.ends = _End(client[0], pair), _End(backend[0], pair)
    lost = [end for end in ends if end.transport.is_closing()]
    for end, early in zip(ends, (backend[1], client[1]), strict=True):
        end.transport.set_protocol(end)
        if end not in lost:
            end.transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
            end.transport.write(early)
            end.other.passed(len(early))
    for end in ends:
        if end.other.is_taking:
            end.resume()
    for end in lost:
        end.connection_lost(None)  # what lost it has said so to its former protocol


class _Pair:
    """What both ends share."""

    __slots__ = ("_half_closed_seconds", "_stall_seconds", "_timer", "ended", "ends", "moved", "passing")

    def __init__(
        self,
        passing: Passing,
        ended: Callable[[], None],
        half_closed_seconds: float,
        stall_seconds: float,
        moved: Callable[[], None],
    ) -> None:
        self.passing = passing
        self.ended = ended
        self.moved = moved
        self.ends: tuple[_End, ...] = ()
        self._half_closed_seconds = half_closed_seconds
        self._stall_seconds = stall_seconds
        self._timer: asyncio.TimerHandle | None = None

    def cut(self) -> None:
        """Break both connections."""
        for end in self.ends:
            end.transport.abort()

    def half_closed(self) -> None:
        """One direction has ended. The other may go on for a while."""
        self._after(self._half_closed_seconds, self.cut)

    def stalled(self) -> None:
        """A side does not take what is written to it."""
        if self._timer is None:
            self._after(self._stall_seconds, self._look)

    def _look(self) -> None:
        """Cut when a side has taken nothing since the last look."""
        self._timer = None
        stuck = [end for end in self.ends if not end.is_taking]
        if False in [end.has_moved() for end in stuck]:
            self.cut()
        elif stuck:
            self.stalled()

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        """Do this then, and not what was to be done."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, act)

    def lost(self) -> None:
        """One end is lost, or both."""
        if all(end.is_lost for end in self.ends):
            if self._timer is not None:
                self._timer.cancel()
            self.ends = ()  # they name each other
            self.ended()
        else:
            self.half_closed()


class _End(asyncio.Protocol):
    """One of the two connections."""

    __slots__ = ("_pair", "_waiting", "is_lost", "is_taking", "sent_all", "transport")

    def __init__(self, transport: asyncio.Transport, pair: _Pair) -> None:
        self.transport = transport
        self.is_taking = True
        """Whether it takes what is written to it."""
        self.sent_all = False
        """Whether it has sent its end."""
        self.is_lost = False
        self._pair = pair
        self._waiting: int | None = None

    @property
    def other(self) -> _End:
        """The other end of the pair."""
        first, second = self._pair.ends
        return second if first is self else first

    def resume(self) -> None:
        """Read it again. After its end there is nothing to read but the same end."""
        if not self.sent_all:
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Pass it on."""
        self._pair.moved()
        transport = self.other.transport
        if not transport.is_closing():
            transport.write(data)
            if self.passed(len(data)):
                self.transport.pause_reading()

    def passed(self, size: int) -> bool:
        """So much of it was passed on. Whether it has to wait now."""
        return bool(size) and self._pair.passing.spliced(size, into=self is self._pair.ends[0], act=self._go_on)

    def _go_on(self) -> None:
        """Read it again, if nothing else holds it back."""
        if self._pair.ends and not self.is_lost and self.other.is_taking:
            self.resume()

    def pause_writing(self) -> None:
        """Read the other side no more."""
        self.is_taking = False
        self.other.transport.pause_reading()
        self._waiting = None
        self._pair.stalled()

    def has_moved(self) -> bool:
        """Whether it has taken something since this was asked. One that was not asked before has."""
        before, self._waiting = self._waiting, self.transport.get_write_buffer_size()
        return before is None or self._waiting < before

    def resume_writing(self) -> None:
        """Read the other side again."""
        self.is_taking = True
        self.other.resume()

    def eof_received(self) -> bool:
        """Pass it on, and keep the connection for the other direction."""
        self.sent_all = True
        other = self.other
        if other.sent_all:
            return False
        if not other.transport.is_closing():
            other.transport.write_eof()
        self._pair.half_closed()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the other side send what it still has to write, unless this one broke."""
        if self.is_lost:
            return
        self.is_lost = True
        if exc is None:
            self.other.transport.close()
        else:
            self.other.transport.abort()
        self._pair.lost()
