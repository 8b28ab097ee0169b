"""Our own network on the engine: a bridge of our own, on which traffic between sandboxes is off.

**Protocol.** The network has a derived name and our labels. One that is there is used as it is; its subnet is the one
that the engine says. Else it is made with the first configured subnet that this machine does not route already and that
the engine takes. Its network interface has a derived name too, and the engine gives that to one network only. So two
workers that make it at the same time make one, whatever their subnets are: the other is refused, and finds the first.

**Invariants.** The engine hands out addresses by itself from the first sixteenth of the subnet only. All others are
leased by us, so that no container of a stranger gets one that a sandbox has, or had a moment ago.

**How it fails.** A network of this name that is not ours is left alone, and sandboxes wait until a person has renamed
or removed it. One that a stranger removes while sandboxes stand on it is not possible: the engine refuses it. Without
sandboxes it is; then the next create is refused for it (`NetworkMissing`), and the network is made again.
"""

from __future__ import annotations

from http import HTTPStatus
from ipaddress import IPv4Network
from pathlib import Path

import msgspec
from msgspec import Struct

from app.domain.sandbox.address import engines_own, leasable, own_link, own_network
from app.domain.text import storable
from app.runtime.docker import names
from app.runtime.docker.engine import Engine, Refused, trouble
from app.runtime.docker.options import DockerOptions
from app.runtime.docker.spec import OWN
from app.runtime.docker.verdicts import has_any
from app.runtime.driver import OwnNetwork
from app.runtime.faults import AttemptFailed

ROUTES = Path("/proc/net/route")
CONFLICT = ("overlap", "same bridge name", "already exists", "already in use")
"""Words of a refusal for what another network has."""
_OPTIONS = {"com.docker.network.bridge.enable_icc": "false"}
_LINK = "com.docker.network.bridge.name"


class Pool(Struct, frozen=True, rename="pascal"):
    """One subnet of a network."""

    subnet: str = ""
    range: str = msgspec.field(name="IPRange", default="")


class Ipam(Struct, frozen=True, rename="pascal"):
    """The subnets of a network."""

    config: list[Pool] | None = None


class Network(Struct, frozen=True, rename="pascal"):
    """What the engine says of a network."""

    id: str
    name: str
    labels: dict[str, str] | None = None
    ipam: Ipam = msgspec.field(name="IPAM", default=Ipam())


class NetworkConfig(Struct, frozen=True, rename="pascal"):
    """The body of a call that makes a network."""

    name: str
    labels: dict[str, str]
    options: dict[str, str]
    ipam: Ipam = msgspec.field(name="IPAM")
    driver: str = "bridge"
    check_duplicate: bool = True


class Made(Struct, frozen=True, rename="pascal"):
    """Answer of a call that makes a network."""

    id: str


async def prepare_network(engine: Engine, options: DockerOptions) -> OwnNetwork | None:
    """As `Driver.prepare_network`."""
    if options.network_mode != OWN:
        return None
    refusals: list[str] = []
    for subnet in ("", *options.subnets):
        if subnet:
            if is_routed(subnet):
                refusals.append(f"{subnet}: this machine has a route to it")
                continue
            if (why := await _make(engine, options, subnet)) is not None:
                refusals.append(f"{subnet}: {why}")
        if (found := await _find(engine, options)) is not None:
            return found
    name, why = own_network(options.installation), "; ".join(refusals) or "none is configured"
    raise AttemptFailed("START_FAILED", f"the engine has no subnet for the network {name}; set docker.subnets ({why})")


async def _find(engine: Engine, options: DockerOptions) -> OwnNetwork | None:
    name = own_network(options.installation)
    try:
        found = await engine.ask(f"networks/{name}", Network)
    except Refused as refused:
        if refused.status == HTTPStatus.NOT_FOUND:
            return None
        raise trouble(f"show the network {name}", refused) from None
    if found.name != name:  # the engine takes the beginning of an id for a name, too
        return None
    if not names.is_network(found.labels or {}, options.installation):
        raise AttemptFailed("START_FAILED", f"the network {name} exists and is not ours: remove it, or rename it")
    subnet = next((pool.subnet for pool in found.ipam.config or () if ":" not in pool.subnet), "")
    try:
        leasable(subnet)
    except ValueError:
        raise AttemptFailed("START_FAILED", f"the network {name} has no usable subnet ({subnet}): remove it") from None
    return OwnNetwork(name, subnet, found.id)


async def _make(engine: Engine, options: DockerOptions, subnet: str) -> str | None:
    """None = made. Else why the engine does not take it."""
    name = own_network(options.installation)
    config = NetworkConfig(
        name,
        names.network_labels(options.installation),
        _OPTIONS | {_LINK: own_link(name)},
        Ipam([Pool(subnet, str(engines_own(subnet)))]),
    )
    try:
        await engine.create("networks/create", config, Made)
    except Refused as refused:
        if not has_any(refused.message, CONFLICT):
            raise trouble(f"make the network {name}", refused) from None
        return storable(refused.message)
    return None


def is_routed(subnet: str, routes: Path = ROUTES) -> bool:
    """Whether this machine has a route to a part of it, as far as it says. A bridge with the same addresses would cut
    the machine off from what is there.
    """
    try:
        rows = [line.split() for line in routes.read_text().splitlines()[1:]]
    except OSError:
        return False
    wanted = IPv4Network(subnet)
    found = [(_address(row[1]), _address(row[7])) for row in rows if len(row) > 7]  # noqa: PLR2004 - its columns
    return any(mask and wanted.overlaps(IPv4Network((place, mask.bit_count()))) for place, mask in found)


def _address(text: str) -> int:
    """The kernel prints addresses as numbers in the machine's order of bytes."""
    return int.from_bytes(bytes.fromhex(text)[::-1])
