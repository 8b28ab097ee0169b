"""Sealed values in text that a sandbox wrote: found by what they are, and replaced by `***`.

A rule by name (`*_TOKEN`, `*_KEY`) hides what is no secret and shows what is one. Here the values themselves are known,
so they are hidden wherever a program printed them. A value of eight characters or more is found anywhere, also in
hexadecimal, in base64 at any place of a longer text, percent-encoded, and escaped as in JSON or in Python. A value of
several lines is also found line by line, because an engine keeps lines apart. A value of four to seven characters is
hidden only where it stands by itself: `port` must not be cut out of `transport`.

A value of fewer than four characters is not hidden. `1` would blot out every log, and could be guessed anyway. Neither
is a value that a program changed on its way: reversed, compressed, or printed letter by letter.

A request may bring a megabyte of values, made so that looking for them takes long. So of more than 256 values, and of
values longer than 16 KiB, only the plain form is looked for; and where very many values begin alike, all that follows
such a beginning in its line is hidden. The same holds when all looking together has taken too long.

Text that begins in the middle of a line may begin in the middle of a value, so its first characters are compared with
the ends of values; the same holds for a line that has not ended yet.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote, quote_plus

MASK: Final = "***"
SHORTEST: Final = 4
"""Characters of a value that is hidden."""
ANYWHERE: Final = 8
"""Characters of a value that is hidden also within a word."""
MANY: Final = 256
"""Values of which no other form than the plain one is looked for, if there are more of them."""
LONG: Final = 16 * 1024
"""The same, in characters of one value."""
MANY_LENGTHS: Final = 64
MOST_WORK: Final = 128 * 1024 * 1024
"""Characters that one `Masker` compares in all; some tenths of a second."""
_BASE64_BYTES = 3
_BASE64_CHARS = 4


class Masker:
    """Hides these values. Never prints them."""

    def __init__(self, values: Iterable[str]) -> None:
        """`values` in the clear."""
        given = {part for value in values for part in (value, *_lines(value)) if len(part) >= SHORTEST}
        few = len(given) <= MANY
        self._forms = {form for value in given for form in (_forms(value) if few else (value,))}
        lengths: dict[str, set[int]] = {}
        for form in self._forms:
            lengths.setdefault(form[:SHORTEST], set()).add(len(form))
        self._lengths = {head: sorted(found, reverse=True) for head, found in lengths.items()}
        self._work_left = MOST_WORK
        self.longest = max(map(len, self._forms), default=0)
        """Characters of the longest form."""

    def mask(self, text: str, *, begins: bool = True, ends: bool = True) -> str:
        """The text without the values. `begins` and `ends` say whether it begins and ends where its line does."""
        if not self._forms:
            return text
        spans = list(self._found(text))
        if not begins and (cut := self._tail_at_begin(text)):
            spans.insert(0, (0, cut))
        if not ends and (cut := self._head_at_end(text)):
            spans.append((len(text) - cut, len(text)))
        return _without(text, spans)

    def _found(self, text: str) -> Iterator[tuple[int, int]]:
        """Every place of every value, also where two of them overlap."""
        lengths, forms = self._lengths, self._forms
        for begin in range(len(text) - SHORTEST + 1):
            found = lengths.get(text[begin : begin + SHORTEST], ())
            if len(found) > MANY_LENGTHS or (found and self._work_left <= 0):
                yield begin, len(text)
                return
            self._work_left -= sum(found)
            for length in found:
                end = begin + length
                if text[begin:end] in forms and (length >= ANYWHERE or _stands_alone(text, begin, end)):
                    yield begin, end
                    break

    def _tail_at_begin(self, text: str) -> int:
        """How many first characters may be the end of a value."""
        head, longest = text[:SHORTEST], 0
        for form in self._forms if len(head) == SHORTEST else ():
            for at in _places(form, head):
                self._work_left -= len(form)
                if self._work_left <= 0:
                    return len(text)
                rest = form[at:]
                if text.startswith(rest) or rest.startswith(text):
                    longest = max(longest, min(len(rest), len(text)))
        return longest

    def _head_at_end(self, text: str) -> int:
        """How many last characters may be the beginning of a value."""
        tail, longest = text[-SHORTEST:], 0
        for form in self._forms if len(tail) == SHORTEST else ():
            for at in _places(form, tail):
                self._work_left -= len(form)
                if self._work_left <= 0:
                    return len(text)
                begun = form[: at + SHORTEST]
                if text.endswith(begun) or begun.endswith(text):
                    longest = max(longest, min(len(begun), len(text)))
        return longest

    def __repr__(self) -> str:
        """Keep the values out of tracebacks."""
        return f"Masker({len(self._forms)} forms)"


def _places(form: str, part: str) -> Iterator[int]:
    at = form.find(part)
    while at >= 0:
        yield at
        at = form.find(part, at + 1)


def _stands_alone(text: str, begin: int, end: int) -> bool:
    return not (text[begin - 1 : begin].isalnum() or text[end : end + 1].isalnum())


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    kept: list[str] = []
    shown_to = 0
    for begin, end in sorted(spans):
        if begin >= shown_to:
            kept += [text[shown_to:begin], MASK]
        shown_to = max(shown_to, end)
    kept.append(text[shown_to:])
    return "".join(kept)


def _lines(value: str) -> list[str]:
    lines = value.splitlines()
    return lines if len(lines) > 1 else []


def _forms(value: str) -> Iterator[str]:
    """The ways in which a program may have written it."""
    yield value
    if not ANYWHERE <= len(value) <= LONG:
        return
    raw = value.encode(errors="replace")
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(value)[1:-1]
    yield quote(value, safe="", errors="replace")
    yield quote_plus(value, errors="replace")
    yield raw.hex()
    yield raw.hex().upper()
    for before in range(_BASE64_BYTES):
        yield from _base64(raw, before)


def _base64(raw: bytes, before: int) -> Iterator[str]:
    """What base64 makes of it behind so many other bytes: only the characters that depend on nothing else."""
    text = base64.b64encode(bytes(before) + raw).decode()
    begin = -(-before * 8 // 6)
    end = (before + len(raw)) // _BASE64_BYTES * _BASE64_CHARS
    if end - begin >= ANYWHERE:
        yield text[begin:end]
        yield text[begin:end].translate(str.maketrans("+/", "-_"))
