"""The state of an engine: the fold of its events.

========== ================================================ ========= ======================
state      means                                            placement conclusions of absence
========== ================================================ ========= ======================
`up`       it answers, and its identity agrees              yes       yes
`dark`     no worker has reached it for 15 s                no        none
`mismatch` what answers is not the engine that we know      no        none, no verb but check
========== ================================================ ========= ======================
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
    """Why it is dark or mismatched."""


def stream_of(installation: UUID, name: str) -> UUID:
    """The stream of an engine."""
    return uuid5(installation, f"engine/{name}")


def evolve(engine: Engine | None, fact: ev.Recorded) -> Engine:
    """The next state. Total on known events."""
    if engine is None:
        if not isinstance(fact.event, ev.Registered):
            msg = f"stream {fact.stream_id} does not begin with engine.registered"
            raise TypeError(msg)
        return _begin(fact, fact.event)
    schema = ev.REGISTRY.schemas[ev.REGISTRY.name_of(fact.event)]
    after = replace(
        _apply(engine, fact.event), version=fact.version, position=fact.position, schema=max(engine.schema, schema)
    )
    return after if after.state is engine.state else replace(after, state_since=fact.at)


def fold(facts: Iterable[ev.Recorded], start: Engine | None = None) -> Engine | None:
    """The state after a history."""
    engine = start
    for fact in facts:
        engine = evolve(engine, fact)
    return engine


def _begin(fact: ev.Recorded, event: ev.Registered) -> Engine:
    return Engine(
        id=fact.stream_id,
        tenant=fact.tenant,
        version=fact.version,
        position=fact.position,
        schema=ev.REGISTRY.schemas["engine.registered"],
        name=event.name,
        kind=event.kind,
        engine_id=event.engine_id,
        mark=event.mark,
        epoch=event.epoch,
        state=EngineState.UP,
        state_since=fact.at,
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
            return replace(engine, state=EngineState.UP, trouble="")
        case ev.Mismatch(why=why, expected=expected, found=found):
            trouble = f"{why}: expected {expected}, found {found}"
            return replace(engine, state=EngineState.MISMATCH, trouble=trouble)
        case ev.Registered() | ev.LeftoverRemoved():
            return engine
