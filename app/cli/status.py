"""`sandledger status`: engines, queue, deadlines, stuck sandboxes and the log, read from the database."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from app.cli.reporting import Say
from app.server.assembly import open_database
from app.settings import Settings
from app.store.database.pool import Database
from app.views.overview import Overview, OverviewReader


async def show(settings: Settings, say: Say, *, as_json: bool) -> bool:
    """Print it. True when nothing is wrong."""
    async with open_database(settings, say, upgrade=False) as store:
        database = Database(store.dsn)
        try:
            overview = await OverviewReader(database).read()
        finally:
            await database.close()
    if as_json:
        answer = msgspec.to_builtins(overview) | {"problems": overview.problems}
        print(msgspec.json.encode(answer).decode())
    else:
        _draw(overview, Console())
    return not overview.problems


def _draw(overview: Overview, console: Console) -> None:
    engines = Table("engine", "kind", "state", "version", "sandboxes", "seen", "swept", title="Engines")
    for line in overview.engines:
        state = line.state if line.state == "up" else f"[red]{line.state}[/red]"
        engines.add_row(
            line.name, line.kind, state, line.version, str(line.sandboxes), _ago(line.seen_s), _ago(line.swept_s)
        )
    queue = Table("engine", "rows", "claimed", "due", "failing", "oldest due", title="Queue")
    for line in overview.queue:
        name = line.engine or "(not placed)"
        counts = (line.rows, line.claimed, line.due, line.failing)
        queue.add_row(name, *map(str, counts), f"{line.oldest_due_s:.1f} s")
    deadlines = Table("deadline", "rows", "overdue", "oldest", title="Deadlines")
    for line in overview.deadlines:
        deadlines.add_row(line.name, str(line.rows), str(line.overdue), f"{line.oldest_overdue_s:.1f} s")
    for table in (engines, queue, deadlines):
        console.print(table)
    phases = ", ".join(f"{phase} {count}" for phase, count in sorted(overview.phases.items())) or "none"
    log = overview.log
    console.print(f"sandboxes: {phases}")
    console.print(f"log: position {log.last_position}, {log.lag} not settled, {log.partitions_ahead} partitions ahead")
    for problem in overview.problems:
        console.print("[red]problem:[/red]", problem, markup=True, highlight=False)
    for line in overview.stuck:
        why = f"{line.reason or 'no reason yet'}: {line.message or ''}".rstrip(": ")
        console.print(
            f"  {line.id} {line.phase} for {line.since_s:.0f} s, {line.attempts} attempts; {why}",
            markup=False,
            highlight=False,
        )
    if not overview.problems:
        console.print("nothing is wrong")


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f} s ago"
