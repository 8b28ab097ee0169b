"""`sandledger status`: engines, queue, deadlines, what is stuck, and the log, read from the database."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from app.cli import engines
from app.cli.reporting import Say, console, plain, print_json, table
from app.cli.session import database
from app.server.assembly import deadline_limits
from app.settings import Settings
from app.views.overview import Overview, OverviewReader, StuckLine


async def show(settings: Settings, say: Say, *, as_json: bool) -> bool:
    """Print the state of the installation, as tables or as one JSON object. True when the operator has nothing to mend.

    Raises:
        SettingsError, StoreUnavailable: the database cannot be read; the message says what to do.
    """
    limits = deadline_limits(settings)
    power_s = max(limits.pausing_s, limits.resuming_s)
    async with database(settings, say) as opened:
        overview = await OverviewReader(opened, stopping_s=limits.stopping_s, power_s=power_s).read()
    if as_json:
        print_json(msgspec.to_builtins(overview) | {"problems": overview.problems})
    else:
        _draw(overview, console())
    return not overview.problems


def _draw(overview: Overview, out: Console) -> None:
    for drawn in (engines.drawn(overview.engines), _queue(overview), _deadlines(overview)):
        out.print(drawn)
    phases = ", ".join(f"{phase} {count}" for phase, count in sorted(overview.phases.items())) or "none"
    log = overview.log
    out.print(plain(f"sandboxes: {phases}"))
    out.print(f"log: position {log.last_position}, {log.lag} not settled, {log.partitions_ahead} partitions ahead")
    for problem in overview.problems:
        out.print(plain("problem: ", "red").append(plain(problem, "default")))
    for line in overview.stuck:
        if not line.users:
            out.print(plain(f"  {_stuck(line)}"))
    if users := [line for line in overview.stuck if line.users]:
        out.print("failing for reasons that only their users can mend:")
        for line in users:
            out.print(plain(f"  {_stuck(line)}"))
    if not overview.problems:
        out.print("nothing is wrong")


def _queue(overview: Overview) -> Table:
    made = table("engine", "rows", "claimed", "due", "failing", "oldest due", title="Queue")
    for line in overview.queue:
        counts = (line.rows, line.claimed, line.due, line.failing)
        made.add_row(plain(line.engine or "(not placed)"), *map(str, counts), f"{line.oldest_due_s:.1f} s")
    return made


def _deadlines(overview: Overview) -> Table:
    made = table("deadline", "rows", "overdue", "oldest", title="Deadlines")
    for line in overview.deadlines:
        made.add_row(plain(line.name), str(line.rows), str(line.overdue), f"{line.oldest_overdue_s:.1f} s")
    return made


def _stuck(line: StuckLine) -> str:
    why = f"{line.reason or 'no reason yet'}: {line.message or ''}".rstrip(": ")
    kind = "" if line.kind == "sandbox" else f"{line.kind} "
    return f"{kind}{line.id} {line.phase} for {line.since_s:.0f} s, {line.attempts} attempts; {why}"
