"""The history of one sandbox as a readable timeline: position, time, event, actor, reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast
from uuid import UUID

import click
import msgspec
from rich.console import Console
from rich.table import Table

from app.domain.sandbox import events as ev
from app.errors import NotFound
from app.server.assembly import open_database
from app.service.sandboxes import recorded
from app.settings import Settings
from app.store.database.pool import Database
from app.store.log.store import EventLog
from app.views.current import CurrentView

Say = Callable[[str], None]


def describe(event: ev.Event) -> str:
    """The part of an event that a reader wants beside its name."""
    match event:
        case ev.Requested(spec=spec):
            ttl = "no expiry" if spec.timeout_s is None else f"timeout {spec.timeout_s} s"
            return f"{spec.image}, {ttl}"
        case ev.LeaseRenewed(expires_at=expires_at):
            return f"until {_instant(expires_at)}"
        case ev.TerminationRequested(cause=cause) | ev.Expired(cause=cause):
            return cause.value
        case ev.RuntimeCreated(name=name) | ev.RuntimeAdopted(name=name):
            return name
        case ev.RuntimeExited(exit_code=code, oom=oom):
            return f"exit code {code}{', out of memory' if oom else ''}"
        case ev.ReconcileFailed(step=step, code=code, message=message, attempt=attempt):
            return f"{step}, attempt {attempt}: {code}: {message}"
        case ev.Failed(reason=reason, message=message):
            return f"{reason}: {message}"
        case ev.Terminated(cause=cause, lived_s=lived):
            return f"{cause.value} after {lived:.1f} s"
        case ev.MetadataPatched(set=added, removed=removed):
            return ", ".join([*(f"+{key}" for key in added), *(f"-{key}" for key in removed)])
        case _:
            return ""


def render(facts: list[ev.Recorded], console: Console) -> None:
    """Print a table, as wide as the terminal allows and never shortened."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("position", "time (UTC)", "event", "actor", "reason"):
        table.add_column(heading, justify="right" if heading == "position" else "left", overflow="fold")
    for fact in facts:
        actor = f"{fact.meta.actor.kind.value} {fact.meta.actor.name}"
        table.add_row(str(fact.position), _instant(fact.at), ev.wire_name(fact.event), actor, describe(fact.event))
    console.print(table)


def _instant(at: Any) -> str:
    return cast("str", at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] if at else "")


async def print_history(settings: Settings, sandbox_id: UUID, say: Say, *, as_json: bool) -> None:
    """Read from the database, so that it works while no server runs.

    Raises:
        NotFound: no such sandbox, of any tenant.
    """
    async with open_database(settings, say) as store:
        database = Database(store.dsn)
        try:
            loaded = await CurrentView(database).load(sandbox_id)
            if loaded is None:
                raise NotFound("DOCKER::SANDBOX_NOT_FOUND", f"there never was a sandbox {sandbox_id} in this database")
            box, _ = loaded
            history = EventLog(database).whole_history(sandbox_id, box.tenant)
            facts = [recorded(stored) async for stored in history]
        finally:
            await database.close()
    if as_json:
        for fact in facts:
            click.echo(msgspec.json.encode(fact))
        return
    render(facts, Console(width=None if _is_terminal() else 160))
    click.echo(f"{sandbox_id} is {box.phase}: {box.status.message}")


def _is_terminal() -> bool:
    return sys.stdout.isatty()
