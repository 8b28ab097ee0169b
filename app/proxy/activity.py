"""Which sandboxes have traffic: a record in memory that is added to the table `activity` every few seconds.

Every request, every piece of a body and every piece that goes over a WebSocket marks its sandbox, so a stream of hours
is active while its bytes move. An open stream that is silent is no activity. No mark is an event, and none costs a
statement: all that came within `WRITE_SECONDS` is added by one.

**How it fails.** A process that is killed loses the marks of `WRITE_SECONDS` at most; one that stops writes them first.
While the database is away they wait, of `MAX_SANDBOXES` at most: of others nothing is recorded then, and the log says
so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from itertools import islice
from typing import Final
from uuid import UUID

from app.errors import StoreUnavailable
from app.store.activity import MOST_AT_ONCE, Marks, add_activity
from app.store.database.pool import Database

WRITE_SECONDS: Final = 5.0
CLOSE_SECONDS: Final = 3.0
"""How long a stop waits for the last marks to be written."""
MAX_SANDBOXES: Final = 20_000
_LOG = logging.getLogger(__name__)


class Activity:
    """Of one process. Made inside the event loop."""

    def __init__(self, database: Database, *, most: int = MAX_SANDBOXES, every: float = WRITE_SECONDS) -> None:
        """`every` is in seconds."""
        self._database = database
        self._most = most
        self._every = every
        self._marks: dict[UUID, Marks] = {}
        self._dropped = 0
        self._stopping = asyncio.Event()
        self._running = asyncio.create_task(self._run(), name="proxy-activity")

    @property
    def waiting(self) -> int:
        """Of how many sandboxes something is not written yet."""
        return len(self._marks)

    def asked(self, sandbox_id: UUID) -> None:
        """A request is sent to it."""
        self._mark(sandbox_id).requests += 1

    def into(self, sandbox_id: UUID, size: int) -> None:
        """So many bytes went to it."""
        self._mark(sandbox_id).bytes_in += size

    def out(self, sandbox_id: UUID, size: int) -> None:
        """So many bytes came from it."""
        self._mark(sandbox_id).bytes_out += size

    def _mark(self, sandbox_id: UUID) -> Marks:
        marks = self._marks.get(sandbox_id)
        if marks is None:
            marks = Marks()
            if len(self._marks) < self._most:
                self._marks[sandbox_id] = marks
            else:
                self._dropped += 1
        marks.at = time.monotonic()
        return marks

    async def write(self) -> None:
        """Add what was marked since the last time.

        Raises:
            StoreUnavailable: what was not added waits for the next time.
        """
        taken, self._marks = self._marks, {}
        if self._dropped:
            _LOG.warning(
                "%s marks of traffic were not recorded: too many sandboxes wait for the database", self._dropped
            )
            self._dropped = 0
        try:
            while taken:
                part = dict(islice(taken.items(), MOST_AT_ONCE))
                await add_activity(self._database, part, time.monotonic)
                for each in part:
                    del taken[each]
        finally:
            self._keep(taken)

    def _keep(self, marks: dict[UUID, Marks]) -> None:
        """Put back what was not added."""
        newer, self._marks = self._marks, marks
        for sandbox_id, marks_of_it in newer.items():
            kept = self._mark(sandbox_id)
            kept.at = marks_of_it.at
            kept.requests += marks_of_it.requests
            kept.bytes_in += marks_of_it.bytes_in
            kept.bytes_out += marks_of_it.bytes_out

    async def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every):
                    await self._stopping.wait()
            try:
                await self.write()
            except StoreUnavailable as error:
                _LOG.warning("%s; the activity of %s sandboxes waits", error, len(self._marks))
            except Exception:  # noqa: BLE001 - the next time may succeed, and without it nothing would be recorded again
                _LOG.exception("the activity of sandboxes could not be recorded")

    async def close(self) -> None:
        """Write the last marks."""
        self._stopping.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._running
        if self._marks:
            _LOG.warning("the activity of %s sandboxes was not recorded: the server stops", len(self._marks))
