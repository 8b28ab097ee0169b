"""Stored payloads of every (type, schema) there ever was. These files are history: added to, never edited."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from msgspec import Struct
from msgspec.structs import fields, replace

from app.domain import operations
from app.domain.engine import events as engine
from app.domain.sandbox import events as sandbox
from app.domain.snapshot import events as snapshot
from app.domain.stream import Actor, ActorKind, Meta, Recorded, Registry, Upcast, read_meta
from app.errors import UnknownEvent
from tests.support.payload import kinds

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.json"))
ALL = (sandbox, engine, snapshot, operations)
REGISTRIES: dict[str, Registry[Any]] = {events.REGISTRY.kind: events.REGISTRY for events in ALL}
STORED = sorted(
    (type_, schema)
    for registry in REGISTRIES.values()
    for type_, newest in registry.schemas.items()
    for schema in range(1, newest + 1)
)


def _key(file: Path) -> tuple[str, int]:
    type_, _, schema = file.stem.rpartition(".")
    return type_, int(schema)


def _registry(type_: str) -> Registry[Any]:
    return REGISTRIES[type_.partition(".")[0]]


def test_every_type_and_schema_has_its_file():
    assert sorted(map(_key, FILES)) == STORED


@pytest.mark.parametrize("events", ALL)
def test_every_event_has_a_name_below_its_streams_kind(events: Any):
    assert set(events.REGISTRY.types.values()) == set(events.EVENT_CLASSES)
    assert {name.partition(".")[0] for name in events.REGISTRY.types} == {events.REGISTRY.kind}


def test_a_type_that_came_later_says_which_revision_reads_it():
    """Otherwise an older server would not see that it cannot read the stream. The list is history: never edited."""
    first = set((GOLDEN / "revision-1.txt").read_text().split())
    for registry in REGISTRIES.values():
        late = {type_ for type_ in registry.schemas if type_ not in first}
        assert {type_ for type_ in late if registry.schemas[type_] < 2} == set()
    assert first == {type_ for registry in REGISTRIES.values() for type_ in registry.types if type_ in first}


def test_every_older_schema_has_its_upcast():
    for registry in REGISTRIES.values():
        older = {(type_, schema) for type_, schema in STORED if schema < registry.schemas.get(type_, 0)}
        assert set(registry.upcasts) == older
        assert registry.revision == max(registry.schemas.values())


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_still_reads_and_loses_nothing(file: Path):
    type_, schema = _key(file)
    registry = _registry(type_)
    event = registry.decode(type_, schema, file.read_bytes())
    encoded = registry.encode(event)
    assert encoded.type == type_
    if schema == encoded.schema:
        # msgspec passes over unknown keys: a field that was renamed or dropped would only be missed here.
        assert json.loads(bytes(encoded.data)) == json.loads(file.read_text())


def _unset(value: Struct) -> set[str]:
    """Fields that stand at their default, in all depths."""
    found: set[str] = set()
    for field in fields(value):
        inner: Any = getattr(value, field.name)
        if inner in (field.default, None, {}, ()):
            found.add(f"{type(value).__name__}.{field.name}")
        parts: tuple[Any, ...] = inner if isinstance(inner, tuple) else (inner,)  # pyright: ignore[reportUnknownVariableType]
        for part in parts:
            if isinstance(part, Struct):
                found |= _unset(part)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_newest_file_of_a_type_sets_every_field(file: Path):
    type_, schema = _key(file)
    registry = _registry(type_)
    if schema == registry.schemas[type_]:
        assert _unset(registry.decode(type_, schema, file.read_bytes())) == set()


# The rules of a payload (the catalogue of events, part 1)


@pytest.mark.parametrize("type_", [type_ for type_, _ in STORED])
def test_no_payload_can_hold_a_float_or_a_closed_list_of_words(type_: str):
    used = set(kinds(_registry(type_).types[type_]))
    assert float not in used
    assert Any not in used
    assert all(isinstance(kind, type) for kind in used), "a literal is a closed list"
    # An enumeration in a struct would refuse a word of a newer version.
    assert not {kind.__name__ for kind in used if hasattr(kind, "__members__")}


def test_meta_holds_no_float_and_no_closed_list_of_words_either():
    assert kinds(Meta) == {Meta, Actor, str, int, type(None)}


def test_a_word_from_the_future_is_kept_as_text():
    ended = sandbox.REGISTRY.decode("sandbox.termination_requested", 1, '{"end_cause": "batch_delete"}')
    assert ended == sandbox.TerminationRequested("batch_delete")
    seen = {"engine_id": "e", "version": "1", "api": "1", "capabilities": {"pause": "hibernate"}}
    shown = engine.REGISTRY.decode("engine.seen", 1, json.dumps(seen))
    assert isinstance(shown, engine.Seen)
    assert shown.capabilities.pause == "hibernate"
    stored = b'{"actor":{"kind":"webhook","id":"1","name":"n"},"app_version":"9"}'
    meta = read_meta(stored)
    assert str(meta.actor) == "webhook n"
    assert msgspec.json.encode(meta) == stored


def test_a_field_from_the_future_is_passed_over():
    assert sandbox.REGISTRY.decode("sandbox.pause_requested", 1, '{"reason": "night"}') == sandbox.PauseRequested()
    stored = '{"actor":{"kind":"timer","id":"1","name":"n","team":"x"},"app_version":"9","region":"eu"}'
    assert read_meta(stored) == Meta(Actor(ActorKind.TIMER, "1", "n"), "9")


@pytest.mark.parametrize("stored", ["[]", "null", "{", '{"actor": {"kind": "timer"}}', '{"app_version": "1"}'])
def test_a_meta_that_does_not_read_stops_loudly(stored: str):
    with pytest.raises(UnknownEvent, match="meta of an event does not read"):
        read_meta(stored)


# Upcasts


def _words(data: dict[str, Any]) -> dict[str, Any]:
    return {"words": data["text"].split(" ", 2)}


def _named(data: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("step", "reason", "message"), data["words"], strict=True))


UPCASTS: dict[tuple[str, int], Upcast] = {
    ("sandbox.failed", 1): _words,
    ("sandbox.failed", 2): _named,
    ("sandbox.paused", 1): lambda data: pytest.fail("another type's upcast"),
    ("sandbox.overdue", 2): lambda data: data | {"phase": "Stopping"},
}
TYPES: dict[str, type[sandbox.Event]] = {
    "sandbox.failed": sandbox.Failed,
    "sandbox.paused": sandbox.Paused,
    "sandbox.overdue": sandbox.Overdue,
}
CHANGED: Registry[sandbox.Event] = Registry(
    "sandbox",
    TYPES,
    revision=3,
    schemas={"sandbox.failed": 3, "sandbox.paused": 2, "sandbox.overdue": 3},
    upcasts=UPCASTS,
)
FAILED = sandbox.Failed("fetch", "NO_PLATFORM", "no such platform")


@pytest.mark.parametrize(
    ("schema", "stored"),
    [
        (1, '{"text": "fetch NO_PLATFORM no such platform"}'),
        (2, '{"words": ["fetch", "NO_PLATFORM", "no such platform"]}'),
        (3, '{"step": "fetch", "reason": "NO_PLATFORM", "message": "no such platform"}'),
    ],
)
def test_upcasts_are_chained_from_where_the_payload_stands(schema: int, stored: str):
    assert CHANGED.decode("sandbox.failed", schema, stored) == FAILED
    assert CHANGED.encode(FAILED).schema == 3


def test_the_number_of_an_event_is_the_stored_one_and_before_that_the_one_that_will_be_written():
    meta = Meta(Actor(ActorKind.TIMER, "1", "n"), "9")
    draft: sandbox.Recorded = Recorded(0, UUID(int=1), "default", 1, datetime.now(UTC), FAILED, meta)
    assert CHANGED.schema_of(draft) == 3
    assert CHANGED.schema_of(replace(draft, schema=1)) == 1


def test_a_schema_number_in_which_a_type_did_not_change_needs_no_upcast():
    stored = '{"since": "2026-03-01T12:00:00.000000Z"}'
    overdue = CHANGED.decode("sandbox.overdue", 1, stored)
    assert overdue == CHANGED.decode("sandbox.overdue", 2, stored)
    assert isinstance(overdue, sandbox.Overdue)
    assert overdue.since.isoformat() == "2026-03-01T12:00:00+00:00"


@pytest.mark.parametrize(("type_", "schema"), [("sandbox.failed", 4), ("sandbox.teleported", 1), ("sandbox.failed", 0)])
def test_the_future_stops_reading_loudly(type_: str, schema: int):
    with pytest.raises(UnknownEvent, match=f"{type_} schema {schema} was written by a newer version"):
        CHANGED.decode(type_, schema, '{"step": "a", "reason": "b"}')


def test_the_future_stops_reading_with_the_real_registries_too():
    for registry in REGISTRIES.values():
        for type_, newest in registry.schemas.items():
            with pytest.raises(UnknownEvent):
                registry.decode(type_, newest + 1, "{}")


@pytest.mark.parametrize("stored", ['{"exit_code": "one"}', '{"exit_code": 1.5}'])
def test_a_payload_that_does_not_read_stops_loudly_and_names_the_field(stored: str):
    with pytest.raises(UnknownEvent, match="exit_code"):
        sandbox.REGISTRY.decode("sandbox.runtime_exited", 1, stored)


def test_a_payload_that_does_not_read_after_an_upcast_stops_loudly_too():
    with pytest.raises(UnknownEvent, match=r"sandbox.overdue schema 1 does not read.*since"):
        CHANGED.decode("sandbox.overdue", 1, '{"since": "yesterday"}')
