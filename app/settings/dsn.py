"""Database addresses that may be shown to people."""

from __future__ import annotations

import re

from app.settings.table import MASK

_DSN = re.compile(r"(?P<scheme>[a-z][a-z0-9+]*)://(?P<authority>[^/?#]*)(?P<rest>[^@#]*)", re.IGNORECASE)
_SHOWN = frozenset(
    (
        "host",
        "hostaddr",
        "port",
        "dbname",
        "database",
        "user",
        "application_name",
        "sslmode",
        "ssl",
        "sslnegotiation",
        "target_session_attrs",
        "connect_timeout",
        "channel_binding",
    )
)
"""Keys whose values are shown. An unknown key may be a piece of a password."""
_WORD = re.compile(r"\s*(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)(?=\s|\Z)")


def redacted_dsn(dsn: str) -> str:
    """The address without its password. When the password cannot be found for certain, the whole address is hidden.

    A password with a stray `/`, `?` or `#` would end up in the path for any URL parser; therefore an `@` or `#` behind
    the authority hides everything but the scheme.
    """
    match = _DSN.fullmatch(dsn.strip())
    if match is None:
        scheme, separator, _ = dsn.partition("://")
        if separator and scheme.replace("+", "").isalnum():
            return f"{scheme}://{MASK}"
        return MASK if separator else _words(dsn)
    user, at, hosts = match["authority"].rpartition("@")
    name, colon, _ = user.partition(":")
    shown = f"{name}:{MASK}" if colon else name
    path, question, query = match["rest"].partition("?")
    pairs = "&".join(_pair(*pair.partition("=")) for pair in query.split("&")) if question else ""
    return f"{match['scheme']}://{shown}{at}{hosts}{path}{question}{pairs}"


def _pair(key: str, equals: str, value: str) -> str:
    return f"{key}={value}" if equals and key in _SHOWN else f"{key}={MASK}" if equals else MASK


def _words(dsn: str) -> str:
    """Libpq's `key=value key='a value'`."""
    shown: list[str] = []
    at = 0
    while at < len(dsn.rstrip()):
        word = _WORD.match(dsn, at)
        if word is None:
            return MASK
        shown.append(f"{word[1]}={word[2] if word[1] in _SHOWN else MASK}")
        at = word.end()
    return " ".join(shown) or MASK
