"""When an engine was away, and whether an exit fell into that time.

An engine that is stopped without live-restore ends all its containers, and shows them afterwards as if each had ended
by itself: exit code 137 or 143, or 255 when the engine could not learn the code. An exit with such a code, at a time
between the last sign of life and the return, give or take five seconds, is explained by `ENGINE_STOPPED`. A container
that started after the return is not: what ended it came later.

**What is known.** Outages that this worker noticed are in memory. Those of at least fifteen seconds are in the log
(`engine.dark`, `engine.back`), so a worker that was restarted meanwhile reads them from there. When the engine was away
at the restart itself, `engines.last_seen_at` gives the last sign of life. Only a short outage that ended before this
worker started leaves no trace; exits of that time keep the engine's own words.

The times of an outage are the database's, the time of an exit is the engine's; five seconds of difference are allowed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import datetime, timedelta

import msgspec

from app.domain.engine import events as ev
from app.domain.sandbox.observed import Exit, Observed

ENGINE_STOPPED = "ENGINE_STOPPED"
_CODES = (137, 143, 255)
_MARGIN = timedelta(seconds=5)
_MAX_OUTAGES = 100


class Outages:
    """The outages of one engine."""

    def __init__(self) -> None:
        """None known."""
        self._ended: deque[tuple[datetime, datetime]] = deque(maxlen=_MAX_OUTAGES)
        self.since: datetime | None = None
        """The last sign of life before the outage that is not over."""

    def begin(self, last_seen: datetime | None) -> None:
        """It does not answer. Calls after the first change nothing."""
        self.since = self.since or last_seen

    def end(self, now: datetime) -> None:
        """The engine answers again at this time, so the outage under way has ended."""
        if self.since is not None:
            self._ended.append((self.since, now))
        self.since = None

    def add(self, since: datetime, until: datetime) -> None:
        """It was away between these times, or may have been."""
        self._ended.append((since, until))

    def read(self, history: Iterable[ev.Recorded]) -> None:
        """Learn from the engine's events."""
        since: datetime | None = None
        for recorded in history:
            match recorded.event:
                case ev.Dark(since=dark):
                    since = dark
                case ev.Back():
                    if since is not None:
                        self.add(since, recorded.at)
                    since = None
                case _:
                    pass

    def covers(self, at: datetime, started_at: datetime | None) -> bool:
        """Whether what started and ended at these times can have been ended by an outage."""
        if self.since is not None and at >= self.since - _MARGIN:
            return True
        return any(
            since - _MARGIN <= at <= until + _MARGIN
            # Nothing starts while the engine is away. The engine's clock may be ahead, so a start shortly after the
            # beginning of the outage may have been before it.
            and (started_at is None or started_at <= max(until, since + _MARGIN))
            for since, until in self._ended
        )

    def annotate(self, observed: Observed) -> Observed:
        """The observation; when an outage explains the exit, the exit says so."""
        found = observed.exit
        if found is None or not self._explains(found, observed.started_at):
            return observed
        message = f"The engine was away when it ended (exit code {found.code})."
        if found.message:
            message = f"{message} {found.message}"
        return msgspec.structs.replace(
            observed, exit=msgspec.structs.replace(found, reason=ENGINE_STOPPED, message=message)
        )

    def _explains(self, found: Exit, started_at: datetime | None) -> bool:
        known = found.oom or found.reason is not None
        return not known and found.code in _CODES and found.at is not None and self.covers(found.at, started_at)
