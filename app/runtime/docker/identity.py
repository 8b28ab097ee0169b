"""Which engine this is: its own id, and our mark.

The engine's own id is not enough. Daemons on one host may share it, a copied data directory takes it along, and Podman
makes a new one for each question. So at first contact we leave a volume with a random word in a label. The engine makes
a volume only once for a name and answers a second create with the first one's labels: the first one decides, and
all others read the same word.

`check` never makes the mark. An engine without it is another one than we left, or its data is gone.
"""

from __future__ import annotations

import secrets
from http import HTTPStatus
from uuid import UUID

import msgspec
from msgspec import Struct

from app.domain.engine.events import Capacity
from app.domain.text import storable
from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.docker import names
from app.runtime.docker.answers import Info, Version, Volume
from app.runtime.docker.engine import Engine, Refused, trouble
from app.runtime.driver import Capabilities, EngineInfo

MIN_API_VERSION = (1, 41)
KIND = "docker"
NANO = 1_000_000_000
GRAPH_DRIVERS = ("aufs", "btrfs", "devicemapper", "fuse-overlayfs", "overlay2", "vfs", "zfs")
"""Of the engine that we know. Podman calls its own `overlay`, and loads images in another way."""


class VolumeConfig(Struct, frozen=True, rename="pascal"):
    """The body of a call that makes a volume."""

    name: str
    labels: dict[str, str]


async def leave_mark(engine: Engine, installation: UUID, word: str | None = None) -> str:
    """Make the mark unless it is there. The answer is the mark, ours or one that another worker made first.

    Raises:
        RuntimeRejected: `NAME_TAKEN`, a stranger's volume has its name.
    """
    name, labels = names.mark_name(installation), names.mark_labels(installation, word or secrets.token_hex(16))
    try:
        volume = await engine.create("volumes/create", VolumeConfig(name, labels), Volume, limit=engine.times.volume)
    except Refused as refused:
        raise trouble(f"make the volume {name}", refused) from None
    mark = names.mark_in(volume.name, volume.labels or {}, installation)
    if mark is None:
        raise RuntimeRejected("NAME_TAKEN", f"the volume {name} exists and is not ours: remove it, or rename it")
    return mark


async def check(engine: Engine, installation: UUID, can: Capabilities) -> EngineInfo:
    """Ask the engine who it is. Speaks its present API version from now on."""
    try:
        version = await engine.negotiate()
        _demand_api(engine, version)
        info = await engine.ask("info", Info)
        mark, taken = await _find_mark(engine, installation)
    except Refused as refused:
        raise trouble("say who it is", refused) from None
    return EngineInfo(
        kind=KIND,
        version=storable(version.version),
        api=storable(version.api_version),
        engine_id=storable(info.id),
        address=engine.address,
        mark=mark,
        name_taken=taken,
        capabilities=msgspec.structs.replace(can, snapshots=_snapshots(info)),
        capacity=Capacity(info.cpus * NANO or None, info.memory or None),
        live_restore=info.live_restore,
    )


def _snapshots(info: Info) -> str:
    """`load` takes an image whose layers the engine has only where a graph driver keeps them, not containerd."""
    containerd = any("containerd" in word for row in info.driver_status or () for word in row)
    return "load" if info.driver in GRAPH_DRIVERS and not containerd else "none"


async def _find_mark(engine: Engine, installation: UUID) -> tuple[str | None, str | None]:
    """The mark, and the name of a volume that has its place and is not ours."""
    name = names.mark_name(installation)
    try:
        volume = await engine.ask(f"volumes/{name}", Volume, limit=engine.times.volume)
    except Refused as refused:
        if refused.status == HTTPStatus.NOT_FOUND:
            return None, None
        raise
    mark = names.mark_in(volume.name, volume.labels or {}, installation)
    return mark, name if mark is None else None


def _demand_api(engine: Engine, version: Version) -> None:
    if tuple(int(part) for part in version.api_version.split(".") if part.isdecimal()) < MIN_API_VERSION:
        raise RuntimeUnavailable(
            f"the Docker engine at {engine.address} is too old ({storable(version.version)}): use 20.10 or later"
        )
