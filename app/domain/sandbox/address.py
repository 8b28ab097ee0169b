"""Where this server reaches a sandbox, and whose an address is. Pure.

The log has the address that the engine showed at the start. `agent_at` reads it, for the probe of the worker and for
the proxy, so that what the probe found ready is what the proxy asks.

============================================ ==================================
network                                      the agent
============================================ ==================================
our own, and this server stands on it        the sandbox's own address, the agent's own port
its port is published                        as published
published on every address (`0.0.0.0`, `::`) this server's way to the engine's machine, published port
host                                         this server's way to the engine's machine, the agent's own port
another one, with an address, unpublished    the sandbox's own address, the agent's own port
none                                         not reachable
============================================ ==================================

An address proves nothing: engines give it to the next container. The agent's token does, and so does our own network.
There an address is leased (table `addresses`): a container is only ever made with an address that its sandbox holds,
and nobody else gets it before ten minutes have passed since the removal was recorded. `leased_at` says which address
that is; every port of the sandbox may be reached there without a token.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network
from typing import Final
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox.observed import Address

AGENT_PORT: Final = 44772
"""Where the agent listens inside the sandbox."""
EGRESS_PORT: Final = 18080
"""Where the sidecar that filters traffic is asked."""
HOST_NETWORK: Final = "host"
"""How the engine names the network of a container that shares the machine's."""
LOOPBACK: Final = "127.0.0.1"
_EVERY_ADDRESS: Final = frozenset(("", "0.0.0.0", "::"))  # noqa: S104 - compared, not bound


_OWN_BITS: Final = 4
"""A sixteenth of a network."""


def nowhere(_network: str) -> bool:
    """This server stands on no network of ours."""
    return False


class Reach(Struct, frozen=True):
    """A host, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        """As a URL has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Way(Struct, frozen=True):
    """How this server reaches what an engine runs."""

    engine_host: str = LOOPBACK
    """How it reaches the engine's machine."""
    own_network: str = ""
    """Our own network, whose addresses are leased; empty = there is none."""
    stands_on: Callable[[str], bool] = nowhere
    """Whether this server reaches the addresses of this network. Asked again and again: a network may come later."""


def has_agent(address: Address | None, *, configured: bool) -> bool:
    """Whether an agent is in the sandbox: its published port says so. Where nothing is published, the settings do."""
    if address is None or address.network == HOST_NETWORK:
        return configured
    return str(AGENT_PORT) in address.ports


def agent_at(address: Address | None, way: Way) -> Reach | None:
    """Where the agent is, if there is one. None = this server does not reach it."""
    if address is None:
        return None
    if (own := leased_at(address, way)) is not None:
        return Reach(own, AGENT_PORT)
    published = address.ports.get(str(AGENT_PORT))
    if published is not None:
        host, _, number = published.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        return Reach(way.engine_host if host in _EVERY_ADDRESS else host, int(number)) if _is_port(number) else None
    if address.network == HOST_NETWORK:
        return Reach(way.engine_host, AGENT_PORT)
    if way.own_network and address.network == way.own_network:
        return None  # this server does not stand on it, and the same address may be somebody else's where it stands
    return Reach(address.ip, AGENT_PORT) if address.ip else None


def leased_at(address: Address | None, way: Way) -> str | None:
    """The sandbox's own address, where it is leased and this server stands on that network; else None."""
    if address is None or not way.own_network or address.network != way.own_network or not address.ip:
        return None
    return address.ip if way.stands_on(way.own_network) else None


def own_network(installation: UUID) -> str:
    """The name of our own network on each engine."""
    return f"sandledger-{installation.hex[:8]}"


def own_link(network: str) -> str:
    """The name of the network interface of our own network, on the engine's machine: 15 characters at most. A machine
    that has it is the engine's, so the addresses of the network mean there what they mean to the engine.
    """
    return f"slnet-{network.rpartition('-')[2]}"


def leasable(subnet: str) -> tuple[IPv4Address, IPv4Address]:
    """First and last address of our own network that are leased. The first sixteenth of it is the engine's own: the
    gateway is there, and what a stranger connects without asking for an address.

    Raises:
        ValueError: it is no subnet of IPv4, or too small for that.
    """
    whole = IPv4Network(subnet)
    return whole[whole.num_addresses >> _OWN_BITS], whole[-2]


def engines_own(subnet: str) -> IPv4Network:
    """The part of our own network that the engine may hand out by itself."""
    whole = IPv4Network(subnet)
    return IPv4Network((whole.network_address, whole.prefixlen + _OWN_BITS))


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal()
