"""Our own network on the fake: the acts of `app.runtime.docker.network`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address, IPv4Network
from typing import TypeAlias
from uuid import UUID, uuid4

from app.domain.sandbox.address import own_network
from app.runtime.driver import OwnNetwork, Workload
from app.runtime.fake.engine import FakeEngine
from app.runtime.faults import AddressTaken, NetworkMissing

Enter: TypeAlias = Callable[[str], Awaitable[None]]


class FakeNetwork:
    """The network of one installation on a `FakeEngine`."""

    def __init__(self, engine: FakeEngine, installation: UUID, subnet: str, enter: Enter, leave: Enter) -> None:
        """`subnet` empty = sandboxes stand on another network."""
        self._engine = engine
        self._installation = installation
        self._subnet = subnet
        self._enter = enter
        self._leave = leave

    async def prepare(self) -> OwnNetwork | None:
        """Make it unless it is there."""
        if not self._subnet:
            return None
        await self._enter("network")
        made = OwnNetwork(own_network(self._installation), self._subnet, uuid4().hex)
        found = self._engine.networks.setdefault(self._installation, made)
        await self._leave("network")
        return found

    def refuse_address(self, work: Workload) -> None:
        """Refuse a start for its address."""
        if not work.ip:
            return
        network = self._engine.networks.get(self._installation)
        if network is None or IPv4Address(work.ip) not in IPv4Network(network.subnet):
            raise NetworkMissing("START_FAILED", "the network of sandboxes is gone or has changed")
        if self._engine.has_address(work.ip):
            raise AddressTaken("START_FAILED", f"{work.ip} is taken")
