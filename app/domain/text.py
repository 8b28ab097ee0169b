"""Text of others, for people and their terminals."""

from __future__ import annotations

from typing import Final

_CONTROLS: Final = {
    *range(0x20),  # C0
    *range(0x7F, 0xA0),  # DEL and C1, which terminals obey too
    0x061C,
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),  # line and paragraph separators, and what turns the direction of the text around
    *range(0x2066, 0x206A),
}
_ESCAPES: Final = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS} | {  # noqa: PLR2004
    0x09: "\\t",
    0x0A: "\\n",
    0x0D: "\\r",
}


def printable(text: str) -> str:
    """The text with its control characters escaped.

    An engine repeats what an image or a registry says. Written as it is, that could move a reader's cursor, forge a
    line of the log, or show the text in another order than it has.
    """
    return text if text.isascii() and text.isprintable() else text.translate(_ESCAPES)
