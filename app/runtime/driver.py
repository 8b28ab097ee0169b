"""The seam between reconcilers and container engines.

A driver holds no state about sandboxes. It is told a `Workload`, makes it true and says what it saw as `Observed`.
Every method may be called again after a crash at any point, from another process, with the same result:

* the object's name is derived from the sandbox id, so a repeated create meets the first one and adopts it;
* `remove` of something absent succeeds;
* only objects that bear our installation label are ever touched.

Failures: `RuntimeUnavailable` when the engine cannot be reached or answers 5xx (says nothing about the sandbox),
`RuntimeRejected` when its answer is final for this workload. Anything else that escapes is a bug and is counted.

Cancellation: `ensure` may be cancelled while it pulls. Once it has begun to create, it finishes create and start
before it lets the cancellation through, so that nobody concludes "absent" while a create is still in flight.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox.observed import Capabilities, Exit, Observed, Power

__all__ = ["Capabilities", "Driver", "EngineInfo", "Exit", "Limits", "Observed", "Power", "RegistryAuth", "Workload"]


class RegistryAuth(Struct, frozen=True):
    """Registry credentials of one pull. Never stored, logged or labelled by a driver."""

    username: str
    password: str

    def __repr__(self) -> str:
        """Keep the password out of tracebacks."""
        return f"RegistryAuth(username={self.username!r})"


class Limits(Struct, frozen=True):
    """Resource limits in the engine's units. None = not limited."""

    nano_cpus: int | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    """Number of GPUs; -1 = all."""


class Workload(Struct, frozen=True):
    """All a driver needs to make one sandbox, resolved and driver-neutral."""

    sandbox_id: UUID
    tenant: str
    image: str
    entrypoint: tuple[str, ...]
    env: dict[str, str]
    limits: Limits = Limits()
    platform: str | None = None
    """`os/arch`, e.g. `linux/amd64`; None = the engine's own."""
    auth: RegistryAuth | None = None
    generation: int = 1

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"Workload(sandbox_id={self.sandbox_id}, image={self.image!r}, env={sorted(self.env)})"


class EngineInfo(Struct, frozen=True):
    """Who the engine is, for banner, doctor and readiness."""

    name: str
    version: str
    engine_id: str
    address: str
    live_restore: bool | None = None
    """Whether containers go on when the engine restarts or dies. None = it does not say."""


class Driver(Protocol):
    """A container engine. Six verbs, one property set, one health question."""

    name: str
    can: Capabilities

    async def ensure(self, work: Workload) -> Observed:
        """Pull if absent, create or adopt, start. Safe to repeat.

        An object that has already exited is returned as it is, never started a second time; one that is paused
        is returned paused. RuntimeRejected with reason `NAME_TAKEN` when a stranger's object has the name.
        """
        ...

    async def observe(self, sandbox_id: UUID) -> Observed | None:
        """Look at one object. None = the engine answered and says there is none (of ours)."""
        ...

    async def set_power(self, sandbox_id: UUID, power: Power) -> Observed | None:
        """Make it `PAUSED` or `RUNNING`; already so is success. None when there is no such object.

        An exited object is returned as it is: the caller reads `power`.
        """
        ...

    async def remove(self, sandbox_id: UUID) -> None:
        """Kill and remove, with all that was made for it. Absent is success; a stranger's object is left alone."""
        ...

    def inventory(self) -> AsyncIterator[Observed]:
        """Everything bearing our installation label. Raises rather than ends early."""
        ...

    def hints(self) -> AsyncIterator[UUID | None]:
        """Ids that may have changed, for ever, reconnecting by itself. Lossy by contract; carries no truth.

        None = the stream broke and began anew (an engine that restarts forgets): look at everything.
        """
        ...

    async def check(self) -> EngineInfo:
        """Ask the engine who it is. RuntimeUnavailable, with a message that says what to do, when it is not there."""
        ...

    async def close(self) -> None:
        """Release connections. Running sandboxes are not touched."""
        ...
