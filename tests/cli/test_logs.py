"""Process logs: what repeats is held back, and counted."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from app.api.errors import problem_of
from app.cli.logs import MAX_KINDS, REPEAT_SECONDS, Repeats, _OneLine
from tests.conftest import ROOT


class Shown:
    """A handler as the server has it, on a clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.repeats = Repeats(lambda: self.now)
        self._text = io.StringIO()
        self.handler = logging.StreamHandler(self._text)
        self.handler.setFormatter(_OneLine("%(levelname)s %(name)s: %(message)s"))
        self.handler.addFilter(self.repeats)

    def logger(self, name: str) -> logging.Logger:
        made = logging.Logger(name)  # noqa: LOG001 - of this test alone
        made.addHandler(self.handler)
        return made

    def lines(self) -> list[str]:
        """Since the last time."""
        found = self._text.getvalue().splitlines()
        self._text.seek(0)
        self._text.truncate()
        return found


@pytest.fixture
def shown() -> Shown:
    return Shown()


def test_a_warning_that_repeats_is_held_back_and_counted(shown: Shown):
    log = shown.logger("worker")
    for number in range(100):
        log.warning("away: %s", number)
    assert shown.lines() == ["WARNING worker: away: 0"]
    shown.now += REPEAT_SECONDS
    log.warning("away: %s", 100)
    log.warning("away: %s", 101)
    assert shown.lines() == ["WARNING worker: away: 100 (99 like it were held back)"]
    shown.now += 10 * REPEAT_SECONDS
    log.warning("away: %s", 102)
    shown.now += REPEAT_SECONDS
    log.warning("away: %s", 103)
    assert shown.lines() == ["WARNING worker: away: 102 (1 like it were held back)", "WARNING worker: away: 103"]


def test_another_logger_level_or_template_is_another_kind(shown: Shown):
    first, second = shown.logger("first"), shown.logger("second")
    for _ in range(2):
        first.warning("away: %s", 1)
        first.error("away: %s", 1)
        first.warning("back: %s", 1)
        second.warning("away: %s", 1)
    assert len(shown.lines()) == 4


def test_below_a_warning_nothing_is_held_back(shown: Shown):
    log = shown.logger("access")
    for _ in range(3):
        log.info("GET /")
    assert len(shown.lines()) == 3


def test_exceptions_count_by_their_type(shown: Shown):
    log = shown.logger("worker")
    for error in (ValueError(), KeyError(), ValueError()):
        log.error("failed", exc_info=error)
    assert [line for line in shown.lines() if line.startswith("ERROR")] == ["ERROR worker: failed"] * 2


def test_memory_is_bounded(shown: Shown):
    log = shown.logger("worker")
    for number in range(MAX_KINDS + 1):
        log.warning(f"away: {number}")  # noqa: G004 - a template of its own each time
    shown.lines()
    log.warning("away: 0")
    log.warning(f"away: {MAX_KINDS}")  # noqa: G004
    assert shown.lines() == ["WARNING worker: away: 0"], "the oldest is forgotten, the newest is known"
    assert len(shown.repeats._shown) == MAX_KINDS


def test_every_request_whose_answer_names_the_log_is_in_it(shown: Shown):
    log = logging.getLogger("app.api.errors")
    log.addHandler(shown.handler)
    try:
        told = [problem_of(RuntimeError(), name).message for name in ("r1", "r2")]
    finally:
        log.removeHandler(shown.handler)
    said = "\n".join(shown.lines())
    for name, message in zip(("r1", "r2"), told, strict=True):
        assert f"the log has it under request {name}" in message
        assert f"request {name} failed" in said


def test_a_server_has_the_filter():
    program = (
        "import logging; from app.cli import logs; from app.settings import LogSettings; logs.configure(LogSettings());"
        "[logging.getLogger(name).warning('away %s', i) for name in 'ab' for i in range(3)]"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert [line.split("Z ")[1] for line in done.stdout.splitlines()] == ["WARNING a: away 0", "WARNING b: away 0"]
