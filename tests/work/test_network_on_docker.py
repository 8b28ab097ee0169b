"""Our own network on a real engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import aiodocker
import msgspec
import pytest

from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox.address import engines_own, leasable, own_link, own_network
from app.errors import RuntimeUnavailable
from app.runtime.docker import DockerDriver, DockerOptions, connect
from app.runtime.docker import network as networks
from app.runtime.driver import Image, OwnNetwork, Ref, Workload
from app.runtime.faults import AddressTaken, AttemptFailed, NetworkMissing
from app.settings import DockerSettings
from tests.support.marks import remove_mark
from tests.support.needs import refuse_or_skip

IMAGE = "sandledger-demo:1"
SUBNETS = DockerSettings().subnets
ECHO = ("sh", "-c", "exec nc -ll -p 3000 -e cat")


class Rig:
    """Drivers of one installation on the real engine."""

    def __init__(self, docker: aiodocker.Docker, host: str) -> None:
        self.docker = docker
        self.installation = uuid4()
        self.name = own_network(self.installation)
        self._host = host
        self._drivers: list[DockerDriver] = []
        self._made: list[str] = []

    def driver(self, subnets: tuple[str, ...] = SUBNETS) -> DockerDriver:
        options = DockerOptions(installation=self.installation, network_mode="bridge", subnets=subnets)
        self._drivers.append(connect(options, self._host))
        return self._drivers[-1]

    def work(self, ip: object, object_id: UUID | None = None) -> Workload:
        work = Workload(Ref(object_id or uuid4()), "t", Image(IMAGE), ECHO, {}, ip=str(ip))
        self._made.append(f"sandbox-{work.ref.object_id}")
        return work

    async def stranger(self, config: dict[str, Any]) -> dict[str, Any]:
        made = await self.docker.containers.create({"Image": IMAGE, "Entrypoint": ["sleep", "600"], **config})
        self._made.append(made.id)
        await made.start()
        return await made.show()

    def on(self, **config: Any) -> dict[str, Any]:
        endpoint = {"IPAMConfig": config} if config else {}
        return {
            "HostConfig": {"NetworkMode": self.name},
            "NetworkingConfig": {"EndpointsConfig": {self.name: endpoint}},
        }

    async def remove(self, *names: str) -> None:
        for name in names or self._made:
            with suppress(aiodocker.DockerError):
                await self.docker.containers.container(name).delete(force=True, v=True)

    async def close(self) -> None:
        for driver in self._drivers:
            await driver.close()
        await self.remove()
        await remove_mark(self.docker, self.installation)


@pytest.fixture
async def rig(docker_host: str) -> AsyncIterator[Rig]:
    async with aiodocker.Docker(docker_host) as docker:
        try:
            await ensure_busybox_image(docker, IMAGE)
        except RuntimeUnavailable as error:
            refuse_or_skip(f"no engine can be used: {error}")
        rig = Rig(docker, docker_host)
        try:
            yield rig
        finally:
            await rig.close()


async def prepared(driver: DockerDriver) -> OwnNetwork:
    found = await driver.prepare_network()
    assert found is not None
    return found


async def test_two_that_make_it_at_once_make_one(rig: Rig):
    """Even with other subnets: the engine gives the name of the interface once. It does not do that for a name."""
    both = rig.driver(), rig.driver(SUBNETS[::-1])
    one, two = await asyncio.gather(*map(prepared, both))
    assert one == two
    shown = await (await rig.docker.networks.get(rig.name)).show()
    assert shown["Options"]["com.docker.network.bridge.enable_icc"] == "false"
    assert shown["IPAM"]["Config"] == [{"Subnet": one.subnet, "IPRange": str(engines_own(one.subnet))}]
    assert await rig.driver().prepare_network() == one
    # The next installation gets another subnet.
    other = Rig(rig.docker, "")
    other._host = rig._host
    try:
        assert (await prepared(other.driver((one.subnet, *SUBNETS)))).subnet != one.subnet
    finally:
        await other.close()
    await (await rig.docker.networks.get(rig.name)).delete()
    assert (await prepared(both[0])).network_id != one.network_id, "made again"


async def test_a_strangers_network_is_left_alone(rig: Rig):
    await rig.docker.networks.create({"Name": rig.name, "CheckDuplicate": True})
    try:
        with pytest.raises(AttemptFailed, match=r"exists and is not ours"):
            await rig.driver().prepare_network()
    finally:
        await (await rig.docker.networks.get(rig.name)).delete()


async def test_a_container_stands_at_its_address_and_nowhere_else(rig: Rig, docker_host: str):
    driver = rig.driver()
    subnet = (await prepared(driver)).subnet
    first, _ = leasable(subnet)
    work = rig.work(first)
    seen = await driver.ensure(work)
    assert seen.address is not None
    assert (seen.address.network, seen.address.ip) == (rig.name, str(first))
    # What asks for none gets one that is never leased.
    taken = (await rig.stranger(rig.on()))["NetworkSettings"]["Networks"][rig.name]["IPAddress"]
    assert taken in [str(each) for each in engines_own(subnet)]
    # A start that is refused for the address says so, and leaves nothing; another address is then possible.
    again = rig.work(first)
    with pytest.raises(AddressTaken):
        await driver.ensure(again)
    next_ = msgspec.structs.replace(again, ip=str(first + 1))
    seen = await driver.ensure(next_)
    assert seen.address is not None
    assert seen.address.ip == str(first + 1)
    # One that an earlier attempt left with another address is not taken over.
    left = rig.work(first + 2)
    made = await rig.docker.containers.create(
        {"Image": IMAGE, "Labels": await labels_of(rig, again), **rig.on(IPv4Address=str(first + 3))},
        name=f"sandbox-{left.ref.object_id}",
    )
    labels = (await made.show())["Config"]["Labels"] | {"sandledger.io/object": str(left.ref.object_id)}
    await made.delete()
    await rig.docker.containers.create(
        {"Image": IMAGE, "Labels": labels, **rig.on(IPv4Address=str(first + 3))}, name=f"sandbox-{left.ref.object_id}"
    )
    seen = await driver.ensure(left)
    assert seen.address is not None
    assert (seen.address.ip, seen.adopted) == (str(first + 2), False)
    # A removal by a stranger shows at the next create.
    await rig.remove()
    await (await rig.docker.networks.get(rig.name)).delete()
    with pytest.raises(NetworkMissing):
        await driver.ensure(work)
    await prepared(driver)
    await driver.ensure(work)


async def labels_of(rig: Rig, work: Workload) -> dict[str, str]:
    shown = await rig.docker.containers.container(f"sandbox-{work.ref.object_id}").show()
    return shown["Config"]["Labels"]


def test_the_name_of_the_interface_is_short_enough():
    assert len(own_link(own_network(uuid4()))) < 16


def test_a_subnet_that_this_machine_routes_is_passed_over(tmp_path: Any):
    routes = tmp_path / "route"
    head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
    routes.write_text(
        f"{head}eth0\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
        "eth0\t0040D40A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    )
    assert networks.is_routed("10.212.64.0/18", routes), "10.212.64.0/24 is eth0's"
    assert not networks.is_routed("10.212.0.0/18", routes), "the default route is no reason"
    assert not networks.is_routed("10.212.64.0/18", tmp_path / "none")
