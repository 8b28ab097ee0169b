"""`sandledger engines`: which engines the log knows, and the way out when the log went back."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from app.cli.reporting import Say, console, plain, print_json, table
from app.cli.session import database, operator
from app.service.engines import Engines
from app.settings import Settings
from app.store.database.installation import read_installation
from app.store.log.signal import Signal
from app.views.engines import EnginesView
from app.views.overview import EngineLine, OverviewReader


async def show(settings: Settings, say: Say, *, as_json: bool) -> None:
    """Print every engine."""
    async with database(settings, say) as opened:
        lines = await OverviewReader(opened).engines()
    if as_json:
        print_json(lines)
    else:
        console().print(drawn(lines))


def drawn(lines: Iterable[EngineLine]) -> Table:
    """Engines, one a row; `sandledger status` shows the same."""
    headings = ("engine", "kind", "version", "state", "since (UTC)", "sandboxes", "seen", "swept", "trouble")
    made = table(*headings, title="Engines")
    for line in lines:
        made.add_row(
            plain(line.name),
            plain(line.kind),
            plain(line.version),
            plain(line.state, "" if line.state == "up" else "red"),
            f"{line.state_since:%Y-%m-%d %H:%M:%S}",
            str(line.sandboxes),
            _ago(line.seen_s),
            _ago(line.swept_s),
            plain(line.trouble),
        )
    return made


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f} s ago"


async def trust(settings: Settings, name: str, say: Say) -> None:
    """Follow this log from here on, although the engine holds objects from beyond its end."""
    async with database(settings, say) as opened:
        installation = (await read_installation(opened)).id
        engines = Engines(opened, Signal(opened), installation, EnginesView(opened))
        engine = await engines.trust(name, operator())
    say(
        f"engine {name} is {engine.state} again. Its objects that belong to no sandbox of this log are orphans now; "
        "workers remove them after two sweeps"
    )
