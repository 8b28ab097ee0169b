"""Where this server reaches the agent of a sandbox. Pure.

The log has the address that the engine showed at the start. One function reads it, for the probe of the worker and for
the proxy, so that what the probe found ready is what the proxy asks.

============================================ ==================================
network                                      the agent
============================================ ==================================
its port is published                        as published
published on every address (`0.0.0.0`, `::`) this server's way to the engine's machine, published port
host                                         this server's way to the engine's machine, the agent's own port
another one, with an address, unpublished    the sandbox's own address, the agent's own port
none                                         not reachable
============================================ ==================================

An address proves nothing: engines give it to the next container. The agent's token does.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from app.domain.sandbox.observed import Address

AGENT_PORT: Final = 44772
"""Where the agent listens inside the sandbox."""
HOST_NETWORK: Final = "host"
"""How the engine names the network of a container that shares the machine's."""
LOOPBACK: Final = "127.0.0.1"
_EVERY_ADDRESS: Final = frozenset(("", "0.0.0.0", "::"))  # noqa: S104 - compared, not bound


class Reach(Struct, frozen=True):
    """A host, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """As a URL has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def has_agent(address: Address | None, *, configured: bool) -> bool:
    """Whether an agent is in the sandbox: its published port says so. Where nothing is published, the settings do."""
    if address is None or address.network == HOST_NETWORK:
        return configured
    return str(AGENT_PORT) in address.ports


def agent_at(address: Address | None, engine_host: str) -> Reach | None:
    """Where the agent is, if there is one. `engine_host` is how this server reaches the engine's machine. None = this
    server does not reach it.
    """
    if address is None:
        return None
    published = address.ports.get(str(AGENT_PORT))
    if published is not None:
        host, _, number = published.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        return Reach(engine_host if host in _EVERY_ADDRESS else host, int(number)) if _is_port(number) else None
    if address.network == HOST_NETWORK:
        return Reach(engine_host, AGENT_PORT)
    return Reach(address.ip, AGENT_PORT) if address.ip else None


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal()
