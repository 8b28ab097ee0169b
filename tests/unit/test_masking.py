"""Sealed values in what a program wrote: every way of writing them, and what is not one."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.sandbox.masking import MANY, MANY_LENGTHS, MASK, MOST_WORK, SHORTEST, Masker

SECRET = "s3cr3t/with+more=?"
KEY = "-----BEGIN KEY-----\nMIIabcdefgh0123\nxyzXYZ98765432\n-----END KEY-----\n"


def test_a_rule_by_name_would_not_do():
    """Why values are looked for: the name of a variable is not in what a program writes."""
    written = f"connecting to db:{SECRET}@host"
    by_name = written if not any(word in written.upper() for word in ("TOKEN", "KEY", "PASSWORD")) else MASK
    assert SECRET in by_name
    assert Masker([SECRET]).mask(written) == f"connecting to db:{MASK}@host"


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        json.dumps({"a": SECRET}),
        repr({"a": SECRET}),
        quote(SECRET, safe=""),
        quote_plus(SECRET),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
        f"TOKEN={SECRET};",
        f"x{SECRET}{SECRET}y",
    ],
)
def test_the_ways_of_writing_a_value(written: str):
    shown = Masker([SECRET]).mask(written)
    assert MASK in shown
    for form in (SECRET, quote(SECRET, safe=""), SECRET.encode().hex(), SECRET.encode().hex().upper()):
        assert form not in shown


@pytest.mark.parametrize("before", [b"", b"u:", b"ab:", b"user:"])
@pytest.mark.parametrize("after", [b"", b"1", b"12"])
def test_base64_at_any_place(before: bytes, after: bytes):
    """As in `Authorization: Basic`. Of the value no more than its first and last characters can be had."""
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        shown = Masker([SECRET]).mask(encode(before + SECRET.encode() + after).decode())
        left, _, right = shown.partition(MASK)
        assert _ == MASK
        assert len(left) <= len(before) * 4 / 3 + 2
        assert len(right) <= 8


def test_a_value_of_several_lines():
    masker = Masker([KEY])
    assert masker.mask(KEY) == MASK
    for line in KEY.splitlines():
        assert masker.mask(line) == MASK
    assert masker.mask(json.dumps(KEY)) == f'"{MASK}"'


def test_short_values_stand_alone():
    masker = Masker(["port", "8080", "ab", "1", ""])
    assert masker.mask("transport 18080 port:8080 ab 1") == f"transport 18080 {MASK}:{MASK} ab 1"


def test_values_that_overlap():
    masker = Masker(["abcdefgh", "efghijkl"])
    assert masker.mask("-abcdefghijkl-") == f"-{MASK}-"
    assert masker.mask("-abcdefgh-efghijkl-") == f"-{MASK}-{MASK}-"


def test_text_that_is_cut():
    masker = Masker([SECRET])
    assert masker.mask("with+more=? is the end", begins=False) == f"{MASK} is the end"
    assert masker.mask("with+more=? is the end") == "with+more=? is the end"
    assert masker.mask("it begins s3cr3t/wi", ends=False) == f"it begins {MASK}"
    assert masker.mask("cr3t/with", begins=False) == MASK, "nothing but the inside of it"
    assert masker.mask("cr3t/with", ends=False) == MASK


def test_it_is_in_no_repr():
    assert SECRET not in repr(Masker([SECRET]))


@given(st.text(), st.lists(st.text(min_size=1, max_size=30), max_size=4), st.integers(0, 60))
def test_no_value_is_left(text: str, values: list[str], at: int):
    masker = Masker(values)
    shown = masker.mask(text[:at] + "".join(values) + text[at:])
    for value in values:
        if len(value) >= 8 and value not in MASK * 2:
            assert value not in shown.replace(MASK, "\0")


@given(st.text(alphabet="abcd", min_size=8, max_size=12), st.integers(1, 12), st.text(alphabet="xyz", max_size=5))
def test_no_rest_of_a_cut_value_is_left(value: str, at: int, after: str):
    rest = value[at:]
    if len(rest) >= 4:
        assert rest not in Masker([value]).mask(rest + after, begins=False)


def test_a_megabyte_of_values():
    """Made to be slow: all begin alike, none is there, and their beginning is everywhere. The naive way, to look for
    each at each place, compares 64,000 places with 1,400 values. Here the first place ends the line.
    """
    values = [f"aaaa{'b' * n}{n}" for n in range(1400)]
    assert len(values) > MANY
    assert Masker(values).mask("before" + "aaaa" * 16_000) == f"before{MASK}"


def test_of_very_many_values_the_plain_form_is_found():
    values = [f"value-{n:05}" for n in range(50_000)]
    masker = Masker(values)
    assert masker.mask("x value-04711 y") == f"x {MASK} y"


def test_of_a_very_long_value_the_plain_form_is_found():
    value = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    assert Masker([value]).mask(f"<{value}>") == f"<{MASK}>"


def test_values_that_were_made_to_take_long_hide_the_rest_of_a_line():
    """63 values that begin alike: each place of the text would compare a million characters."""
    text = "a" * 131_072
    masker = Masker(["a" * SHORTEST + "b" * (14_000 + n) for n in range(MANY_LENGTHS - 1)])
    naive = len(text) * 14_000 * (MANY_LENGTHS - 1)
    assert naive > 100 * MOST_WORK
    shown = masker.mask(text)
    assert shown.endswith(MASK)
    assert len(shown) < len(text)
    assert masker.mask("aaaa again") == MASK, "nothing is left for other lines"
    assert masker.mask("other text") == "other text"
