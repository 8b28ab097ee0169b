"""Whose turn it is to be copied: some at once, and fewer of one tenant.

**Protocol.** A snapshot asks for a turn before its source is asked to stand still, so that no source stands still in a
line. It keeps the turn until its commit has ended (`leave`). A turn that becomes free goes to a snapshot whose source
stands still already, else to the tenant with the fewest turns, else to who asked first, and `wake` is called with it.
Who stands in the line asks again sometime, and falls out of it otherwise.

**How it fails.** This is the memory of one worker. The turn of a snapshot that never begins, because another worker has
taken it or its source refused to stand still, ends by itself after a while.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from uuid import UUID

from msgspec import Struct

BEGIN_SECONDS = 15.0
"""How long a turn is kept for who has not begun."""
ASK_AGAIN_SECONDS = 5.0
"""When the first in the line asks again, even if nothing wakes it."""
_EACH_SECONDS = 0.1
_LONGEST_SECONDS = 60.0


class _Asked(Struct, frozen=True):
    tenant: str
    until: float
    stands_still: bool = False


class Turns:
    """The turns of one worker."""

    def __init__(
        self, most: int, share: int, wake: Callable[[UUID], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        """At most `most` at once, `share` of one tenant. `wake` is told who has a turn now. `now` in seconds."""
        self._most, self._share, self._wake, self._now = most, share, wake, now
        self._turns: dict[UUID, _Asked] = {}
        self._line: dict[UUID, _Asked] = {}
        """In the order in which they asked."""

    @property
    def waiting(self) -> frozenset[UUID]:
        """Who stands in the line."""
        return frozenset(self._line)

    def ask(self, snapshot_id: UUID, tenant: str, *, stands_still: bool) -> float:
        """0 = it has a turn. Else the seconds after which to ask again."""
        self._forget()
        now = self._now()
        if snapshot_id not in self._turns:
            wait = min(_LONGEST_SECONDS, ASK_AGAIN_SECONDS + _EACH_SECONDS * len(self._line))
            old = self._line.get(snapshot_id)
            asked = _Asked(tenant, now + 2 * wait, stands_still or (old is not None and old.stands_still))
            self._line[snapshot_id] = asked  # one that asks again keeps its place
            self._hand_out(but=snapshot_id)
            if snapshot_id not in self._turns:
                return wait
        return 0

    def begin(self, snapshot_id: UUID, tenant: str) -> None:
        """Its commit begins. From here on the turn ends with `leave` only."""
        self._line.pop(snapshot_id, None)
        self._turns[snapshot_id] = _Asked(tenant, float("inf"))

    def leave(self, snapshot_id: UUID) -> None:
        """It needs no turn any more."""
        self._line.pop(snapshot_id, None)
        if self._turns.pop(snapshot_id, None) is not None:
            self._forget()
            self._hand_out()

    def close(self) -> None:
        """Nobody gets a turn any more."""
        self._line.clear()

    def _hand_out(self, but: UUID | None = None) -> None:
        while len(self._turns) < self._most:
            held = Counter(each.tenant for each in self._turns.values())
            ready = [
                (not asked.stands_still, held[asked.tenant], number, snapshot_id)
                for number, (snapshot_id, asked) in enumerate(self._line.items())
                if held[asked.tenant] < self._share
            ]
            if not ready:
                return
            snapshot_id = min(ready)[3]
            asked = self._line.pop(snapshot_id)
            self._turns[snapshot_id] = _Asked(asked.tenant, self._now() + BEGIN_SECONDS)
            if snapshot_id != but:
                self._wake(snapshot_id)

    def _forget(self) -> None:
        now = self._now()
        for kept in (self._turns, self._line):
            for snapshot_id in [each for each, asked in kept.items() if asked.until <= now]:
                del kept[snapshot_id]
