"""What every table of settings is: a struct that walks well and hides its secrets."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from msgspec import Struct
from msgspec.inspect import Field, Metadata, StructType, Type, UnionType, type_info

MASK = "***"


def marks(kind: Type) -> dict[str, object]:
    """The `Meta(extra=...)` of a field's type, looking through `| None`."""
    if isinstance(kind, UnionType):
        return {name: mark for member in kind.types for name, mark in marks(member).items()}
    if not isinstance(kind, Metadata):
        return {}
    return cast("dict[str, object]", kind.extra or {})


@cache
def fields_of(cls: type) -> dict[str, Field]:
    """The fields of a table struct by key."""
    info = type_info(cls)
    assert isinstance(info, StructType)
    return {field.encode_name: field for field in info.fields}


@cache
def _secrets(cls: type) -> frozenset[str]:
    return frozenset(name for name, field in fields_of(cls).items() if "secret" in marks(field.type))


class Table(Struct, frozen=True):
    """One TOML table. Its repr shows that a secret is set, never which."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Rich has its own repr of structs, in tracebacks too: it must hide secrets too."""
        hidden = _secrets(type(self))
        values: list[tuple[str, Any]] = [(name, getattr(self, name)) for name in self.__struct_fields__]
        return [(name, MASK if name in hidden and value else value) for name, value in values]

    def __repr__(self) -> str:
        """Mask secrets, at every depth: nested tables are printed by this same method."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"
