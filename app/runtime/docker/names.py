"""Names and labels of everything that the driver puts on an engine. No other module knows one.

========= ========================================= ==================================================================
role      name                                      what it is
========= ========================================= ==================================================================
`main`    `sandbox-<object id>`                     the container that runs the workload
`egress`  `sandbox-egress-<object id>`              the container that filters its traffic (not made yet)
`mark`    `sandledger-mark-<installation>`          a volume; its label identifies this engine
`agent`   `sandledger-agent-<installation>-<image>` a volume with the agent's files, and the container that filled it
`network` `sandledger-<installation>`              our own network, on which sandboxes stand
========= ========================================= ==================================================================

Images of snapshots are `sandledger-snapshots:<snapshot id>`, role `snapshot`, and while they are made
`sandledger-snapshots:<snapshot id>-raw`, role `raw`. A container that is made from one bears labels of its own instead.

`<installation>` is the first eight hex digits of the installation's id, which is random; `<image>` the first twelve of
the image's id. What has the role `agent`, `mark` or `network` is ours and part of no object: no inventory shows it.

Labels are ours only (`sandledger.io/`). The public server lists and removes whatever bears `opensandbox.io/id`, so no
object of ours bears a label of that prefix, and no label of that prefix makes an object ours.

Labels travel: a container that somebody commits to an image hands all its labels to whatever is made from that image.
Therefore an object is ours only when installation label, object label, role label and the derived name agree. One
exception: where the log knows the engine's own id of a container, that id stands for the name, because a person may
rename a container and nobody can copy an id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from uuid import UUID

from msgspec import Struct

INSTALLATION = "sandledger.io/installation"
OBJECT = "sandledger.io/object"
ROLE = "sandledger.io/role"
TENANT = "sandledger.io/tenant"
GENERATION = "sandledger.io/generation"
POSITION = "sandledger.io/position"
MARK = "sandledger.io/mark"

MAIN, EGRESS = "main", "egress"
ROLE_OF_MARK, ROLE_OF_AGENT, ROLE_OF_NETWORK = "mark", "agent", "network"
ROLE_OF_SNAPSHOT, ROLE_OF_RAW = "snapshot", "raw"
SNAPSHOTS = "sandledger-snapshots"
"""The repository of all images of snapshots."""
PREFIXES = {MAIN: "sandbox-", EGRESS: "sandbox-egress-"}
"""Roles of containers."""


class Identity(Struct, frozen=True):
    """Which part of which object of ours a container is."""

    object_id: UUID
    role: str
    name: str


def container_name(object_id: UUID, role: str = MAIN) -> str:
    """Derived from the id, so that a repeated create meets the first one."""
    return f"{PREFIXES[role]}{object_id}"


def mark_name(installation: UUID) -> str:
    """The volume that marks the engine."""
    return f"sandledger-mark-{installation.hex[:8]}"


def labels_of(
    installation: UUID, object_id: UUID, role: str, *, tenant: str, generation: int, position: int
) -> dict[str, str]:
    """Identity and nothing else: everybody who may list containers reads labels."""
    return {
        INSTALLATION: str(installation),
        OBJECT: str(object_id),
        ROLE: role,
        TENANT: tenant,
        GENERATION: str(generation),
        POSITION: str(position),
    }


def identify(labels: Mapping[str, str], names: Iterable[str], installation: UUID) -> Identity | None:
    """Which part this container is; None = a stranger's. `names` as the engine gives them, with or without a slash."""
    identity = labelled(labels, installation)
    known = identity is not None and identity.name in {given.removeprefix("/") for given in names}
    return identity if known else None


def labelled(labels: Mapping[str, str], installation: UUID) -> Identity | None:
    """Which part the labels speak of, under the name that it was made with. A copy of the container says the same."""
    role = labels.get(ROLE, "")
    if labels.get(INSTALLATION) != str(installation) or role not in PREFIXES:
        return None
    try:
        object_id = UUID(labels.get(OBJECT, ""))
    except ValueError:
        return None
    return Identity(object_id, role, container_name(object_id, role))


def mark_labels(installation: UUID, mark: str) -> dict[str, str]:
    """Labels of the mark's volume."""
    return {INSTALLATION: str(installation), ROLE: ROLE_OF_MARK, MARK: mark}


def mark_in(name: str, labels: Mapping[str, str], installation: UUID) -> str | None:
    """The mark that a volume bears; None = the volume is not ours."""
    ours = name == mark_name(installation) and labels.get(INSTALLATION) == str(installation)
    return (labels.get(MARK) or None) if ours and labels.get(ROLE) == ROLE_OF_MARK else None


def agent_name(installation: UUID, image_id: str) -> str:
    """The volume with the files of one agent image, and the container that fills it."""
    return f"sandledger-agent-{installation.hex[:8]}-{image_id.removeprefix('sha256:')[:12]}"


def agent_labels(installation: UUID) -> dict[str, str]:
    """Labels of both."""
    return {INSTALLATION: str(installation), ROLE: ROLE_OF_AGENT}


def is_agent(labels: Mapping[str, str], installation: UUID) -> bool:
    """Whether a volume or container with the name of one is ours."""
    return labels.get(INSTALLATION) == str(installation) and labels.get(ROLE) == ROLE_OF_AGENT


def network_labels(installation: UUID) -> dict[str, str]:
    """Labels of our own network."""
    return {INSTALLATION: str(installation), ROLE: ROLE_OF_NETWORK}


def is_network(labels: Mapping[str, str], installation: UUID) -> bool:
    """Whether a network with the name of ours is ours."""
    return labels.get(INSTALLATION) == str(installation) and labels.get(ROLE) == ROLE_OF_NETWORK


def snapshot_tag(snapshot_id: UUID, *, raw: bool = False) -> str:
    """The tag of a snapshot's image, below `SNAPSHOTS`."""
    return f"{snapshot_id}-raw" if raw else str(snapshot_id)


def snapshot_labels(installation: UUID, snapshot_id: UUID, *, raw: bool, tenant: str, position: int) -> dict[str, str]:
    """Labels of a snapshot's image. All six, since a commit takes over those of the container that it does not get."""
    role = ROLE_OF_RAW if raw else ROLE_OF_SNAPSHOT
    return labels_of(installation, snapshot_id, role, tenant=tenant, generation=1, position=position)


def snapshot_in(labels: Mapping[str, str], installation: UUID) -> tuple[UUID, bool] | None:
    """The snapshot that an image is of, and whether it is a raw one; None = it is not ours."""
    role = labels.get(ROLE)
    if labels.get(INSTALLATION) != str(installation) or role not in (ROLE_OF_SNAPSHOT, ROLE_OF_RAW):
        return None
    try:
        return UUID(labels.get(OBJECT, "")), role == ROLE_OF_RAW
    except ValueError:
        return None


def generation_in(labels: Mapping[str, str]) -> int:
    """The generation label; 1 when it is missing or has been tampered with."""
    return _number(labels.get(GENERATION, "")) or 1


def position_in(labels: Mapping[str, str]) -> int | None:
    """The position label; None when it is missing or has been tampered with."""
    return _number(labels.get(POSITION, ""))


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None  # noqa: PLR2004 - int64
