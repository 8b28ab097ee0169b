"""Our own network on the engine, and the address that a sandbox gets there.

**Protocol.** As soon as the engine can be used, and before the first sandbox is made, the driver prepares the network.
Its answer is remembered, and asked for again when the engine could not be used meanwhile or says that the network is
gone (`forget`). Every worker reports it, and the first report of a network becomes `engine.network_prepared`. Before a
container is made its address is leased (`app.store.addresses`). An address that the engine refuses, because something
has it that our leases do not know, is given up for another one at once.

**How it fails.** A network that cannot be made keeps sandboxes waiting, with the engine's words as the reason. When all
addresses are leased, or were freed a moment ago, sandboxes wait with the reason `NO_CAPACITY`.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from app.domain.engine.decide import RecordNetwork
from app.domain.sandbox.address import leasable
from app.domain.sandbox.state import Sandbox
from app.domain.stream import Meta
from app.errors import RuntimeFault, SandledgerError, StoreUnavailable
from app.runtime.driver import Observed, OwnNetwork
from app.runtime.faults import AddressTaken, NetworkMissing
from app.service.engines import Engines
from app.store.addresses import Addresses, Holder
from app.work.reconcile.workloads import Workloads
from app.work.station import Station

MAX_TAKEN = 8
"""Addresses that one run tries."""
_LOG = logging.getLogger(__name__)


class NoAddress(SandledgerError):
    """All addresses of the network are in use or were a moment ago."""


class Networks:
    """The network of one engine, as one worker sees it."""

    def __init__(self, *, station: Station, engines: Engines, addresses: Addresses, meta: Meta) -> None:
        """`meta` names this worker in the log."""
        self._station = station
        self._engines = engines
        self._addresses = addresses
        self._meta = meta
        self._known = False
        self._network: OwnNetwork | None = None
        self._asking = asyncio.Lock()
        self._early: asyncio.Task[None] | None = None
        station.when_usable(self._begin)

    def forget(self) -> None:
        """It may be gone, or it may be another engine: ask again."""
        self._known = False

    async def close(self) -> None:
        """End what was begun."""
        if self._early is not None:
            self._early.cancel()
            await asyncio.gather(self._early, return_exceptions=True)

    async def ensure(self, sandbox: Sandbox, workloads: Workloads) -> Observed:
        """Have the driver make the sandbox's object, with a leased address where there are any.

        Raises:
            NoAddress: there is none now.
            RuntimeFault: as `Driver.ensure` and `Driver.prepare_network` raise it.
        """
        for attempt in range(1, MAX_TAKEN + 1):
            ip = await self.lease(sandbox)
            try:
                seen = await self._station.driver.ensure(await workloads.of(sandbox, ip))
            except NetworkMissing:
                self.forget()
                raise
            except AddressTaken:
                _LOG.warning("%s on engine %s has an owner that this server does not know", ip, self._station.name)
                await self._addresses.give_up(sandbox.id, ip)
                if attempt == MAX_TAKEN:
                    raise
            else:
                await self._hold(sandbox, ip, seen)
                return seen
        raise AssertionError  # the last attempt raises or returns

    async def lease(self, sandbox: Sandbox) -> str:
        """The address for the next object of this sandbox; empty = the engine chooses one.

        Raises:
            NoAddress: there is none now.
            RuntimeFault: as `Driver.prepare_network` raises it.
        """
        network = await self._prepared()
        if network is None:
            return ""
        leased = await self._addresses.lease(_holder(sandbox), leasable(network.subnet))
        if leased is None:
            raise NoAddress(
                f"No address of {network.subnet} is free on engine {self._station.name}: each is used by a sandbox, or "
                "was within the last 10 minutes. Delete sandboxes, or give docker.subnets larger ones and remove the "
                f"network {network.name} while it is empty."
            )
        return leased

    async def _hold(self, sandbox: Sandbox, ip: str, seen: Observed) -> None:
        """An object that was there already may have another address than the one that was leased now."""
        there, network = seen.address, self._network
        if network is None or there is None or there.network != network.name or there.ip in ("", ip):
            return
        if not await self._addresses.hold(_holder(sandbox), there.ip):
            _LOG.error(
                "%s on engine %s is leased to two sandboxes; %s has it", there.ip, self._station.name, sandbox.id
            )

    async def reap(self) -> None:
        """Free what closed sandboxes still have. Trouble is logged: the next time may be better."""
        with suppress(StoreUnavailable):
            freed = await self._addresses.reap()
            if freed:
                _LOG.info("%d addresses on engine %s were leased to closed sandboxes", freed, self._station.name)

    def _begin(self) -> None:
        self.forget()
        if self._early is None or self._early.done():
            self._early = asyncio.create_task(self._prepare_early(), name="network")

    async def _prepare_early(self) -> None:
        try:
            await self._prepared()
        except (RuntimeFault, StoreUnavailable) as error:
            _LOG.warning("our network on engine %s is not there yet: %s", self._station.name, error)
        except Exception:  # noqa: BLE001 - the first sandbox asks again
            _LOG.exception("our network on engine %s could not be prepared", self._station.name)

    async def _prepared(self) -> OwnNetwork | None:
        async with self._asking:
            if not self._known:
                network = await self._station.driver.prepare_network()
                if network is not None:
                    await self._record(network)
                self._network, self._known = network, True
            return self._network

    async def _record(self, network: OwnNetwork) -> None:
        told = RecordNetwork(network.name, network.subnet, network.network_id)
        try:
            await self._engines.execute(self._station.name, told, self._meta)
        except StoreUnavailable as error:
            _LOG.warning("that the network was prepared is not recorded: %s", error)


def _holder(sandbox: Sandbox) -> Holder:
    assert sandbox.object_id is not None, "it has been placed"
    return Holder(sandbox.id, sandbox.tenant, sandbox.object_id, sandbox.generation + 1)
