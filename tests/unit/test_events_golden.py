"""Stored payloads of every (type, schema) there ever was. These files are history: added to, never edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from app.domain.sandbox import events as ev
from app.errors import UnknownEvent

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILES = sorted(GOLDEN.glob("*.json"))
STORED = sorted((type_, schema) for type_, newest in ev.SCHEMA.items() for schema in range(1, newest + 1))


def _key(file: Path) -> tuple[str, int]:
    type_, _, schema = file.stem.rpartition(".")
    return type_, int(schema)


def _is_part(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and _is_part(part[key], whole[key]) for key in part)
    return part == whole


def test_every_type_and_schema_has_its_file():
    assert sorted(map(_key, FILES)) == STORED
    assert set(ev.SCHEMA) == {ev.wire_name(kind) for kind in ev.EVENT_CLASSES}


def test_every_older_schema_has_its_upcast():
    assert set(ev.UPCASTS) == {(type_, schema) for type_, schema in STORED if schema < ev.SCHEMA[type_]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_still_reads_and_loses_nothing(file: Path):
    type_, schema = _key(file)
    payload = json.loads(file.read_text())
    event = ev.from_payload(type_, schema, payload)
    assert ev.wire_name(event) == type_
    if schema == ev.SCHEMA[type_]:
        # msgspec passes over unknown keys: a field that was renamed or dropped would only be missed here.
        assert _is_part(payload, json.loads(msgspec.json.encode(ev.to_payload(event))))


def test_a_field_from_the_future_with_a_default_elsewhere_is_passed_over():
    assert ev.from_payload("sandbox.paused", 1, {"reason": "night"}) == ev.Paused()


def _older_failed() -> dict[str, Any]:
    """How `sandbox.failed` might have looked twice before."""
    return {"text": "NO_PLATFORM no such platform"}


UPCASTS: dict[tuple[str, int], ev.Upcast] = {
    ("sandbox.failed", 1): lambda data: {"words": data["text"].split(" ", 1)},
    ("sandbox.failed", 2): lambda data: {"reason": data["words"][0], "message": data["words"][1]},
    ("sandbox.paused", 1): lambda data: pytest.fail("another type's upcast"),
}
CURRENT = {"sandbox.failed": 3, "sandbox.paused": 2}


def test_upcasts_are_chained_in_order():
    stored = _older_failed()
    event = ev.from_payload("sandbox.failed", 1, stored, current=CURRENT, upcasts=UPCASTS)
    assert event == ev.Failed("NO_PLATFORM", "no such platform")
    assert stored == _older_failed()


def test_a_chain_begins_where_the_payload_stands():
    middle = {"words": ["A", "b c"]}
    assert ev.from_payload("sandbox.failed", 2, middle, current=CURRENT, upcasts=UPCASTS) == ev.Failed("A", "b c")
    newest = {"reason": "A", "message": "b c"}
    assert ev.from_payload("sandbox.failed", 3, newest, current=CURRENT, upcasts=UPCASTS) == ev.Failed("A", "b c")


@pytest.mark.parametrize(("type_", "schema"), [("sandbox.failed", 4), ("sandbox.teleported", 1), ("sandbox.failed", 0)])
def test_the_future_stops_reading_loudly(type_: str, schema: int):
    with pytest.raises(UnknownEvent, match=f"{type_} schema {schema} was written by a newer version"):
        ev.from_payload(type_, schema, {"reason": "A", "message": "b"}, current=CURRENT, upcasts=UPCASTS)


def test_the_future_stops_reading_with_the_real_tables_too():
    for type_, newest in ev.SCHEMA.items():
        with pytest.raises(UnknownEvent):
            ev.from_payload(type_, newest + 1, {})


def test_a_payload_that_does_not_read_stops_loudly_and_names_the_field():
    with pytest.raises(UnknownEvent, match="exit_code"):
        ev.from_payload("sandbox.runtime_exited", 1, {"exit_code": "one"})


def test_an_actor_from_the_future_stops_reading_loudly():
    with pytest.raises(UnknownEvent, match=r"actor\.kind"):
        ev.read_meta({"actor": {"kind": "webhook", "id": "1", "name": "n"}, "app_version": "9"})
