"""When a step does not work: what kind of trouble it is, how long to wait, when to stop trying.

========================= ======= ============================================================================
raised                    counted what follows
========================= ======= ============================================================================
`RuntimeRejected`, ensure final   the sandbox fails with the engine's reason
`RuntimeUnavailable`      no      the engine is asked who it is; no answer opens the breaker. No verdict
`AttemptFailed`, any else yes     full-jitter back-off; an event when the code changes and at attempts 1, 3 and 10
========================= ======= ============================================================================

The breaker is for the engine as a whole: while it is open, nothing is claimed. One sandbox whose calls the engine
answers with 5xx while it is otherwise well must not stop all others, so it is not the fault that opens the breaker but
the engine's silence when asked; such a sandbox waits by itself, longer each time, for as long as it takes. That is told
as an event, thinly: nothing else would say why it stays Pending or Stopping. An engine that is down is no event.

A sandbox is given up after `poison_attempts` counted failures *and* `poison_after` seconds, and only while it is being
provided or changed. Two things never give up: a removal, since a container that is left behind costs money; and a plain
look, since our failing to look is no reason to kill what runs.
"""

from __future__ import annotations

import asyncio
import logging
import random
import traceback
from collections.abc import Callable
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox.plan import Ensure, Remove, SetPower, Step
from app.errors import RuntimeFault, RuntimeRejected
from app.runtime.driver import Driver
from app.runtime.faults import AttemptFailed
from app.work.policy import WorkPolicy

UNAVAILABLE = "RUNTIME_UNAVAILABLE"
INTERNAL = "INTERNAL_ERROR"
EXHAUSTED = "RECONCILE_EXHAUSTED"
_TOLD_AT = (1, 3, 10)
_REFUSALS_TOLD_AT = (3, 10)
"""Not the first: a single 5xx is noise."""
_CHECK_S = 15.0
_MOST_STREAKS = 10_000
_LOG = logging.getLogger(__name__)


class Trouble(Struct, frozen=True):
    """A counted failure in words that may be stored and shown."""

    step: str
    code: str
    message: str


def describe(step: Step, error: Exception) -> Trouble:
    """Name it. What we did not raise on purpose is shown by its type only: its text may repeat secrets."""
    name = type(step).__name__.lower()
    match error:
        case AttemptFailed(reason=code, message=message) | RuntimeRejected(reason=code, message=message):
            return Trouble(name, code, message)
        case _:
            kind = type(error).__name__
            where = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("unexpected %s in step %s of a sandbox:\n%s", kind, name, where)
            return Trouble(name, INTERNAL, f"unexpected {kind}; the server's log has the place")


def is_told(trouble: Trouble, attempt: int, last_code: str | None) -> bool:
    """Whether this failure becomes an event."""
    return trouble.code != last_code or attempt in _TOLD_AT


def is_refusal_told(times: int) -> bool:
    """Whether it becomes an event that an engine, which is well, has not done what was asked so many times in a row."""
    return times in _REFUSALS_TOLD_AT


def is_hopeless(step: Step, attempt: int, failing_for: float, policy: WorkPolicy) -> bool:
    """Whether to give the sandbox up."""
    may = isinstance(step, Ensure | SetPower)
    return may and attempt >= policy.poison_attempts and failing_for >= policy.poison_after


def backoff(step: Step, attempt: int, policy: WorkPolicy) -> float:
    """Full jitter: anything up to the base doubled with each attempt, up to the longest."""
    longest = policy.removal_retry_max if isinstance(step, Remove) else policy.backoff_max
    return random.uniform(0, _doubled(policy.backoff_base, attempt, longest))  # noqa: S311 - jitter, not a secret


def _doubled(base: float, times: int, longest: float) -> float:
    return min(longest, base * 2 ** min(times - 1, 30))


class Breaker:
    """Closed, or open until some time; then one question to the engine decides."""

    def __init__(self, driver: Driver, policy: WorkPolicy, recovered: Callable[[], None] = lambda: None) -> None:
        """`recovered` is called when an engine that was away is there again."""
        self._driver = driver
        self._policy = policy
        self._recovered = recovered
        self._failures = 0
        self._open_until = 0.0
        self._asking = asyncio.Lock()
        self._streaks: dict[UUID, int] = {}

    @property
    def open(self) -> bool:
        """Nothing may be claimed."""
        return self._failures > 0

    @property
    def wait(self) -> float:
        """Seconds until the next question is due."""
        return max(0.0, self._open_until - asyncio.get_running_loop().time())

    async def suspect(self, sandbox_id: UUID) -> float:
        """A call was answered with "unavailable". Ask the engine, and say how long this sandbox should wait."""
        async with self._asking:
            if not self.open:
                await self._ask()
        if self.open:
            return random.uniform(0, self._policy.breaker_base)  # noqa: S311 - the breaker does the waiting
        if len(self._streaks) >= _MOST_STREAKS:
            self._streaks.clear()
        times = self._streaks[sandbox_id] = self._streaks.get(sandbox_id, 0) + 1
        longest = _doubled(self._policy.breaker_base, times, self._policy.breaker_max)
        return random.uniform(longest / 2, longest)  # noqa: S311

    def refusals(self, sandbox_id: UUID) -> int:
        """How many times in a row an engine that is well has not done what was asked for this sandbox."""
        return 0 if self.open else self._streaks.get(sandbox_id, 0)

    def well(self, sandbox_id: UUID) -> None:
        """The engine did what was asked for this sandbox."""
        self._streaks.pop(sandbox_id, None)

    async def recover(self) -> None:
        """Half open: ask once."""
        async with self._asking:
            if self.open and not self.wait:
                await self._ask()

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(_CHECK_S):
                await self._driver.check()
        except (RuntimeFault, TimeoutError) as error:
            self._failures += 1
            wait = _doubled(self._policy.breaker_base, self._failures, self._policy.breaker_max)
            self._open_until = asyncio.get_running_loop().time() + wait
            level = logging.WARNING if self._failures == 1 else logging.INFO
            _LOG.log(level, "engine %s is not there, asking again in %.0f s: %s", self._driver.name, wait, error)
            return
        if self.open:
            _LOG.warning("engine %s is there again", self._driver.name)
            self._failures = 0
            self._recovered()
