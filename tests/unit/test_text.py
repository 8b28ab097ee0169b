"""Text of others cannot move a terminal's cursor, forge a line, or turn around."""

from __future__ import annotations

import logging
import sys

import pytest

from app.cli import logs
from app.domain.text import printable
from app.settings import LogSettings


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, é ü 漢字 😀", "plain text, é ü 漢字 😀"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("a\nERROR forged", "a\\nERROR forged"),
        ("a\r\tb\0c\x7f", "a\\r\\tb\\x00c\\x7f"),
        ("\x9b31m \x85 next", "\\x9b31m \\x85 next"),
        ("abc\u202egnp.exe \u2066x\u2069 \u2028 \u200f", "abc\\u202egnp.exe \\u2066x\\u2069 \\u2028 \\u200f"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str):
    assert printable(text) == shown


def test_a_log_record_is_one_line_whatever_an_engine_says(capsys: pytest.CaptureFixture[str]):
    root = logging.getLogger()
    before = root.handlers, root.level
    said = "pull failed: \x1b[2J\n2026-01-01T00:00:00.000Z ERROR forged: all is well"
    try:
        logs.configure(LogSettings())
        root.handlers[0].setStream(sys.stdout)  # pyright: ignore[reportAttributeAccessIssue]
        logging.getLogger("app.test").warning("sandbox %s: %s", "x", said)
        try:
            raise ValueError(said)
        except ValueError:
            logging.getLogger("app.test").exception("it failed")
    finally:
        root.handlers, root.level = before
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if "\x1b" in line]
    assert [line for line in lines if "forged" in line and "\\x1b[2J\\n2026" in line]
    assert "WARNING" in lines[0]
    assert "ERROR" in lines[1]
