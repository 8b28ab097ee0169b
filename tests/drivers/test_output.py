"""The window of a log, without an engine."""

from __future__ import annotations

from app.runtime.docker.output import Window

AT = b"2026-01-31T12:00:00.123456789Z "


def window(*entries: bytes | tuple[int, bytes], most: int = 1000) -> Window:
    made = Window(most)
    for entry in entries:
        stream, text = entry if isinstance(entry, tuple) else (1, entry)
        made.add(stream, AT + text)
    return made


def texts(made: Window) -> list[str]:
    return [line.text for line in made.logs(more=False).lines]


def test_pieces_of_a_line_are_one_line():
    """The naive way, an entry a line, would show a value in two pieces, with a time between them."""
    made = window(b"s3cr3t-", b"value\n", b"next\n")
    logs = made.logs(more=False)
    assert [(line.text, line.begins, line.ends) for line in logs.lines] == [
        ("s3cr3t-value", False, True),
        ("next", True, True),
    ]
    assert not logs.more


def test_streams_do_not_mix():
    assert texts(window((1, b"out"), (2, b"err\n"), (1, b"put\n"))) == ["err", "output"]


def test_what_has_not_ended():
    (line,) = window(b"prompt> ").logs(more=False).lines
    assert (line.text, line.ends) == ("prompt> ", False)


def test_only_the_end_is_kept():
    made = window(*(b"line %d\n" % n for n in range(10_000)), most=100)
    logs = made.logs(more=False)
    assert logs.lines[-1].text == "line 9999"
    assert 90 <= sum(len(line.text) + 1 for line in logs.lines) < 120
    assert logs.more


def test_of_a_line_without_end_only_the_end_is_kept():
    made = window(*([b"x" * 16384] * 100), b"end\n", most=1000)
    (line,) = made.logs(more=False).lines
    assert line.text.endswith("xend")
    assert len(line.text) <= 1000
    assert not line.begins


def test_bytes_that_are_no_text():
    assert texts(window(b"a\x00\xff\xfe\r\n", b"\xe2\x82", b"\xac\n")) == ["a\x00\ufffd\ufffd", "\u20ac"]


def test_an_entry_without_a_time():
    made = Window(100)
    made.add(1, b"x" * 60 + b" y\n")
    assert made.logs(more=False).lines[0].text == "x" * 60 + " y"
