"""Loops that stand still.

Each loop stamps its name every time it goes round. A loop that has not done so for too long hangs, although its task
is not done and its process answers; a health check of the process must show it.
"""

from __future__ import annotations

import time


class Watchdog:
    """The stamps of the loops of one worker."""

    def __init__(self, stall_after: float) -> None:
        """Seconds after which a loop stands still."""
        self._stall_after = stall_after
        self._stamped: dict[str, float] = {}

    def stamp(self, loop: str) -> None:
        """Note that this loop goes round; a loop that never stamps is not watched."""
        self._stamped[loop] = time.monotonic()

    def forget(self, loop: str) -> None:
        """This loop has ended as it should."""
        self._stamped.pop(loop, None)

    @property
    def standing(self) -> list[str]:
        """Names of the loops that stand still."""
        too_old = time.monotonic() - self._stall_after
        return sorted(loop for loop, at in self._stamped.items() if at < too_old)
