"""Database addresses that may be shown to people."""

from __future__ import annotations

import re

from app.settings.schema import MASK

_DSN = re.compile(r"(?P<scheme>[a-z][a-z0-9+]*)://(?P<authority>[^/?#]*)(?P<rest>[^@#]*)", re.IGNORECASE)
_PARAMETER = re.compile(r"(?i)(?<=[?&])([^=&]*(?:password|secret|token)[^=&]*)=[^&]*")


def redacted_dsn(dsn: str) -> str:
    """The address without its password. What cannot be told apart for certain is hidden whole.

    A password with a stray `/`, `?` or `#` would end up in the path for any URL parser; therefore an `@` or `#` behind
    the authority hides everything but the scheme.
    """
    match = _DSN.fullmatch(dsn)
    if match is None:
        scheme, separator, _ = dsn.partition("://")
        return f"{scheme}://{MASK}" if separator and scheme.replace("+", "").isalnum() else MASK
    user, at, hosts = match["authority"].rpartition("@")
    name, colon, _ = user.partition(":")
    shown = f"{name}:{MASK}" if colon else name
    rest = _PARAMETER.sub(lambda found: f"{found[1]}={MASK}", match["rest"])
    return f"{match['scheme']}://{shown}{at}{hosts}{rest}"
