"""What happened to an engine (catalogue, part 4).

`registered` also has the name, because the stream's id hides it. `mark_restored` is an addition to the catalogue: the
act of an operator whose engine lost our mark.
"""

from __future__ import annotations

from datetime import datetime
from typing import TypeAlias, get_args
from uuid import UUID

from msgspec import Struct

from app.domain import stream
from app.domain.sandbox.observed import Capabilities

MARK_ABSENT, MARK_OTHER, LOG_WENT_BACK = "MARK_ABSENT", "MARK_OTHER", "LOG_WENT_BACK"


class Capacity(Struct, frozen=True, omit_defaults=True):
    """The whole capacity of an engine."""

    cpu_nanos: int | None = None
    memory_bytes: int | None = None


class Registered(Struct, frozen=True, omit_defaults=True):
    """First contact. `mark` is a random word that we left on the engine and find again."""

    name: str
    kind: str
    mark: str
    engine_id: str
    epoch: int = 1
    labels: dict[str, str] = {}
    capacity: Capacity = Capacity()


class Seen(Struct, frozen=True, omit_defaults=True):
    """It said who it is. Recorded when it changed."""

    engine_id: str
    version: str
    api: str
    capabilities: Capabilities = Capabilities()
    capacity: Capacity = Capacity()


class Dark(Struct, frozen=True, omit_defaults=True):
    """No worker has reached it for some time. Nothing is concluded about its sandboxes."""

    since: datetime
    reason: str


class Back(Struct, frozen=True, omit_defaults=True):
    """It answers again, and it is the one that we know. `dark_ms` counts from the event before."""

    dark_ms: int = 0


class Mismatch(Struct, frozen=True, omit_defaults=True):
    """Something answers at its address that is not the engine we know, or that knows more than our log.

    `why` is `MARK_ABSENT`, `MARK_OTHER` or `LOG_WENT_BACK`. With the last, `found` ends with the position.
    """

    why: str
    expected: str
    found: str


ROLE_OF_AGENT = "agent"
"""The role of an agent's helper and volume in `LeftoverRemoved`."""


class LeftoverRemoved(Struct, frozen=True, omit_defaults=True):
    """An object of ours that no sandbox owned any more was removed."""

    role: str
    name: str
    object_id: UUID | None = None
    position: int | None = None


class MarkRestored(Struct, frozen=True, omit_defaults=True):
    """An operator had the mark made again on an engine that had lost it. Written just before it is made.

    `expected` is how many sandboxes should have an object there, `found` how many of these objects the engine showed.
    """

    mark: str
    expected: int = 0
    found: int = 0


class AgentInstalled(Struct, frozen=True, omit_defaults=True):
    """The agent's files were copied out of this image. Every sandbox that is made from then on uses them."""

    image_id: str
    files: tuple[str, ...]
    size_bytes: int = 0
    helper: str = ""
    """The engine's id of what copied them, by which two reports of one copy are known."""


class NetworkPrepared(Struct, frozen=True, omit_defaults=True):
    """Our own network is on the engine. Sandboxes that are made from then on get addresses of it."""

    name: str
    subnet: str
    """In CIDR form, e.g. `10.212.0.0/18`."""
    network_id: str = ""
    """The engine's id of it, by which two reports of one network are known."""


Event: TypeAlias = (
    Registered | Seen | Dark | Back | Mismatch | LeftoverRemoved | MarkRestored | AgentInstalled | NetworkPrepared
)
Recorded: TypeAlias = stream.Recorded[Event]

REGISTRY: stream.Registry[Event] = stream.Registry(
    "engine",
    {
        "engine.registered": Registered,
        "engine.seen": Seen,
        "engine.dark": Dark,
        "engine.back": Back,
        "engine.mismatch": Mismatch,
        "engine.leftover_removed": LeftoverRemoved,
        "engine.mark_restored": MarkRestored,
        "engine.agent_installed": AgentInstalled,
        "engine.network_prepared": NetworkPrepared,
    },
)
EVENT_CLASSES: tuple[type[Event], ...] = get_args(Event)
