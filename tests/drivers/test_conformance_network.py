"""Our own network: what the fake says of it is what the engine says."""

from __future__ import annotations

import pytest

from app.domain.sandbox.address import leasable
from app.runtime.driver import Driver, OwnNetwork
from app.runtime.faults import AddressTaken, NetworkMissing
from tests.drivers.rig import Rig


async def prepared(driver: Driver) -> OwnNetwork:
    found = await driver.prepare_network()
    assert found is not None
    return found


async def test_a_driver_on_another_network_has_none(rig: Rig):
    assert await rig.driver.prepare_network() is None
    assert rig.calls["network"] == 0


async def test_an_address_is_of_one_and_of_our_network(rig: Rig):
    driver = rig.networked()
    network = await prepared(driver)
    assert await prepared(driver) == network
    first, _ = leasable(network.subnet)
    one, two = rig.work(ip=str(first)), rig.work(ip=str(first))
    seen = await driver.ensure(one)
    assert seen.address is not None
    assert (seen.address.network, seen.address.ip) == (network.name, str(first))
    assert (await driver.ensure(one)).adopted
    with pytest.raises(AddressTaken):
        await driver.ensure(two)
    assert not await rig.exists(f"sandbox-{two.ref.object_id}"), "the next attempt begins anew"
    await driver.remove(one.ref)
    await driver.ensure(two)
    await driver.remove(two.ref)
    await rig.forget_network()
    with pytest.raises(NetworkMissing):
        await driver.ensure(one)
    again = await prepared(driver)
    assert again.network_id != network.network_id
    await driver.ensure(one)
