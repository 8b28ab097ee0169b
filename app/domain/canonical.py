"""One text for one event, so that a digest of stored bytes means something on every machine and in every version.

msgspec leaves out a field only when its value is the very object of the default. That depends on where the value came
from: a decoded `"api"` is written, the literal `"api"` is not. It also writes no fraction for a whole second, and keeps
an offset that is not UTC. So values are put in order first:

* a value that equals its default becomes the default, and is left out;
* an instant becomes RFC 3339 in UTC with six digits;
* an integer beyond 2^53 is refused, because readers that know only IEEE 754 numbers would change it.

It costs a few comparisons per event; what to compare is worked out once per type.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple, TypeVar, get_args

from msgspec import NODEFAULT, Struct
from msgspec.structs import fields, replace

S = TypeVar("S")
MAX_INTEGER = 2**53


class _Shape(NamedTuple):
    """The fields of a type that need care."""

    defaults: tuple[tuple[str, Any], ...]
    integers: tuple[str, ...]
    instants: tuple[str, ...]
    structs: tuple[str, ...]
    tuples: tuple[str, ...]
    """Tuples of structs."""


def canonical(value: S) -> S:
    """What to encode instead of the struct. Its instants may be texts already: only an encoder may use it.

    Raises:
        ValueError: an integer beyond 2^53, or an instant without a time zone.
    """
    shape = _shape_of(type(value))
    for name in shape.integers:
        number = getattr(value, name)
        if number is not None and not -MAX_INTEGER <= number <= MAX_INTEGER:
            msg = f"{type(value).__name__}.{name} is beyond 2^53"
            raise ValueError(msg)
    changed: dict[str, Any] = {
        name: _instant(at) for name in shape.instants if (at := getattr(value, name)) is not None
    }
    for name in shape.structs:
        part = getattr(value, name)
        if part is not None and (tidied := canonical(part)) is not part:
            changed[name] = tidied
    for name in shape.tuples:
        parts: tuple[Struct, ...] | None = getattr(value, name)
        if parts:
            changed[name] = tuple(map(canonical, parts))
    changed |= {name: default for name, default in shape.defaults if getattr(value, name) == default}
    return replace(value, **changed) if changed else value  # type: ignore[type-var]


def _instant(at: datetime) -> str:
    if at.tzinfo is None:
        raise ValueError("an instant has no time zone")
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


@cache
def _shape_of(cls: type) -> _Shape:
    found = fields(cls)
    kinds = {field.name: set(_kinds(field.type)) for field in found}
    structs = {name for name, types in kinds.items() if any(issubclass(one, Struct) for one in types)}
    return _Shape(
        tuple((field.name, field.default) for field in found if field.default is not NODEFAULT),
        tuple(name for name, types in kinds.items() if int in types),
        tuple(name for name, types in kinds.items() if datetime in types),
        tuple(sorted(name for name in structs if tuple not in kinds[name])),
        tuple(sorted(name for name in structs if tuple in kinds[name])),
    )


def _kinds(kind: Any) -> Iterator[type]:
    """The classes that a field's type is made of: of `tuple[Part, ...] | None` they are tuple, Part, None."""
    origin = getattr(kind, "__origin__", kind)
    if isinstance(origin, type):
        yield origin
    for argument in get_args(kind):
        yield from _kinds(argument)
