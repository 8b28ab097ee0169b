"""decide(engine, command, now) -> events; and `place`, which chooses an engine for a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TypeAlias
from uuid import UUID

from msgspec import Struct

from app.domain.engine import events as ev
from app.domain.engine.events import LOG_WENT_BACK, MARK_ABSENT, MARK_OTHER, Capacity
from app.domain.engine.state import Engine, EngineState
from app.domain.sandbox.observed import Capabilities
from app.domain.text import storable

Events: TypeAlias = tuple[ev.Event, ...]


class Sighting(Struct, frozen=True):
    """An engine answered and said who it is. `mark` None = ours is not there."""

    name: str
    kind: str
    engine_id: str
    mark: str | None
    version: str
    api: str
    capabilities: Capabilities = Capabilities()
    capacity: Capacity = Capacity()
    labels: dict[str, str] = {}


class RecordSighting(Struct, frozen=True):
    """Compare it with what the log knows."""

    sighting: Sighting


class RecordSilence(Struct, frozen=True):
    """No worker has reached it since then."""

    since: datetime
    reason: str


class RecordLogWentBack(Struct, frozen=True):
    """It holds an object that bears a position beyond the end of the log: the database is an older copy.

    Report the highest position that was found, so that one `Trust` is enough.
    """

    last_position: int
    found_position: int


class Trust(Struct, frozen=True):
    """An operator says that the log, although it went back, is to be followed from here on."""


class RecordLeftover(Struct, frozen=True):
    """Record that an object of ours that no sandbox owns was removed."""

    role: str
    name: str
    object_id: UUID | None = None
    position: int | None = None


class RestoreMark(Struct, frozen=True):
    """An operator says that an engine without our mark is the one that the log knows, and has it made again."""

    expected: int
    found: int


class RecordAgentInstalled(Struct, frozen=True):
    """Record that the agent's files were copied out of an image."""

    image_id: str
    files: tuple[str, ...]
    size_bytes: int
    helper: str
    """The engine's id of what copied them. The same one again = no event: every worker that finds it reports it."""


class RecordNetwork(Struct, frozen=True):
    """Record our own network as a worker found or made it. The same one again = no event."""

    name: str
    subnet: str
    network_id: str


Command: TypeAlias = (
    RecordSighting
    | RecordSilence
    | RecordLogWentBack
    | Trust
    | RecordLeftover
    | RestoreMark
    | RecordAgentInstalled
    | RecordNetwork
)


def begin(sighting: Sighting) -> Events:
    """First contact: the engine is registered as it showed itself. Its mark must be there by now."""
    assert sighting.mark is not None, "the mark is made before the engine is registered"
    seen = _seen(sighting)
    first = ev.Registered(
        sighting.name,
        sighting.kind,
        sighting.mark,
        seen.engine_id,
        labels=sighting.labels,
        capacity=sighting.capacity,
    )
    return (first, seen)


def agrees(engine: Engine, sighting: Sighting) -> str | None:
    """Why this is not the engine that the log knows, or None when it is. The engine's own id may change; our mark may
    not.
    """
    if sighting.mark is None:
        return MARK_ABSENT
    return None if sighting.mark == engine.mark else MARK_OTHER


def decide(engine: Engine, command: Command, now: datetime) -> Events:
    """The events that the command leads to. Nothing new = none."""
    match command:
        case RecordSighting(sighting=sighting):
            return _sighted(engine, sighting, now)
        case RecordSilence(since=since, reason=reason):
            return (ev.Dark(since, storable(reason)),) if engine.state is EngineState.UP else ()
        case RecordLogWentBack(last_position=last, found_position=found):
            known = engine.state is EngineState.MISMATCH or found <= max(last, engine.trusted_position)
            event = ev.Mismatch(LOG_WENT_BACK, f"at most position {last}", f"position {found}")
            return () if known else (event,)
        case Trust():
            return (_back(engine, now),) if _is_mismatch(engine, LOG_WENT_BACK) else ()
        case RecordLeftover(role=role, name=name, object_id=object_id, position=position):
            return (ev.LeftoverRemoved(role, storable(name), object_id, position),)
        case RestoreMark(expected=expected, found=found):
            return (ev.MarkRestored(engine.mark, expected, found),)
        case RecordAgentInstalled(image_id=image_id, helper=helper):
            return () if engine.agents.get(image_id) == helper else (_installed(command),)
        case RecordNetwork(name=name, subnet=subnet, network_id=network_id):
            prepared = ev.NetworkPrepared(name, subnet, storable(network_id))
            return () if engine.network == prepared else (prepared,)


def _installed(command: RecordAgentInstalled) -> ev.AgentInstalled:
    files = tuple(map(storable, command.files))
    return ev.AgentInstalled(command.image_id, files, command.size_bytes, command.helper)


def _sighted(engine: Engine, sighting: Sighting, now: datetime) -> Events:
    why = agrees(engine, sighting)
    if why is not None:
        event = ev.Mismatch(why, engine.mark, storable(sighting.mark or "none"))
        return () if _is_mismatch(engine, why) else (event,)
    found: list[ev.Event] = []
    if engine.state is not EngineState.UP and not _is_mismatch(engine, LOG_WENT_BACK):
        found.append(_back(engine, now))
    seen = _seen(sighting)
    if seen != ev.Seen(
        engine.engine_id, engine.server_version, engine.api_version, engine.capabilities, engine.capacity
    ):
        found.append(seen)
    return tuple(found)


def _back(engine: Engine, now: datetime) -> ev.Back:
    return ev.Back(max(0, (now - engine.state_since) // timedelta(milliseconds=1)))


def _is_mismatch(engine: Engine, why: str) -> bool:
    return engine.state is EngineState.MISMATCH and engine.trouble.startswith(f"{why}:")


def _seen(sighting: Sighting) -> ev.Seen:
    engine_id, version, api = map(storable, (sighting.engine_id, sighting.version, sighting.api))
    return ev.Seen(engine_id, version, api, sighting.capabilities, sighting.capacity)


class Chosen(Struct, frozen=True):
    """The engine that takes a sandbox, and why."""

    engine: str
    epoch: int
    reason: str
    candidates: int


class NoEngine(Struct, frozen=True):
    """No engine can take it now."""

    reason: str
    message: str


def place(engines: Sequence[Engine]) -> Chosen | NoEngine:
    """Choose an engine: those that are up, then by name."""
    up = sorted((engine for engine in engines if engine.state is EngineState.UP), key=lambda engine: engine.name)
    if up:
        reason = "ONLY_ENGINE" if len(engines) == 1 else "FIRST_BY_NAME"
        return Chosen(up[0].name, up[0].epoch, reason, len(up))
    if not engines:
        return NoEngine("ENGINE_UNAVAILABLE", "No engine is registered yet; a worker registers one when it reaches it.")
    away = "; ".join(f"{engine.name} is {engine.state} ({engine.trouble.rstrip('.')})" for engine in engines)
    return NoEngine("ENGINE_UNAVAILABLE", f"No engine can take it: {away}.")
