"""When a step does not work: what kind of trouble it is, how long to wait, and what is reported.

======================================== ======= =================================================================
raised                                   counted what follows
======================================== ======= =================================================================
`RuntimeRejected`, ensure or fetch       final   the sandbox fails with the engine's reason
`RuntimeRejected`, set_power             final   the pause or resume failed; the sandbox goes on as it was
`RuntimeUnavailable`                     no      the engine is asked who it is; no answer closes the station
`AttemptFailed`, anything else           yes     full-jitter back-off; an event when the reason changes and at
                                                 attempts 1, 3 and 10
======================================== ======= =================================================================

A count ends nothing. What must not go on for ever has a deadline (`app.domain.sandbox.deadlines`), which ends it with
the last reason that the queue row holds. So a sandbox is never given up because attempts were many, and a removal,
which has no such end, never gives up: a container that is left behind costs money.

One sandbox whose calls the engine answers with 5xx while it is otherwise well must not stop all others, so it is not
the fault that closes the station but the engine's silence when asked. Such a sandbox waits by itself, longer each time,
for as long as it takes. That is reported as an event, thinly: nothing else would say why it stays as it is.
"""

from __future__ import annotations

import logging
import random
import traceback

from msgspec import Struct

from app.domain.sandbox.plan import STEP_NAMES, Observe, Remove, Step
from app.errors import RuntimeRejected
from app.runtime.faults import AttemptFailed
from app.work.policy import WorkPolicy

UNAVAILABLE = "RUNTIME_UNAVAILABLE"
INTERNAL = "INTERNAL_ERROR"
REPORTED_ATTEMPTS = (1, 3, 10)
REPORTED_REFUSALS = (3, 10)
"""Not the first: a single 5xx is noise."""
_LOG = logging.getLogger(__name__)


class Trouble(Struct, frozen=True):
    """A failure in words that may be stored and shown."""

    step: str
    reason: str
    message: str


def name_of(step: Step) -> str:
    """The word of a step in events."""
    return STEP_NAMES.get(type(step), STEP_NAMES[Observe])


def describe(step: Step, error: Exception) -> Trouble:
    """Name it. What we did not raise on purpose is shown by its type only: its text may repeat secrets."""
    name = name_of(step)
    match error:
        case AttemptFailed(reason=reason, message=message) | RuntimeRejected(reason=reason, message=message):
            return Trouble(name, reason, message)
        case _:
            kind = type(error).__name__
            where = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("unexpected %s in step %s of a sandbox:\n%s", kind, name, where)
            return Trouble(name, INTERNAL, f"unexpected {kind}; the server's log has the place")


def is_reported(reason: str, attempt: int, last_reason: str | None) -> bool:
    """Whether this failure becomes an event.

    An engine that was not there in between is no change of the reason, or one that comes and goes would fill the log.
    """
    return attempt in REPORTED_ATTEMPTS or last_reason not in (reason, UNAVAILABLE)


def is_refusal_reported(times: int) -> bool:
    """Whether it becomes an event that an engine, which is well, has not done what was asked so many times in a row."""
    return times in REPORTED_REFUSALS


def longest_backoff(step: Step, policy: WorkPolicy) -> float:
    """The limit of the back-off."""
    return policy.removal_retry_max if isinstance(step, Remove) else policy.backoff_max


def backoff(step: Step, attempt: int, policy: WorkPolicy) -> float:
    """Full jitter: anything up to the base doubled with each attempt, up to the longest."""
    doubled = min(longest_backoff(step, policy), policy.backoff_base * 2 ** min(attempt - 1, 30))
    return random.uniform(0, doubled)  # noqa: S311 - jitter, not a secret
