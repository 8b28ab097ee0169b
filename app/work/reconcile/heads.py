"""Head rows for runs: those that are asked for at the same time are read by one statement.

Claims come several at a time, and each of their runs begins with a load. Alone, these loads are a fifth of the
statements of a sandbox's life.

**Invariant.** The statement begins after the question, so a run reads its head after its claim, as the queue demands.

**How it fails.** A database that is away is told to all who asked. Any other error of the statement may be that of one
row, so the rows are then read one by one. A run that is cancelled leaves the others alone; the data loaders that were
looked at fail the whole batch then, so this is code of our own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

from app.domain.sandbox.state import Sandbox
from app.errors import StoreUnavailable
from app.views.current import CurrentView

_Head: TypeAlias = "Callable[[], tuple[Sandbox, datetime]] | None"


class Heads:
    """The loads of one worker."""

    def __init__(self, view: CurrentView) -> None:
        self._view = view
        self._asked: dict[UUID, list[asyncio.Future[_Head]]] = {}
        self._batches: set[asyncio.Task[None]] = set()

    async def load(self, sandbox_id: UUID) -> tuple[Sandbox, datetime] | None:
        """The sandbox, whosever it is, and the database's clock. None = there is none.

        Raises:
            UnknownEvent: a newer version wrote it.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Head] = loop.create_future()
        if not self._asked:
            loop.call_soon(self._send)
        self._asked.setdefault(sandbox_id, []).append(answer)
        head = await answer
        return None if head is None else head()

    def _send(self) -> None:
        asked, self._asked = self._asked, {}
        batch = asyncio.create_task(self._read(asked), name="heads")
        self._batches.add(batch)
        batch.add_done_callback(self._batches.discard)

    async def _read(self, asked: dict[UUID, list[asyncio.Future[_Head]]]) -> None:
        try:
            found = await self._view.load_many(list(asked))
        except Exception as error:  # noqa: BLE001 - those who asked get it
            if isinstance(error, StoreUnavailable) or len(asked) == 1:
                _fail(asked, error)
                return
            # One row that cannot be read must not be the trouble of the others.
            for sandbox_id, answers in asked.items():
                await self._read({sandbox_id: answers})
        except asyncio.CancelledError:
            for answer in _open(asked):
                answer.cancel()
            raise
        else:
            for sandbox_id, answers in asked.items():
                for answer in _open({sandbox_id: answers}):
                    answer.set_result(found.get(sandbox_id))


def _fail(asked: dict[UUID, list[asyncio.Future[_Head]]], error: Exception) -> None:
    for answer in _open(asked):
        answer.set_exception(error)


def _open(asked: dict[UUID, list[asyncio.Future[_Head]]]) -> list[asyncio.Future[_Head]]:
    return [answer for answers in asked.values() for answer in answers if not answer.done()]
