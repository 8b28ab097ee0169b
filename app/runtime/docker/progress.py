"""From the engine's progress lines of one pull to a sentence: `3 of 7 layers, 41.2 of 120.0 MB`.

The engine names each layer and says what happens to it; sizes come with the lines about its download, so the total
grows while layers are still waiting. At most one sentence a second is reported, the last one always, and never the same
twice. Lines that cannot be understood change nothing: progress is for people.
"""

from __future__ import annotations

import asyncio

from app.runtime.docker.answers import Amount, PullLine
from app.runtime.driver import Progress

REPORT_SECONDS = 1.0
MEGABYTE = 1_000_000
_DONE = ("Pull complete", "Already exists")
_STATES = (
    *_DONE,
    "Pulling fs layer",
    "Waiting",
    "Downloading",
    "Verifying Checksum",
    "Download complete",
    "Extracting",
)
"""Other lines name something else than a layer, e.g. the tag."""


class Layers:
    """What is known about the layers of one image."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._amounts: dict[str, Amount] = {}

    def note(self, line: PullLine) -> None:
        """Take one line in."""
        if not line.id or line.status is None or line.status not in _STATES:
            return
        self._states[line.id] = line.status
        if line.status == "Downloading" and line.amount is not None and line.amount.total > 0:
            self._amounts[line.id] = line.amount
        elif line.status in ("Download complete", "Extracting", *_DONE) and line.id in self._amounts:
            total = self._amounts[line.id].total
            self._amounts[line.id] = Amount(total, total)

    def __str__(self) -> str:
        """For people. Empty while no layer is known."""
        if not self._states:
            return ""
        done = sum(state in _DONE for state in self._states.values())
        text = f"{done} of {len(self._states)} layers"
        if self._amounts:
            current = sum(amount.current for amount in self._amounts.values()) / MEGABYTE
            total = sum(amount.total for amount in self._amounts.values()) / MEGABYTE
            text += f", {current:.1f} of {total:.1f} MB"
        return text


class Meter:
    """Reports what changed, and not too often."""

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._layers = Layers()
        self._reported: str = ""
        self._not_before = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def note(self, line: PullLine) -> None:
        """Take one line in; report now, or when the last report is a second old."""
        self._layers.note(line)
        if self._timer is not None:
            return
        wait = self._not_before - self._loop.time()
        if wait <= 0:
            self._say()
        else:
            # The engine may be silent from here on, so the timer and not the next line reports what is new.
            self._timer = self._loop.call_later(wait, self._say)

    def close(self) -> None:
        """Report nothing more."""
        if self._timer is not None:
            self._timer.cancel()

    def _say(self) -> None:
        self._timer = None
        text = str(self._layers)
        if text and text != self._reported:
            self._reported = text
            self._not_before = self._loop.time() + REPORT_SECONDS
            self._report(text)
