"""The open streams, and how many there may be at once: in this process, for a tenant, for a sandbox.

Proxied requests are counted here and not among the requests of the lifecycle API, so neither can take the other's
places. A stream has two descriptors. `with_descriptors` sees to it that there are enough of them.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final, TypeAlias
from uuid import UUID

from msgspec import Struct

from app.proxy.refusals import busy

DESCRIPTORS_A_STREAM: Final = 2
OTHER_DESCRIPTORS: Final = 512
_LOG = logging.getLogger(__name__)


class Limits(Struct, frozen=True):
    """Open streams at once."""

    in_process: int = 8192
    of_tenant: int = 4096
    of_sandbox: int = 512


LINKS_SHARE: Final = 4
"""Streams with links have one of so many places."""
Key: TypeAlias = tuple[UUID, str]
"""A sandbox, and the tenant that asks for it. It need not be the owner, so it gets none of the owner's places."""


class Stream:
    """One open stream."""

    __slots__ = (
        "_since",
        "_streams",
        "_timer",
        "cut",
        "generation",
        "has_moved",
        "key",
        "link_number",
        "run",
    )

    def __init__(self, streams: Streams, key: Key, link_number: int | None) -> None:
        self.key = key
        self.generation = 0
        self.run = 0
        """Which object of the sandbox, and which start of it, the bytes go to. 0 = that is not known yet."""
        self.cut: Callable[[], None] | None = None
        """Breaks it; None = it has no answer yet, and no link let it in."""
        self.link_number = link_number
        """Of the link that let it in; None = no link did."""
        self.has_moved = True
        """Whether bytes passed, in any direction, since `is_still` was asked."""
        self._since = 0.0
        self._streams = streams
        self._timer: asyncio.TimerHandle | None = None

    def end_in(self, seconds: float, cut: Callable[[], None]) -> None:
        """Break it then, also when it has no answer yet. That does not depend on the database, which may be away."""
        self.cut = cut
        self._timer = asyncio.get_running_loop().call_later(seconds, self._end)

    def _end(self) -> None:
        if self.cut is not None:
            self.cut()

    def touch(self) -> None:
        """Bytes passed."""
        self.has_moved = True

    def is_still(self, now: float, seconds: float) -> bool:
        """Whether nothing passed for so long. It is asked again and again, and knows of no time between two answers."""
        if self.has_moved:
            self.has_moved, self._since = False, now
            return False
        return now - self._since >= seconds

    def leave(self) -> None:
        """Give the place back, once."""
        if self._timer is not None:
            self._timer.cancel()
        self._streams.leave(self)


class Streams:
    """The open ones of this process."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tenants: dict[str, int] = {}
        self._sandboxes: dict[Key, set[Stream]] = {}
        self._guests: Counter[str | UUID | None] = Counter()
        """Those that links let in: in all (None), of each tenant and of each sandbox."""
        self._changed = asyncio.Event()
        self.open = 0

    def enter(self, tenant: str, sandbox_id: UUID, link_number: int | None = None) -> Stream:
        """Take a place, until the stream's `leave`. Those that a link lets in get a share: they are not the owner.

        Raises:
            Refusal: there is none.
        """
        key = (sandbox_id, tenant)
        of_tenant, of_sandbox = self._tenants.get(tenant, 0), len(self._sandboxes.get(key, ()))
        if self.open >= self._limits.in_process:
            raise busy("This server")
        if of_tenant >= self._limits.of_tenant:
            raise busy("The tenant")
        if of_sandbox >= self._limits.of_sandbox:
            raise busy("The sandbox")
        if link_number is not None:
            self._enter_guest(key)
        stream = Stream(self, key, link_number)
        self._tenants[tenant] = of_tenant + 1
        self._sandboxes.setdefault(key, set()).add(stream)
        self.open += 1
        if self.open == 1:
            self._changed.set()
        return stream

    def _enter_guest(self, key: Key) -> None:
        sandbox_id, tenant = key
        limits, guests = self._limits, self._guests
        most = ((None, limits.in_process), (tenant, limits.of_tenant), (sandbox_id, limits.of_sandbox))
        if any(guests[whose] >= max(1, places // LINKS_SHARE) for whose, places in most):
            raise busy("A signed link")
        guests.update(whose for whose, _ in most)

    def leave(self, stream: Stream) -> None:
        """Give the place back. Names that count nothing are not kept: there are as many as sandboxes ever were."""
        key = stream.key
        self._sandboxes[key].remove(stream)
        if stream.link_number is not None:
            self._guests.subtract((None, key[1], key[0]))
            self._guests = +self._guests
        self._tenants[key[1]] -= 1
        self.open -= 1
        if not self._sandboxes[key]:
            del self._sandboxes[key]
        if not self._tenants[key[1]]:
            del self._tenants[key[1]]
        if not self.open:
            self._changed.set()

    @property
    def keys(self) -> Iterable[Key]:
        """For whom streams are open."""
        return list(self._sandboxes)

    def of(self, key: Key) -> Iterable[Stream]:
        """The open ones for one sandbox and tenant."""
        return list(self._sandboxes.get(key, ()))

    async def some(self) -> None:
        """Wait until one is open."""
        while not self.open:
            self._changed.clear()
            await self._changed.wait()

    async def none(self) -> None:
        """Wait until none is open."""
        while self.open:
            self._changed.clear()
            await self._changed.wait()

    def cut(self) -> None:
        """Break all that have begun."""
        for key in self.keys:
            for stream in self.of(key):
                if stream.cut is not None:
                    stream.cut()


def with_descriptors(limits: Limits) -> Limits:
    """Raise the limit of open files to what so many streams need; where it cannot be raised, allow fewer streams."""
    wanted = DESCRIPTORS_A_STREAM * limits.in_process + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed >= wanted:
        return limits
    fewer = max(1, (allowed - OTHER_DESCRIPTORS) // DESCRIPTORS_A_STREAM)
    _LOG.warning(
        "only %s files may be open: the proxy carries %s streams and not %s", allowed, fewer, limits.in_process
    )
    return Limits(fewer, min(limits.of_tenant, fewer), min(limits.of_sandbox, fewer))
