"""The state of an engine: the fold of its events.

========== ================================================ ========= ======================
state      means                                            placement conclusions of absence
========== ================================================ ========= ======================
`up`       it answers, and its identity agrees              yes       yes
`dark`     no worker has reached it for 15 s                no        none
`mismatch` what answers is not the engine that we know, or  no        none, no verb but check
           it holds an object from beyond the log's end
========== ================================================ ========= ======================

A mismatch of identity ends when the engine shows the right mark again. A log that went back is not mended by the right
mark: it ends when an operator says that the log is to be followed. `trusted_position` remembers up to which position
this was said, so that the same object does not raise the alarm again.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from uuid import UUID, uuid5

from msgspec import Struct
from msgspec.structs import replace

from app.domain.engine import events as ev
from app.domain.engine.events import Capacity
from app.domain.sandbox.observed import Capabilities


class EngineState(StrEnum):
    """What may be expected of it."""

    UP = "up"
    DARK = "dark"
    MISMATCH = "mismatch"


class Engine(Struct, frozen=True):
    """One engine. Immutable; `evolve` makes the next one."""

    id: UUID
    tenant: str
    version: int
    position: int
    schema: int
    name: str
    kind: str
    engine_id: str
    """What the engine calls itself; it may change with an upgrade."""
    mark: str
    """What we left there; it may not change."""
    epoch: int
    state: EngineState
    state_since: datetime
    labels: dict[str, str] = {}
    capabilities: Capabilities = Capabilities()
    capacity: Capacity = Capacity()
    server_version: str = ""
    api_version: str = ""
    trouble: str = ""
    """Why it is dark or mismatched; of a mismatch it begins with `why` and a colon."""
    trusted_position: int = 0
    """Objects up to this position are no sign that the log went back."""
    agents: dict[str, str] = {}
    """Agents that were installed there: image id -> the engine's id of what copied the files."""
    network: ev.NetworkPrepared | None = None
    """Our own network there, as it was last reported; None = there was none yet."""


def stream_of(installation: UUID, name: str) -> UUID:
    """The stream of an engine."""
    return uuid5(installation, f"engine/{name}")


def evolve(engine: Engine | None, recorded: ev.Recorded) -> Engine:
    """The next state. Total on known events."""
    if engine is None:
        if not isinstance(recorded.event, ev.Registered):
            msg = f"stream {recorded.stream_id} does not begin with engine.registered"
            raise TypeError(msg)
        return _begin(recorded, recorded.event)
    after = replace(
        _apply(engine, recorded.event),
        version=recorded.version,
        position=recorded.position,
        schema=max(engine.schema, ev.REGISTRY.schema_of(recorded)),
    )
    return after if after.state is engine.state else replace(after, state_since=recorded.at)


def fold(history: Iterable[ev.Recorded], start: Engine | None = None) -> Engine | None:
    """The state after a history."""
    engine = start
    for recorded in history:
        engine = evolve(engine, recorded)
    return engine


def _begin(recorded: ev.Recorded, event: ev.Registered) -> Engine:
    return Engine(
        id=recorded.stream_id,
        tenant=recorded.tenant,
        version=recorded.version,
        position=recorded.position,
        schema=ev.REGISTRY.schema_of(recorded),
        name=event.name,
        kind=event.kind,
        engine_id=event.engine_id,
        mark=event.mark,
        epoch=event.epoch,
        state=EngineState.UP,
        state_since=recorded.at,
        labels=event.labels,
        capacity=event.capacity,
    )


def _apply(engine: Engine, event: ev.Event) -> Engine:
    match event:
        case ev.Seen():
            return replace(
                engine,
                engine_id=event.engine_id,
                server_version=event.version,
                api_version=event.api,
                capabilities=event.capabilities,
                capacity=event.capacity,
            )
        case ev.Dark(reason=reason):
            return replace(engine, state=EngineState.DARK, trouble=reason)
        case ev.Back():
            return replace(engine, state=EngineState.UP, trouble="", trusted_position=_trusted(engine))
        case ev.Mismatch(why=why, expected=expected, found=found):
            trouble = f"{why}: expected {expected}, found {found}"
            return replace(engine, state=EngineState.MISMATCH, trouble=trouble)
        case ev.AgentInstalled(image_id=image_id, helper=helper):
            return replace(engine, agents=engine.agents | {image_id: helper})
        case ev.NetworkPrepared():
            return replace(engine, network=event)
        case ev.LeftoverRemoved(role=ev.ROLE_OF_AGENT, name=name):
            return replace(
                engine, agents={image: helper for image, helper in engine.agents.items() if not _names(name, image)}
            )
        case ev.Registered() | ev.LeftoverRemoved() | ev.MarkRestored():
            return engine


def _names(name: str, image_id: str) -> bool:
    """Whether a helper or volume of this name has the files of this image: names end with the first digits of it."""
    return name.rpartition("-")[2] == image_id.removeprefix("sha256:")[:12]


def _trusted(engine: Engine) -> int:
    """When the log went back and is followed all the same: the position that showed it."""
    word = engine.trouble.rpartition(" ")[2]
    went_back = engine.trouble.startswith(f"{ev.LOG_WENT_BACK}:") and word.isascii() and word.isdigit()
    return max(engine.trusted_position, int(word)) if went_back else engine.trusted_position
