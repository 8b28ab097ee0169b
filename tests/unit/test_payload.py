"""One event, one text: how payloads are encoded, and what of an engine's text may stand in them."""

from __future__ import annotations

import json
import unicodedata
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import fields

from app.domain import operations
from app.domain.canonical import canonical
from app.domain.engine import events as engine
from app.domain.sandbox import events as sandbox
from app.domain.stream import (
    PLATFORM_TENANT,
    Actor,
    ActorKind,
    Meta,
    Recorded,
    Registry,
    read_meta,
)
from app.domain.text import MAX_MESSAGE_CHARS, storable
from tests.support.payload import values
from tests.support.stream import BEGIN, ID, META

EVENTS = [
    pytest.param(registry, cls, id=name)
    for registry in (sandbox.REGISTRY, engine.REGISTRY, operations.REGISTRY)
    for name, cls in registry.types.items()
]


@pytest.mark.parametrize(("registry", "cls"), EVENTS)
def test_an_event_reads_back_as_it_was_written_and_is_written_as_it_was(registry: Registry[Any], cls: type[Any]):
    @given(values(cls))
    @settings(max_examples=40, deadline=None)
    def check(event: Any) -> None:
        first = registry.encode(event)
        read = registry.decode(first.type, first.schema, bytes(first.data))
        assert read == event
        assert bytes(registry.encode(read).data) == bytes(first.data)

    check()


@given(values(Meta))
@settings(deadline=None)
def test_meta_reads_back_as_it_was_written(meta: Meta):
    assert read_meta(msgspec.json.encode(meta)) == meta


def test_meta_as_it_is_stored():
    actor = Actor(ActorKind.API_KEY, "k", "default")
    assert msgspec.json.encode(Meta(actor, "0.2.0")) == (
        b'{"actor":{"kind":"api_key","id":"k","name":"default"},"app_version":"0.2.0"}'
    )
    full = Meta(actor, "0.2.0", "r", 7, "192.0.2.1", "d", "00-1-2-01")
    assert set(json.loads(msgspec.json.encode(full))) == {field.encode_name for field in fields(Meta)}


# A field that has its default is left out, wherever the value came from


def _filled(value: Struct) -> dict[str, Any]:
    """Every field, defaults too."""
    found: dict[str, Any] = {}
    for field in fields(value):
        inner = getattr(value, field.name)
        found[field.name] = _filled(inner) if isinstance(inner, Struct) else inner
    return found


@pytest.mark.parametrize(("registry", "cls"), EVENTS)
def test_a_default_that_was_read_is_left_out_as_one_that_was_never_given(registry: Registry[Any], cls: type[Any]):
    required = [field for field in fields(cls) if field.required]
    example = msgspec.convert({field.name: _example(field.type) for field in required}, cls)
    stored = msgspec.json.encode(_filled(example))
    name = registry.name_of(cls)
    assert len(json.loads(stored)) == len(fields(cls))
    assert set(json.loads(bytes(registry.encode(registry.decode(name, 1, stored)).data))) == {
        field.name for field in required
    }


def _example(kind: Any) -> Any:
    simple: dict[Any, Any] = {
        str: "x",
        int: 1,
        datetime: datetime.fromisoformat("2026-03-01T12:00:00+00:00"),
        sandbox.Address: {"network": "x"},
        sandbox.SandboxSpec: {"image": "busybox", "entrypoint": ["sleep"]},
    }
    return simple.get(kind, "0198f000-0000-7000-8000-000000000001" if "UUID" in str(kind) else [])


class _Pieces(Struct, frozen=True, omit_defaults=True):
    pieces: tuple[engine.Dark, ...] = ()
    capacity: engine.Capacity | None = None


def test_what_stands_inside_of_a_payload_is_put_in_order_too():
    at = datetime.fromisoformat("2026-03-01T13:00:00+01:00")
    value = _Pieces((engine.Dark(at, "a"), engine.Dark(at, "b")), engine.Capacity())
    assert json.loads(msgspec.json.encode(canonical(value))) == {
        "pieces": [{"since": "2026-03-01T12:00:00.000000Z", "reason": reason} for reason in ("a", "b")],
        "capacity": {},
    }
    assert msgspec.json.encode(canonical(_Pieces())) == b"{}"


def test_msgspec_alone_would_write_a_default_that_was_read():
    read = sandbox.REGISTRY.decode("sandbox.ready", 1, '{"via": "runtime"}')
    assert msgspec.json.encode(read) == b'{"via":"runtime"}'
    assert bytes(sandbox.REGISTRY.encode(read).data) == b"{}"


def test_the_order_in_which_a_client_sent_its_metadata_does_not_matter():
    orders = [{"a": "1", "b": "2"}, {"b": "2", "a": "1"}]
    texts = {bytes(sandbox.REGISTRY.encode(sandbox.MetadataPatched(order)).data) for order in orders}
    assert texts == {b'{"set":{"a":"1","b":"2"}}'}


def test_the_operations_stream_is_folded_to_how_far_it_is():
    event = operations.MasterKeyRotated("old", "new", 3)
    history = [Recorded(p, ID, PLATFORM_TENANT, v, BEGIN, event, META, s) for v, p, s in ((1, 7, 2), (2, 9, 1))]
    state = None
    for recorded in history:
        state = operations.evolve(state, recorded)
    assert state == operations.Operations(ID, PLATFORM_TENANT, 2, 9, 2)


# Instants and integers


@pytest.mark.parametrize(
    ("at", "stored"),
    [
        ("2026-03-01T12:00:00+00:00", "2026-03-01T12:00:00.000000Z"),
        ("2026-03-01T12:00:00.5+00:00", "2026-03-01T12:00:00.500000Z"),
        ("2026-03-01T01:30:00.123456+02:30", "2026-02-28T23:00:00.123456Z"),
        ("0999-03-01T12:00:00+00:00", "0999-03-01T12:00:00.000000Z"),
    ],
)
def test_an_instant_is_utc_with_six_digits(at: str, stored: str):
    encoded = sandbox.REGISTRY.encode(sandbox.Renewed(datetime.fromisoformat(at)))
    assert json.loads(bytes(encoded.data)) == {"expires_at": stored}


def test_one_instant_is_one_text_in_every_time_zone():
    at = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
    zones = [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-3))]
    texts = {bytes(sandbox.REGISTRY.encode(sandbox.Paused(at.astimezone(zone))).data) for zone in zones}
    assert len(texts) == 1


def test_an_instant_without_a_time_zone_is_not_stored():
    with pytest.raises(ValueError, match="time zone"):
        sandbox.REGISTRY.encode(sandbox.Renewed(datetime.fromisoformat("2026-03-01T12:00:00")))


@pytest.mark.parametrize("beyond", [2**53 + 1, -(2**53) - 1, 2**64])
def test_an_integer_that_a_float_cannot_hold_is_not_stored(beyond: int):
    assert json.loads(bytes(sandbox.REGISTRY.encode(sandbox.Ready(2**53)).data)) == {"after_ms": 2**53}
    with pytest.raises(ValueError, match=r"Ready.after_ms is beyond 2\^53"):
        sandbox.REGISTRY.encode(sandbox.Ready(beyond))
    deep = engine.Seen("e", "1", "1", capacity=engine.Capacity(memory_bytes=beyond))
    with pytest.raises(ValueError, match=r"Capacity.memory_bytes is beyond"):
        engine.REGISTRY.encode(deep)


# Texts of an engine

anything = st.text(st.characters(), max_size=60) | st.text(st.sampled_from("\0\n\t\r\x1b\x7f\x9b\u202e\ud800a "))


@given(anything)
def test_what_is_storable_can_be_stored_and_shown(text: str):
    kept = storable(text)
    assert "\0" not in kept
    assert kept.encode().decode() == kept
    assert len(kept) <= MAX_MESSAGE_CHARS
    assert json.loads(msgspec.json.encode(kept)) == kept
    assert {unicodedata.category(char) for char in kept if char not in "\n\t"}.isdisjoint(
        {"Cc", "Cf", "Cs", "Zl", "Zp"}
    )


@given(anything)
def test_storing_twice_changes_nothing(text: str):
    assert storable(storable(text)) == storable(text)


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"])))
def test_readable_text_of_any_language_stays_as_it_is(text: str):
    assert storable(text) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\0b", "a\\x00b"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J", "\\x9b2J"),
        ("a\rb", "a\\rb"),
        ("evil\u202egpj.exe", "evil\\u202egpj.exe"),
        ("half \ud800 a pair", "half ? a pair"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("no\u00a0break \u3000", "no\u00a0break \u3000"),
        (b"not \xff UTF-8".decode(errors="surrogateescape"), "not ? UTF-8"),
    ],
)
def test_characters_that_could_deceive_are_shown_as_escapes(text: str, kept: str):
    assert storable(text) == kept


@pytest.mark.parametrize("char", ["x", "\0", "\u00e9", "\U0001f600"])
def test_a_text_is_bounded_in_characters_and_so_in_bytes(char: str):
    kept = storable(char * 100_000)
    assert len(kept) == MAX_MESSAGE_CHARS
    assert len(kept.encode()) <= 4 * MAX_MESSAGE_CHARS
