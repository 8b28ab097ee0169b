"""What an engine shows of a sandbox's object, and how people read it. Pure.

A line of a log is the engine's time, a space, and the text, in which everything that is not printed as itself is
escaped: a program must not move the cursor in the terminal of its reader. The text of an inspection has the form of the
public server's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from app.domain.sandbox.masking import MASK, Masker
from app.domain.text import printable, storable

KEPT_BYTES: Final = 64 * 1024
"""Of the log of an end that is kept."""
LIVE_BYTES: Final = 256 * 1024
"""Of the log of a sandbox that is still there, in one answer."""
SHOWN_CHARS: Final = 64 * 1024
"""Of labels and environment, about."""
NO_LOGS: Final = "(no logs)"
_DEFAULT_SINCE: Final = timedelta(minutes=10)
_LONGEST_SINCE_S: Final = 50 * 365 * 86400
_SINCE = re.compile(r"([0-9]{1,30})\s*([smhd])", re.IGNORECASE)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_EARLIEST: Final = datetime.fromisoformat("0001-01-01T00:00:00+00:00")
_MIB: Final = 1024 * 1024
_BILLION: Final = 1_000_000_000


class LogLine(Struct, frozen=True):
    """One line that a program wrote."""

    at: str
    """When, by the engine's clock, as RFC 3339; empty = the engine did not say."""
    text: str
    begins: bool = True
    """False: what stood before it in the line may be missing."""
    ends: bool = True
    """False: the line had not ended yet."""


class Logs(Struct, frozen=True):
    """The last lines of a log, oldest first."""

    lines: tuple[LogLine, ...] = ()
    more: bool = False
    """There were older ones."""

    def __repr__(self) -> str:
        """Keep what a program wrote out of tracebacks."""
        return f"Logs({len(self.lines)} lines)"


class LogText(Struct, frozen=True, omit_defaults=True):
    """A log as it is shown and kept, without sealed values."""

    text: str = ""
    more: bool = False


class Inspection(Struct, frozen=True, omit_defaults=True):
    """What an engine says of an object."""

    runtime_id: str
    name: str
    image: str
    status: str
    running: bool = False
    paused: bool = False
    oom: bool = False
    exit_code: int | None = None
    error: str = ""
    started_at: str = ""
    finished_at: str = ""
    cpu_nanos: int = 0
    memory_bytes: int = 0
    pids_limit: int = 0
    networks: dict[str, str] = {}
    ports: dict[str, tuple[str, ...]] = {}
    """Port -> where it is published."""
    labels: dict[str, str] = {}
    env: dict[str, str] = {}
    """In the clear, until `without_values` has been called."""
    private: tuple[str, ...] = ()
    """Names in `env` whose values are secrets that the request did not give: the agent's token, the operator's."""

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"Inspection({self.name!r}, {self.status!r})"

    def values_of(self, sealed: Collection[str]) -> list[str]:
        """Values that are secret. `sealed` = the names that the request gave."""
        return [value for name, value in self.env.items() if name in sealed or name in self.private]


def without_values(shown: Inspection, sealed: Collection[str], masker: Masker) -> Inspection:
    """The same without secrets, in environment and elsewhere, as the database takes it.

    An image may bring labels and variables of any size and with any character.
    """
    left = SHOWN_CHARS

    def each(texts: dict[str, str]) -> dict[str, str]:
        nonlocal left
        found: dict[str, str] = {}
        for name, text in texts.items():
            if left <= 0:
                break
            hides = name in sealed or name in shown.private
            kept = MASK if texts is shown.env and hides else storable(masker.mask(text))
            found[storable(name)] = kept
            left -= len(name) + len(kept)
        return found

    return replace(
        shown,
        image=storable(masker.mask(shown.image)),
        error=storable(masker.mask(shown.error)),
        labels=each(shown.labels),
        env=each(shown.env),
        private=(),
    )


def log_text(logs: Logs, masker: Masker, *, lines: int | None = None, most: int = LIVE_BYTES) -> LogText:
    """The last lines, within so many bytes. None = all of them."""
    shown = [_shown(line, masker) for line in logs.lines]
    kept = shown if lines is None else shown[-lines:]
    more = logs.more or len(kept) < len(shown)
    size, taken = 0, 0
    for line in reversed(kept):
        size += len(line.encode()) + 1
        if size > most:
            break
        taken += 1
    if taken == len(kept):
        return LogText("".join(f"{line}\n" for line in kept), more)
    if not taken:
        # One line is longer than all that may be shown: its end is what says most.
        return LogText(kept[-1].encode()[1 - most :].decode(errors="ignore") + "\n", more=True)
    return LogText("".join(f"{line}\n" for line in kept[-taken:]), more=True)


def _shown(line: LogLine, masker: Masker) -> str:
    text = printable(masker.mask(line.text, begins=line.begins, ends=line.ends))
    return f"{line.at} {text}" if line.at else text


def last_lines(kept: LogText, lines: int, since: datetime | None = None) -> LogText:
    """Of a log that was kept. `since` = only what was written from then on."""
    every = kept.text.splitlines(keepends=True)
    late = every if since is None else [line for line in every if _at(line) >= since]
    shown = late[-lines:]
    return LogText("".join(shown), kept.more or len(shown) < len(every))


def _at(line: str) -> datetime:
    """The time of a line; the earliest of all when it has none."""
    try:
        found = datetime.fromisoformat(line.partition(" ")[0])
    except ValueError:
        return _EARLIEST
    return found if found.tzinfo is not None else _EARLIEST


def age_of(since: str) -> timedelta:
    """`10m`, `1h`. What cannot be read means ten minutes, as on the public server."""
    found = _SINCE.fullmatch(since.strip())
    if found is None:
        return _DEFAULT_SINCE
    return timedelta(seconds=min(int(found[1]) * _UNITS[found[2].lower()], _LONGEST_SINCE_S))


def inspection_text(shown: Inspection) -> str:
    """For people."""
    return "\n".join(map(printable, _inspection(shown)))


def _inspection(shown: Inspection) -> Iterator[str]:
    yield f"Container ID:   {shown.runtime_id[:12]}"
    yield f"Name:           {shown.name}"
    yield f"Image:          {shown.image}"
    yield f"Status:         {shown.status}"
    yield f"Running:        {shown.running}"
    yield f"Paused:         {shown.paused}"
    yield f"OOMKilled:      {shown.oom}"
    yield f"Exit Code:      {'N/A' if shown.exit_code is None else shown.exit_code}"
    yield f"Started At:     {shown.started_at or 'N/A'}"
    yield f"Finished At:    {shown.finished_at or 'N/A'}"
    if shown.error:
        yield f"Error:          {shown.error}"
    yield from ("", "Resources:", *_resources(shown), "", "Network:")
    yield from (f"  {name}: {ip or 'N/A'}" for name, ip in shown.networks.items())
    yield from _section("Ports", _ports(shown.ports))
    yield from _section("Labels", [f"  {name}={value}" for name, value in sorted(shown.labels.items())])
    yield from _section("Environment", [f"  {name}={value}" for name, value in shown.env.items()])


def _resources(shown: Inspection) -> Iterator[str]:
    if shown.cpu_nanos:
        yield f"  CPU:          {shown.cpu_nanos / _BILLION:.2f} cores"
    if shown.memory_bytes:
        yield f"  Memory:       {shown.memory_bytes // _MIB} MiB"
    if shown.pids_limit:
        yield f"  PIDs Limit:   {shown.pids_limit}"


def _ports(ports: dict[str, tuple[str, ...]]) -> list[str]:
    found: list[str] = []
    for port, places in ports.items():
        found += [f"  {port} -> {place}" for place in places] or [f"  {port} (not bound)"]
    return found


def _section(title: str, lines: Sequence[str]) -> Iterable[str]:
    return ("", f"{title}:", *lines) if lines else ()
