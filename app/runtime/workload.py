"""What a driver is asked to make."""

from __future__ import annotations

from msgspec import Struct

from app.domain.sandbox import endpoints
from app.domain.sandbox.observed import Ref


class RegistryAuth(Struct, frozen=True):
    """Registry credentials of one pull. Never stored, logged or labelled by a driver."""

    username: str
    password: str

    def __repr__(self) -> str:
        """Keep the password out of tracebacks."""
        return f"RegistryAuth(username={self.username!r})"


class Image(Struct, frozen=True):
    """An image to bring to the engine."""

    reference: str
    platform: str | None = None
    """`os/arch`, e.g. `linux/amd64`; None = the engine's own."""
    auth: RegistryAuth | None = None


class Limits(Struct, frozen=True):
    """Resource limits in the engine's units. None = not limited."""

    cpu_nanos: int | None = None
    memory_bytes: int | None = None
    gpus: int | None = None
    gpus_all: bool = False


AGENT_PORT, HTTP_PORT = str(endpoints.AGENT_PORT), str(endpoints.HTTP_PORT)
"""Ports of a sandbox with an agent that the engine publishes, as `Address.ports` names them: the agent's own, and one
for direct clients of the user's program."""


class Agent(Struct, frozen=True):
    """What a sandbox needs so that the agent runs in it."""

    volume: str
    """The engine's volume with the agent's files."""
    token: str
    """What the agent asks of its callers. Never stored, logged or labelled by a driver."""
    init: bool = False
    """The agent runs as process 1 (`EXECD_INIT`)."""

    def __repr__(self) -> str:
        """Keep the token out of tracebacks."""
        return f"Agent(volume={self.volume!r})"


class Workload(Struct, frozen=True):
    """All that a driver needs to make one object, resolved and the same for every driver."""

    ref: Ref
    tenant: str
    image: Image
    entrypoint: tuple[str, ...]
    env: dict[str, str]
    limits: Limits = Limits()
    generation: int = 1
    position: int = 0
    """Log position that led to the object; a label of it."""
    agent: Agent | None = None
    """None = the sandbox runs without one."""
    ip: str = ""
    """The address on our own network that is leased for it; empty = it does not stand there."""

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"Workload(ref={self.ref}, image={self.image.reference!r}, env={sorted(self.env)})"
