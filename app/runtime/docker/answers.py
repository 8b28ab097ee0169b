"""The parts of the engine's answers that we read, and what they mean."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct

from app.domain.sandbox.address import HOST_NETWORK
from app.domain.sandbox.observed import Address
from app.domain.text import storable
from app.runtime.docker import names as names_
from app.runtime.driver import Exit, Observed, Part, Power

POWERS = {
    "created": Power.CREATED,
    "running": Power.RUNNING,
    "restarting": Power.RUNNING,
    "paused": Power.PAUSED,
    "exited": Power.EXITED,
    "dead": Power.EXITED,
    "removing": Power.EXITED,  # still there, holding its name, and never to run again
}
REMOVING = "removing"
GPU = "gpu"
"""What a device that is a GPU can do, as requests for devices name it."""
BOOTSTRAP = "/opt/opensandbox/bin/bootstrap.sh"
"""The entrypoint of a container with an agent."""


class Created(Struct, frozen=True, rename="pascal"):
    """Answer of a create call."""

    id: str


class State(Struct, frozen=True, rename="pascal"):
    """What `inspect` says about the container's process."""

    status: str
    started_at: datetime
    finished_at: datetime
    exit_code: int = 0
    error: str = ""
    oom_killed: bool = msgspec.field(name="OOMKilled", default=False)


class Config(Struct, frozen=True, rename="pascal"):
    """What the container was made with."""

    image: str = ""
    """The reference as it was given."""
    labels: dict[str, str] | None = None
    entrypoint: list[str] | None = None


class Fixed(Struct, frozen=True):
    """The address that a container was made with."""

    ip: str = msgspec.field(name="IPv4Address", default="")


class Endpoint(Struct, frozen=True):
    """The container's side of one network."""

    ip: str = msgspec.field(name="IPAddress", default="")
    fixed: Fixed | None = msgspec.field(name="IPAMConfig", default=None)


class Binding(Struct, frozen=True, rename="pascal"):
    """Where a port is published."""

    host_ip: str = ""
    host_port: str = ""


class Network(Struct, frozen=True, rename="pascal"):
    """How the container can be reached. An exited container has lost it all."""

    networks: dict[str, Endpoint] | None = None
    ports: dict[str, list[Binding] | None] | None = None


class Devices(Struct, frozen=True, rename="pascal"):
    """Devices that the container was made with, by what they can do."""

    count: int = 0
    """-1 = all of them."""
    capabilities: list[list[str]] | None = None


class HostPart(Struct, frozen=True, rename="pascal"):
    """What the container was given of its host."""

    device_requests: list[Devices] | None = None


class Inspected(Struct, frozen=True, rename="pascal"):
    """Answer of an inspect call."""

    id: str
    name: str
    created: datetime
    image: str
    state: State
    config: Config
    network_settings: Network | None = None
    host_config: HostPart | None = None

    @property
    def labels(self) -> dict[str, str]:
        """The labels. An engine may answer null; this never does."""
        return self.config.labels or {}

    @property
    def fixed_ip(self) -> str:
        """The address that it was made with; empty = the engine chooses one at each start."""
        networks = (self.network_settings.networks if self.network_settings else None) or {}
        return next((each.fixed.ip for each in networks.values() if each.fixed is not None and each.fixed.ip), "")

    def identity(self, installation: UUID) -> names_.Identity | None:
        """Which part of which object this is; None = a stranger's."""
        return names_.identify(self.labels, (self.name,), installation)


class Listed(Struct, frozen=True, rename="pascal"):
    """One row of a listing. It has no exit code and no start time; only an inspect call has those."""

    id: str
    state: str
    created: int
    image_id: str = msgspec.field(name="ImageID", default="")
    names: list[str] | None = None
    labels: dict[str, str] | None = None

    def identity(self, installation: UUID) -> names_.Identity | None:
        """Which part of which object this is; None = a stranger's."""
        return names_.identify(self.labels or {}, self.names or (), installation)


class Actor(Struct, frozen=True, rename="pascal"):
    """Whom an event is about; attributes are labels, name and image together."""

    id: str = msgspec.field(name="ID", default="")
    attributes: dict[str, str] = {}


class Event(Struct, frozen=True):
    """One line of the event stream."""

    action: str = msgspec.field(name="Action", default="")
    actor: Actor = msgspec.field(name="Actor", default=Actor())
    time_nano: int = msgspec.field(name="timeNano", default=0)


class Version(Struct, frozen=True, rename="pascal"):
    """Answer of the version call."""

    version: str
    api_version: str


class Info(Struct, frozen=True):
    """Answer of the info call."""

    id: str = msgspec.field(name="ID", default="")
    cpus: int = msgspec.field(name="NCPU", default=0)
    memory: int = msgspec.field(name="MemTotal", default=0)
    live_restore: bool | None = msgspec.field(name="LiveRestoreEnabled", default=None)
    driver: str = msgspec.field(name="Driver", default="")
    """What keeps the layers of images."""
    driver_status: list[list[str]] | None = msgspec.field(name="DriverStatus", default=None)


class Volume(Struct, frozen=True, rename="pascal"):
    """Answer of the calls that make or show a volume."""

    name: str
    labels: dict[str, str] | None = None


class ImageShown(Struct, frozen=True, rename="pascal"):
    """Answer of an image inspect call."""

    id: str
    os: str = ""
    architecture: str = ""
    size: int | None = None
    repo_digests: list[str] | None = None


class RootFs(Struct, frozen=True, rename="pascal"):
    """The layers of an image, the lowest first."""

    layers: list[str] | None = None


class ImageDetail(Struct, frozen=True, rename="pascal"):
    """Answer of an image inspect call, as far as another image is made of it."""

    id: str
    os: str = ""
    architecture: str = ""
    variant: str = ""
    size: int | None = None
    root_fs: RootFs = msgspec.field(name="RootFS", default=RootFs())
    config: dict[str, Any] | None = None
    repo_tags: list[str] | None = None


class ImageListed(Struct, frozen=True, rename="pascal"):
    """One row of a listing of images."""

    id: str
    created: int = 0
    size: int | None = None
    labels: dict[str, str] | None = None


class Committed(Struct, frozen=True, rename="pascal"):
    """Answer of a commit call."""

    id: str


class PullError(Struct, frozen=True):
    """The reason inside a failed pull's progress line."""

    message: str = ""


class Amount(Struct, frozen=True):
    """How much of a layer has been moved, in bytes."""

    current: float = 0
    total: float = 0


class PullLine(Struct, frozen=True):
    """One line of a pull's progress; a failure arrives as a line of a 200 answer."""

    status: str | None = None
    id: str | None = None
    amount: Amount | None = msgspec.field(name="progressDetail", default=None)
    error: str = ""
    detail: PullError | None = msgspec.field(name="errorDetail", default=None)

    @property
    def failure(self) -> str:
        """Why the pull failed; empty while it does not."""
        return (self.detail.message if self.detail else "") or self.error


def power(status: str) -> Power:
    """What a state's word means. An unknown word is taken as running: it is there and not known to have ended."""
    return POWERS.get(status, Power.RUNNING)


def observed(
    shown: Inspected, identity: names_.Identity, *, adopted: bool = False, digest: str | None = None
) -> Observed:
    """What one inspect call says about an object."""
    now = power(shown.state.status)
    return Observed(
        object_id=identity.object_id,
        parts=(Part(identity.role, shown.id, identity.name),),
        power=now,
        generation=names_.generation_in(shown.labels),
        position=names_.position_in(shown.labels),
        image_id=shown.image or None,
        image_digest=digest,
        created_at=_moment(shown.created),
        started_at=_moment(shown.state.started_at),
        exit=_exit(shown.state) if now is Power.EXITED else None,
        adopted=adopted,
        address=_address(shown.network_settings) if now in (Power.RUNNING, Power.PAUSED) else None,
        gpus=_gpus(shown.host_config),
        agent=shown.config.entrypoint == [BOOTSTRAP],
    )


def listed(row: Listed, identity: names_.Identity, parts: tuple[Part, ...]) -> Observed:
    """One object of the inventory, by the row of its main part."""
    labels = row.labels or {}
    return Observed(
        object_id=identity.object_id,
        parts=parts,
        power=power(row.state),
        generation=names_.generation_in(labels),
        position=names_.position_in(labels),
        image_id=row.image_id or None,
        created_at=made_at(row),
    )


def made_at(row: Listed) -> datetime:
    """When a listed container was made."""
    return datetime.fromtimestamp(row.created, UTC)


def _exit(state: State) -> Exit:
    # The end is noted as it happens, the start only when the engine learns of it: a short life may seem to end
    # before it began.
    at = max(state.started_at, state.finished_at)
    return Exit(state.exit_code, state.oom_killed, storable(state.error), _moment(at))


def _address(network: Network | None) -> Address | None:
    """The one network that a sandbox is on. None: there is none, or the engine does not show it yet."""
    networks = (network.networks if network else None) or {}
    for name, endpoint in networks.items():
        if endpoint.ip or name == HOST_NETWORK:
            ports = (network.ports if network else None) or {}
            return Address(name, endpoint.ip, dict(filter(None, map(_published, ports.items()))))
    return None


def _published(port: tuple[str, list[Binding] | None]) -> tuple[str, str] | None:
    """`8080/tcp` and where it is published; None while it is not."""
    number, bindings = port
    for binding in bindings or ():
        if binding.host_port:
            host = f"[{binding.host_ip}]" if ":" in binding.host_ip else binding.host_ip
            return number.removesuffix("/tcp"), f"{host}:{binding.host_port}"
    return None


def _gpus(host: HostPart | None) -> int | None:
    """How many GPUs a container has got; None = none, or all of them.

    The engine repeats the count that was asked for, and does not start a container that it cannot give as many. How
    many "all" are it says nowhere: `info` lists the devices of CDI, where one GPU has several names, and resources that
    an operator wrote down for another purpose. A guess would stay in the log for ever, so there is none.
    """
    requests = (host.device_requests if host else None) or []
    counts = [each.count for each in requests if any(GPU in group for group in each.capabilities or ())]
    return sum(counts) if counts and min(counts) >= 0 else None


def _moment(value: datetime) -> datetime | None:
    """The engine says "never" as the year 1."""
    return value.astimezone(UTC) if value.year > 1 else None
