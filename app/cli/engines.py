"""`sandledger engines`: which engines the log knows, and the way out when the log went back."""

from __future__ import annotations

import getpass
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

import msgspec
from rich.console import Console
from rich.table import Table

from app import __version__
from app.cli.reporting import Say
from app.domain.stream import Actor, ActorKind, Meta
from app.server.assembly import open_database
from app.service.engines import Engines
from app.settings import Settings
from app.store.database.installation import read_installation
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.views.engines import EnginesView, Standing


@asynccontextmanager
async def _engines(settings: Settings, say: Say) -> AsyncGenerator[Engines]:
    async with open_database(settings, say, upgrade=False) as store:
        database = Database(store.dsn)
        try:
            installation = (await read_installation(database)).id
            yield Engines(database, Signal(database), installation, EnginesView(database))
        finally:
            await database.close()


def operator() -> Meta:
    """A person at the command line."""
    name = getpass.getuser()
    return Meta(Actor(ActorKind.OPERATOR, name, name), __version__)


async def show(settings: Settings, say: Say, *, as_json: bool) -> None:
    """Print every engine."""
    async with _engines(settings, say) as engines:
        standings = await engines.view.standings()
    if as_json:
        sys.stdout.write(msgspec.json.encode([_row(standing) for standing in standings]).decode() + "\n")
        return
    render(standings, Console())


def render(standings: Sequence[Standing], console: Console) -> None:
    """A table, never shortened."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "kind", "state", "since (UTC)", "last seen (UTC)", "swept (UTC)", "trouble"):
        table.add_column(heading, overflow="fold")
    for standing in standings:
        engine = standing.engine
        times = (engine.state_since, standing.last_seen_at, standing.swept_at)
        table.add_row(engine.name, engine.kind, engine.state.value, *map(_instant, times), engine.trouble)
    console.print(table)


async def trust(settings: Settings, name: str, say: Say) -> None:
    """Follow this log from here on, although the engine holds objects from beyond its end."""
    async with _engines(settings, say) as engines:
        engine = await engines.trust(name, operator())
    say(
        f"engine {name} is {engine.state} again. Its objects that belong to no sandbox of this log are orphans now; "
        "workers remove them after two sweeps"
    )


def _row(standing: Standing) -> dict[str, str | None]:
    engine = standing.engine
    return {
        "name": engine.name,
        "kind": engine.kind,
        "state": engine.state.value,
        "since": engine.state_since.isoformat(),
        "last_seen_at": None if standing.last_seen_at is None else standing.last_seen_at.isoformat(),
        "swept_at": None if standing.swept_at is None else standing.swept_at.isoformat(),
        "trouble": engine.trouble,
        "mark": engine.mark,
        "engine_id": engine.engine_id,
        "version": engine.server_version,
    }


def _instant(at: datetime | None) -> str:
    return "never" if at is None else f"{at:%Y-%m-%d %H:%M:%S}"
