"""How many requests wait. They hold no connection to the database and next to no time, so they are counted apart from
all others: many clients that wait must not keep anybody from a request that acts (`app.server.protocol` subtracts them
from what `limit_concurrency` bounds).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

MAX_WAITERS: Final = 2048


class Waiters:
    """The requests of one process that wait."""

    def __init__(self, most: int = MAX_WAITERS) -> None:
        self.most = most
        self.count = 0

    @contextmanager
    def one_more(self) -> Generator[bool]:
        """Count one for the time of the block. False: there are too many, and this one must not wait."""
        if self.count >= self.most:
            yield False
            return
        self.count += 1
        try:
            yield True
        finally:
            self.count -= 1
