"""Answers to questions about objects of this worker's engine (`app.store.diagnostics.requests`).

**Protocol.** Woken by the engine's id, or after `poll` seconds anyway, it claims as many questions as it may answer at
once, and answers each in a task of its own: outside of the slots, because a reader must not wait for a create, nor a
create for a reader. One tenant has `_SHARE` of those places. While the engine cannot be used nothing is claimed.

**How it fails.** An engine that does not answer in time is an answer, too. A worker that dies leaves its questions to
another one when their lease ends. A question about a sandbox that this engine does not have, or of another tenant, is
answered as if there were none.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import msgspec

from app.domain.sandbox.diagnostics import Inspection, LogText
from app.domain.text import storable
from app.errors import RuntimeFault, StoreUnavailable, UnknownEvent
from app.store.diagnostics.requests import ABSENT, INSPECT, EngineRequests, Question
from app.store.log.signal import Signal
from app.views.current import CurrentView
from app.work.diagnostics import Diagnostics
from app.work.policy import WorkPolicy
from app.work.station import Station
from app.work.watchdog import Watchdog

LOOP = "answers"
_AT_ONCE = 6
_SHARE = 4
"""Of them, those of one tenant."""
_LOG = logging.getLogger(__name__)


class Answers:
    """Answers for one engine."""

    def __init__(
        self,
        *,
        station: Station,
        engine_id: UUID,
        requests: EngineRequests,
        diagnostics: Diagnostics,
        view: CurrentView,
        signal: Signal,
        policy: WorkPolicy,
        watchdog: Watchdog,
    ) -> None:
        """`engine_id` is the id of the engine's stream, by which it is woken."""
        self._station = station
        self._engine_id = engine_id
        self.requests = requests
        self._diagnostics = diagnostics
        self._view = view
        self._signal = signal
        self._policy = policy
        self._watchdog = watchdog
        self._tasks: dict[asyncio.Task[None], str] = {}
        """With the tenant of each."""

    async def run(self) -> None:
        """Answer until cancelled. No error ends it."""
        try:
            with self._signal.subscribe(self._engine_id) as news:
                self._station.when_usable(news.wake)
                while True:
                    self._watchdog.stamp(LOOP)
                    if not await self._round(news.wake):
                        await news.wait(self._policy.poll)
        finally:
            self._watchdog.forget(LOOP)
            for task in (left := list(self._tasks)):
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _round(self, when_free: Callable[[], None]) -> bool:
        """Claim once. True = there may be more, and there is room for it."""
        free = _AT_ONCE - len(self._tasks)
        if self._station.open or free <= 0:
            return False
        try:
            held = Counter(self._tasks.values())
            found = await self.requests.claim(
                self._station.name, free, self._policy.answer_lease, share=_SHARE, held=held
            )
        except StoreUnavailable as error:
            _LOG.info("no questions can be claimed: %s", error)
            return False
        except Exception:  # noqa: BLE001 - the next round may work
            _LOG.exception("questions could not be claimed")
            return False
        for question in found:
            task = asyncio.create_task(self._answer(question), name=f"answer-{question.id}")
            self._tasks[task] = question.tenant
            task.add_done_callback(self._tasks.pop)
            task.add_done_callback(lambda _: when_free())
        return len(found) == free

    async def _answer(self, question: Question) -> None:
        try:
            answer, error = await self._read(question)
            await self.requests.answer(question, answer, error)
        except StoreUnavailable as failure:
            _LOG.info("question %s is left to the end of its lease: %s", question.id, failure)
        except Exception:  # noqa: BLE001 - one question's error is its own
            _LOG.exception("question %s could not be answered", question.id)
        else:
            self._signal.poke(question.id, work=False)

    async def _read(self, question: Question) -> tuple[str | None, str | None]:
        """The answer, or why there is none."""
        try:
            async with asyncio.timeout(self._policy.answer_within):
                found = await self._look(question)
        except TimeoutError:
            return None, f"The engine did not answer within {self._policy.answer_within:g} s."
        except (RuntimeFault, UnknownEvent) as error:
            return None, storable(str(error))
        return (None, ABSENT) if found is None else (msgspec.json.encode(found).decode(), None)

    async def _look(self, question: Question) -> Inspection | LogText | None:
        loaded = await self._view.load(question.stream_id, question.tenant)
        if loaded is None or loaded[0].engine != self._station.name or loaded[0].object_id is None:
            return None
        if question.what == INSPECT:
            return await self._diagnostics.inspect(loaded[0])
        asked = question.arguments
        since = None if asked.since_s is None else datetime.now(UTC) - timedelta(seconds=asked.since_s)
        return await self._diagnostics.logs(loaded[0], asked.tail, since)
