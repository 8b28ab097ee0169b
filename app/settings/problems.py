"""Turns a rejected value into a message that names where it stands, the key, the value and what is allowed.

msgspec says where (`$.server.port`) and stops at the first; what is allowed is read from the field's type. Values of
fields marked secret, and whatever stands in place of a table that holds such fields, are shown as `***`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import msgspec
from msgspec import inspect

from app.errors import SettingsError
from app.settings.keys import Toml, is_table, lookup
from app.settings.schema import Settings
from app.settings.table import MASK, fields_of, marks

_MAX_SHOWN_CHARS = 80
_PLACE = re.compile(r" - at `\$\.?([^`\[]*)([^`]*)`$")


def explain(error: msgspec.ValidationError, raw: Toml, file: str, origins: Mapping[str, str]) -> SettingsError:
    """The error to raise. `origins` names the environment variable of each key that one has set."""
    text = str(error)
    place = _PLACE.search(text)
    path, index = (place[1], place[2]) if place else ("", "")
    kind = _type_at(path)
    value = lookup(raw, path) if path else raw
    where = f"environment variable {origins[path]}" if path in origins else file
    if isinstance(kind, inspect.StructType) and is_table(value):
        # A rule between the keys of one table, raised by its __post_init__.
        return SettingsError(f"{where}: {path}: {_PLACE.sub('', text)}")
    if index and is_table(value):
        # msgspec keeps back which entry of a free table it was.
        path += "." + next(name for name, entry in value.items() if not isinstance(entry, str))
    return SettingsError(f"{where}: {path} = {_shown(value, kind)} is not allowed, expected {_allowed(kind)}")


def _type_at(path: str) -> inspect.Type:
    kind = inspect.type_info(Settings)
    for name in filter(None, path.split(".")):
        assert isinstance(kind, inspect.StructType)
        kind = fields_of(kind.cls)[name].type
    return kind


def _holds_secret(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.StructType):
        return any(_holds_secret(field.type) for field in fields_of(kind.cls).values())
    return "secret" in marks(kind)


def _shown(value: object, kind: inspect.Type) -> str:
    if _holds_secret(kind):
        return MASK
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."


def _allowed(kind: inspect.Type) -> str:
    """What a field takes, in words."""
    match kind:
        case inspect.Metadata(extra_json_schema={"description": str(words)}):
            return words
        case inspect.Metadata():
            return _allowed(kind.type)
        case inspect.UnionType():
            return " or ".join(_allowed(one) for one in kind.types if not isinstance(one, inspect.NoneType))
        case inspect.LiteralType():
            return "one of " * (len(kind.values) > 1) + ", ".join(str(one) for one in kind.values)
        case inspect.EnumType():
            return "one of " + ", ".join(str(one.value) for one in kind.cls)
        case inspect.IntType() | inspect.FloatType():
            return _range(kind)
        case inspect.BoolType():
            return "true or false"
        case inspect.VarTupleType():
            return f"a list, each item {_allowed(kind.item_type)}"
        case inspect.StructType():
            return "a table"
        case inspect.CustomType():
            return "a path"
        case inspect.StrType():
            return "text" if not kind.min_length else "text that is not empty"
        case _:
            return "another type"


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
    low = f" from {kind.ge:g}" if kind.ge is not None else f" above {kind.gt:g}" if kind.gt is not None else ""
    high = f" up to {kind.le}" if kind.le is not None else ""
    return noun + low + high
