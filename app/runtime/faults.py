"""Faults of one attempt: between "the engine is not there" and "the engine's final word".

::

    RuntimeFault
    ├── RuntimeUnavailable     engine trouble: retried, never counted
    ├── ImageMissing           `ensure` needs a `fetch` first
    ├── AttemptFailed          this attempt failed for a reason of its own: counted, retried with back-off
    │   ├── AddressTaken       something else has the leased address: lease another
    │   ├── AgentMissing       `ensure` needs an `install_agent` first
    │   ├── ImagePullFailed    the registry's trouble: rate limit, unreachable, too slow
    │   └── NetworkMissing     `ensure` needs a `prepare_network` first
    └── RuntimeRejected        final
"""

from __future__ import annotations

from app.errors import RuntimeFault


class ImageMissing(RuntimeFault):
    """The engine does not have the image, or only that of another platform."""

    def __init__(self, reference: str, message: str) -> None:
        super().__init__(message)
        self.reference = reference


class AttemptFailed(RuntimeFault):
    """It may work next time, and it may not for ever: counts as an attempt, and is named when time runs out.

    `reason` is a stable upper-case word such as `REGISTRY_RATE_LIMITED`, `message` names the real cause.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class AgentMissing(AttemptFailed):
    """The volume with the agent's files is gone or empty, so the worker has to forget that it is installed."""


class AddressTaken(AttemptFailed):
    """Something that our leases do not know has the address on our own network."""


class NetworkMissing(AttemptFailed):
    """Our own network is gone, or it is another one than the address was leased on."""


class ImagePullFailed(AttemptFailed):
    """The image could not be had now, for a reason outside the engine."""
