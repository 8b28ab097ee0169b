"""The history of one sandbox as a readable timeline: position, time, event, actor, reason."""

from __future__ import annotations

import sys
from typing import Any, cast
from uuid import UUID

import click
import msgspec
from rich.console import Console
from rich.table import Table

from app.cli.reporting import Say
from app.domain.sandbox import events as ev
from app.domain.sandbox.status import status_of
from app.errors import NotFound
from app.server.assembly import open_database
from app.service.streams import decoded
from app.settings import Settings
from app.store.database.pool import Database
from app.store.log.store import EventLog
from app.views.current import CurrentView


def describe(event: ev.Event) -> str:
    """The part of an event that a reader wants beside its name."""
    match event:
        case ev.Requested(spec=spec, timeout_s=timeout):
            return f"{spec.image}, {'no expiry' if timeout is None else f'timeout {timeout} s'}"
        case ev.Placed(engine=engine, reason=reason):
            return f"engine {engine}, {reason}"
        case ev.Renewed(expires_at=expires_at):
            return f"until {_instant(expires_at)}"
        case ev.TerminationRequested(end_cause=cause) | ev.Expired(end_cause=cause):
            return cause
        case ev.Terminated(end_cause=cause, lived_ms=lived):
            return f"{cause} after {lived / 1000:.1f} s"
        case ev.MetadataPatched(set=added, removed=removed):
            return ", ".join([*(f"+{key}" for key in added), *(f"-{key}" for key in removed)])
        case _:
            return _describe_observation(event)


def _describe_observation(event: ev.Event) -> str:
    match event:
        case ev.Fetched(image_id=image_id, took_ms=took, cached=cached):
            return f"{image_id}, {'was there already' if cached else f'took {took / 1000:.1f} s'}"
        case ev.RuntimeCreated(parts=parts) | ev.RuntimeAdopted(parts=parts) | ev.RuntimeRemoved(parts=parts):
            return ", ".join(part.name for part in parts)
        case ev.Restarted(run=run, by=by):
            return f"run {run}, by {by}"
        case ev.RuntimeExited(exit_code=code, oom=oom, reason=reason):
            how = "no exit code" if code is None else f"exit code {code}"
            return ", ".join([how, *(["out of memory"] if oom else []), *([reason] if reason else [])])
        case ev.ReconcileFailed(step=step, reason=reason, message=message, attempt=attempt):
            return f"{step}, attempt {attempt}: {reason}: {message}"
        case (
            ev.Waited(step=step, reason=reason, message=message) | ev.Failed(step=step, reason=reason, message=message)
        ):
            return f"{step}: {reason}: {message}".removesuffix(": ")
        case ev.PauseFailed(reason=reason, message=message) | ev.ResumeFailed(reason=reason, message=message):
            return f"{reason}: {message}"
        case ev.Overdue(phase=phase, since=since, times=times):
            return f"{phase} since {_instant(since)}, report {times}"
        case ev.RuntimeLost(reason=reason):
            return reason
        case _:
            return ""


def render(history: list[ev.Recorded], console: Console) -> None:
    """Print a table, as wide as the terminal allows and never shortened."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("position", "time (UTC)", "event", "actor", "reason"):
        table.add_column(heading, justify="right" if heading == "position" else "left", overflow="fold")
    for one in history:
        actor = f"{one.meta.actor.kind} {one.meta.actor.name}"
        name = ev.REGISTRY.name_of(one.event)
        table.add_row(str(one.position), _instant(one.at), name, actor, describe(one.event))
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
            sandbox, _ = loaded
            stored = EventLog(database).whole_history(sandbox_id, sandbox.tenant)
            history = [decoded(ev.REGISTRY, one) async for one in stored]
        finally:
            await database.close()
    if as_json:
        for one in history:
            click.echo(msgspec.json.encode({"type": ev.REGISTRY.name_of(one.event), **msgspec.to_builtins(one)}))
        return
    render(history, Console(width=None if _is_terminal() else 160))
    click.echo(f"{sandbox_id} is {sandbox.phase}: {status_of(sandbox).message}")


def _is_terminal() -> bool:
    return sys.stdout.isatty()
