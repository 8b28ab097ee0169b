"""What a payload may hold: the types in it, and random values of them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from hypothesis import strategies as st
from msgspec import Struct

instants = st.datetimes(
    datetime.fromisoformat("2000-01-01"), datetime.fromisoformat("9998-01-01"), timezones=st.just(UTC)
)
texts = st.text(max_size=20)
_SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    str: texts,
    bool: st.booleans(),
    int: st.integers(-(2**53), 2**53),
    datetime: instants,
    UUID: st.uuids(),
    type(None): st.none(),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*map(values, args))
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if origin is tuple:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if issubclass(kind, Struct):
        return st.builds(kind, **{name: values(type_) for name, type_ in get_type_hints(kind).items()})
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    return _SIMPLE[kind]


def kinds(kind: Any) -> set[Any]:
    """Every type that a value of this type can hold, in all depths; containers and unions only by what is in them."""
    return set(_walk(kind))


def _walk(kind: Any) -> Iterator[Any]:
    arguments = [one for one in get_args(kind) if one is not ...]
    if arguments:
        for argument in arguments:
            yield from _walk(argument)
        return
    yield kind
    if isinstance(kind, type) and issubclass(kind, Struct):
        for type_ in get_type_hints(kind).values():
            yield from _walk(type_)
