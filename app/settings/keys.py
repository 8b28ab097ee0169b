"""Judges the keys of a file: served, known but not served, refused, unknown.

The struct types say what is served and `app.settings.unserved` what is not served yet; all else is unknown. A refused
key raises, the others become one warning line each, in the order of the file. No line ever repeats a value, except
that of `runtime.type` and `secure_runtime.type`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeGuard

from msgspec.inspect import StructType

from app.errors import SettingsError
from app.settings import unserved
from app.settings.schema import Settings
from app.settings.table import fields_of, marks

Toml = dict[str, Any]
"""A table as `tomllib` hands it out."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def is_table(value: object) -> TypeGuard[Toml]:
    """Whether a TOML value is a table; TOML keys are always text."""
    return isinstance(value, dict)


def lookup(raw: Toml, path: str) -> object:
    """The value at a full path, None where it or a table on the way is missing."""
    found: object = raw
    for name in path.split("."):
        if not is_table(found):
            return None
        found = found.get(name)
    return found


def judge(raw: Toml, origin: str) -> list[str]:
    """Warnings about the keys of a file. SettingsError when one of them must stop the start."""
    _refuse(raw, origin)
    return [f"{origin}: {finding}" for finding in _walk(raw, Settings, "")]


def _refuse(raw: Toml, origin: str) -> None:
    for stop in unserved.STOPS:
        value = lookup(raw, stop.key)
        if value is not None and value not in stop.harmless:
            shown = f" = {json.dumps(value)}" if isinstance(value, str) else ""
            raise SettingsError(f"{origin}: {stop.key}{shown} is refused: {stop.reason}")
    if lookup(raw, "runtime.type") == "kubernetes":
        raise SettingsError(f'{origin}: runtime.type = "kubernetes" is refused: {unserved.KUBERNETES}')
    for path, variable in _env_only().items():
        if lookup(raw, path) is not None:
            raise SettingsError(f"{origin}: {path} is refused: it is read from the environment only, use {variable}")


def _walk(raw: Toml, cls: type | None, prefix: str) -> Iterator[str]:
    """Findings below one table. `cls` is its struct, None when only keys that are not served live in it."""
    served = fields_of(cls) if cls is not None else {}
    for name, value in raw.items():
        path = prefix + (name if _BARE.fullmatch(name) else json.dumps(name))
        kind = served[name].type if name in served else None
        below = kind.cls if isinstance(kind, StructType) else None
        if path in unserved.KEYS:
            yield f"{path} has no effect in this version"
        elif is_table(value) and (below is not None or path in unserved.TABLES):
            yield from _walk(value, below, path + ".")
        elif name in served or any(path == stop.key for stop in unserved.STOPS):
            continue
        elif path in unserved.TABLES:
            yield f"{path} has no effect in this version"
        else:
            yield f"unknown key {path} is ignored{_suggest(path)}"


def _suggest(path: str) -> str:
    """The nearest known key: by its full path, else by its last word (a right key in the wrong table)."""
    known = sorted(_known())
    near = get_close_matches(path, known, n=1)
    if not near:
        by_word = {candidate.rpartition(".")[2]: candidate for candidate in known}
        near = [by_word[word] for word in get_close_matches(path.rpartition(".")[2], by_word, n=1)]
    return f"; did you mean {near[0]}?" if near else ""


@cache
def _known() -> frozenset[str]:
    """Every path a file may use, tables included."""
    served = frozenset(path for path in _paths(Settings, "") if path not in _env_only())
    return served | unserved.KEYS | unserved.TABLES | {stop.key for stop in unserved.STOPS}


@cache
def _env_only() -> dict[str, str]:
    """Fields that only the environment sets, with the variable."""
    return {path: str(mark["env_only"]) for path, mark in _paths(Settings, "").items() if "env_only" in mark}


def _paths(cls: type, prefix: str) -> dict[str, dict[str, object]]:
    """Full path and marks of every table and key below a struct."""
    found: dict[str, dict[str, object]] = {}
    for name, field in fields_of(cls).items():
        found[prefix + name] = marks(field.type)
        if isinstance(field.type, StructType):
            found |= _paths(field.type.cls, f"{prefix}{name}.")
    return found
