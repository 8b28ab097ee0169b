"""What is shown of a log and of an inspection."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.domain.sandbox.diagnostics import (
    SHOWN_CHARS,
    Inspection,
    LogLine,
    Logs,
    LogText,
    age_of,
    inspection_text,
    last_lines,
    log_text,
    without_values,
)
from app.domain.sandbox.masking import MASK, Masker

NOBODY = Masker(())
AT = "2026-01-31T12:00:0{}.123456789Z"


def logs(*texts: str, more: bool = False) -> Logs:
    return Logs(tuple(LogLine(AT.format(n % 10), text) for n, text in enumerate(texts)), more)


def test_lines_with_their_times():
    shown = log_text(logs("one", "two"), NOBODY)
    assert shown == LogText(f"{AT.format(0)} one\n{AT.format(1)} two\n")


def test_control_characters_are_shown_as_escapes():
    shown = log_text(logs("a\x1b[31mred\0\u202e\u00e9\ufffd"), NOBODY).text
    assert shown == f"{AT.format(0)} a\\x1b[31mred\\x00\\u202e\u00e9\ufffd\n"


def test_the_last_lines_only():
    shown = log_text(logs("one", "two", "three"), NOBODY, lines=2)
    assert [line.split()[1] for line in shown.text.splitlines()] == ["two", "three"]
    assert shown.more
    assert log_text(logs("one", more=True), NOBODY).more


@pytest.mark.parametrize("most", [40, 100, 1000])
def test_never_more_bytes_than_asked_for(most: int):
    shown = log_text(logs(*("\u00e9" * 10 for _ in range(50))), NOBODY, most=most)
    assert len(shown.text.encode()) <= most
    assert shown.more


def test_of_one_long_line_its_end():
    shown = log_text(logs("x" * 500 + "end"), NOBODY, most=100)
    assert len(shown.text) == 100
    assert shown.text.endswith("xend\n")
    assert shown.more


def test_a_value_at_the_cut():
    """The naive way, to cut first, leaves the end of a value that nothing finds any more."""
    line = "x" * 500 + "s3cr3t-value" + "y" * 90
    naive = log_text(logs(line[-100:]), Masker(["s3cr3t-value"])).text
    assert "3t-value" in naive
    assert "3t-value" not in log_text(logs(line), Masker(["s3cr3t-value"]), most=100).text


def test_of_what_is_kept_the_last_lines():
    kept = log_text(logs("one", "two", "three"), NOBODY)
    assert last_lines(kept, 1) == LogText(f"{AT.format(2)} three\n", more=True)
    assert last_lines(kept, 5) == kept
    since = datetime(2026, 1, 31, 12, 0, 1, tzinfo=UTC)
    assert [line.split()[1] for line in last_lines(kept, 5, since).text.splitlines()] == ["two", "three"]
    assert last_lines(LogText("no time here\n2026-01-31 nor here\n"), 5, since).text == ""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("10m", 600), ("2 h", 7200), ("1D", 86400), ("soon", 600), ("", 600), ("-1s", 600), ("1.5h", 600)],
)
def test_ages(text: str, seconds: int):
    assert age_of(text) == timedelta(seconds=seconds)


def test_an_age_beyond_the_calendar():
    assert datetime.now(UTC) - age_of("999999999999d") > datetime.min.replace(tzinfo=UTC)


def test_an_inspection_without_values():
    shown = Inspection(
        "f" * 64,
        "sandbox-1",
        "busybox:1",
        "exited",
        exit_code=7,
        error="exec s3cr3t-value: no such file",
        networks={"bridge": "172.17.0.2"},
        ports={"8080/tcp": ("127.0.0.1:32768",), "22/tcp": ()},
        labels={"a": "b"},
        env={"PLAIN": "s3cr3t-value", "PORT": "1", "PATH": "/bin", "OURS": "t0ken-of-ours"},
        private=("OURS",),
    )
    sealed = {"PLAIN", "PORT"}
    assert shown.values_of(sealed) == ["s3cr3t-value", "1", "t0ken-of-ours"]
    hidden = without_values(shown, sealed, Masker(shown.values_of(sealed)))
    assert hidden.env == {"PLAIN": MASK, "PORT": MASK, "PATH": "/bin", "OURS": MASK}
    text = inspection_text(hidden)
    assert "s3cr3t" not in text + repr(shown)
    assert "t0ken" not in text + repr(shown)
    assert f"Error:          exec {MASK}: no such file" in text
    lines = text.splitlines()
    assert {"Exit Code:      7", "  PATH=/bin", "  8080/tcp -> 127.0.0.1:32768", "  22/tcp (not bound)"} <= set(lines)


def test_an_inspection_is_one_line_each():
    """What an image says must not forge another line."""
    text = inspection_text(Inspection("1", "n", "image\nStatus: fine", "exited"))
    assert "image\\nStatus: fine" in text


def test_an_inspection_is_what_the_database_takes():
    """An image may bring any label. jsonb takes no NUL, and an end that cannot be stored was in the way of its removal."""
    shown = Inspection(
        "1", "n", "i\0", "exited", error="e\0\ud800", labels={"a\0": "b\0c"}, env={"P\0": "q\0", "S": "secret\0"}
    )
    kept = without_values(shown, {"S"}, NOBODY)
    assert "\0" not in repr([kept.image, kept.error, kept.labels, kept.env]).replace("\\x00", "")
    assert (kept.labels, kept.env["S"]) == ({"a\\x00": "b\\x00c"}, MASK)


def test_an_inspection_has_an_end():
    many = {f"l{n}": "x" * 10_000 for n in range(1000)}
    kept = without_values(Inspection("1", "n", "i", "exited", labels=many, env=dict(many)), (), NOBODY)
    size = sum(len(name) + len(text) for texts in (kept.labels, kept.env) for name, text in texts.items())
    assert 0 < size <= 2 * SHOWN_CHARS
