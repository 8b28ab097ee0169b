"""Text of others, for people and their terminals.

An engine repeats what an image or a registry says. Written as it is, that could move a reader's cursor, forge a line of
a log, or show the text in another order than it has. So control characters, and characters without a width such as
those that change the direction of writing, are shown as escapes. Every kind of space stays.
"""

from __future__ import annotations

from typing import Final
from unicodedata import category

MAX_MESSAGE_CHARS: Final = 4096
"""Longest text for people in a payload, in characters. As UTF-8 it may be four times as many bytes."""


def printable(text: str) -> str:
    """The text in one line, with everything escaped that is not shown as itself."""
    return text if text.isprintable() else "".join([_shown(char) for char in text])


def storable(message: str) -> str:
    """A text of an engine, as the log takes it. Doing it twice changes nothing.

    As `printable`, but line feeds and tabs stay, and the length is bounded. A lone surrogate, e.g. of a byte that was
    not UTF-8, becomes `?`, because PostgreSQL stores none, and no NUL either.
    """
    kept = message[:MAX_MESSAGE_CHARS].encode(errors="replace").decode()
    if kept.isprintable():
        return kept
    return "".join([char if char in "\n\t" else _shown(char) for char in kept])[:MAX_MESSAGE_CHARS]


def _shown(char: str) -> str:
    if char.isprintable() or category(char) == "Zs":
        return char
    return char.encode("unicode_escape").decode()
