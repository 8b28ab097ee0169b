"""Points in time as clients write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec

from app.api.errors import INVALID_PARAMETER, wrong
from app.errors import Invalid

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_EPOCH_SECONDS = 2e10
"""Epoch numbers beyond this are milliseconds, as the public server's parser takes them."""


def in_utc(instant: datetime) -> datetime:
    """In UTC; without an offset it is UTC already. OverflowError at the ends of time."""
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


def of_epoch_or_text(value: datetime | float) -> datetime:
    """`expiresAt`: RFC 3339, or seconds or milliseconds since 1970.

    Raises:
        Invalid: no such instant on any calendar of ours.
    """
    try:
        if isinstance(value, datetime):
            return in_utc(value)
        return _EPOCH + timedelta(seconds=value if abs(value) <= _MAX_EPOCH_SECONDS else value / 1000)
    except (OverflowError, ValueError):
        raise Invalid(INVALID_PARAMETER, "expiresAt must lie between the years 1 and 9999.") from None


def parse_instant(name: str, text: str) -> datetime:
    """A query parameter.

    Raises:
        Problem: 422.
    """
    try:
        return in_utc(msgspec.convert(text, datetime))
    except (msgspec.ValidationError, OverflowError):
        raise wrong(
            "query", name, rule="must be an RFC 3339 instant such as 2026-01-31T12:00:00Z, a + in it encoded as %2B"
        ) from None
