"""The history of one sandbox as a readable timeline: position, time, event, actor, and what the event says."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec
from rich.console import Console

from app.cli.reporting import Say, console, plain, print_json, table
from app.cli.session import database
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Address, Part
from app.domain.sandbox.status import status_of
from app.domain.tenants import ANY_TENANT
from app.errors import NotFound
from app.service.streams import decoded
from app.settings import Settings
from app.store.log.store import EventLog
from app.views.current import CurrentView


def describe(event: ev.Event) -> str:
    """The part of an event that a reader wants beside its name. Empty where the name says all."""
    match event:
        case ev.Requested(spec=spec, timeout_s=timeout):
            made_from = spec.image if spec.snapshot_id is None else f"snapshot {spec.snapshot_id}"
            return f"{made_from}, {'no expiry' if timeout is None else f'timeout {timeout} s'}"
        case ev.Placed(engine=engine, reason=reason):
            return f"engine {engine}, {reason}"
        case ev.Renewed(expires_at=expires_at):
            return f"until {_instant(expires_at)}"
        case ev.MetadataPatched(set=added, removed=removed):
            return ", ".join([*(f"+{key}" for key in added), *(f"-{key}" for key in removed)])
        case ev.TerminationRequested(end_cause=cause) | ev.Expired(end_cause=cause):
            return cause
        case ev.FreezeRequested(snapshot_id=snapshot_id) | ev.Frozen(snapshot_id=snapshot_id):
            return f"for snapshot {snapshot_id}"
        case ev.ThawRequested(reason=reason):
            return reason
        case ev.LinkCreated(port=port, expires_at=expires_at):
            return f"to port {port}, until {_instant(expires_at)}"
        case ev.LinksRevoked(link_number=number):
            return f"later links carry number {number}"
        case ev.Thawed(frozen_ms=frozen_ms):
            return f"after {frozen_ms / 1000:.1f} s"
        case ev.Terminated(end_cause=cause, lived_ms=lived):
            return f"{cause} after {lived / 1000:.1f} s"
        case _:
            return _describe_observation(event)


def _describe_observation(event: ev.Event) -> str:
    match event:
        case ev.Fetched(image_id=image_id, took_ms=took, cached=cached):
            return f"{image_id}, {'was there already' if cached else f'took {took / 1000:.1f} s'}"
        case ev.RuntimeCreated(parts=parts) | ev.RuntimeRemoved(parts=parts):
            return _names(parts)
        case ev.RuntimeAdopted(parts=parts, found_by=found_by):
            return f"{_names(parts)}, found by {found_by}"
        case ev.Started(run=run, address=address):
            return f"run {run}{_at(address)}"
        case ev.Restarted(run=run, by=by, address=address):
            return f"run {run}, by {by}{_at(address)}"
        case ev.Ready(via="runtime"):
            return "as soon as it ran"
        case ev.Ready(after_ms=after, via=via):
            return f"{after / 1000:.1f} s after the start, says the {via}"
        case ev.AgentUnreachable(reason=reason, message=message, after_ms=after):
            return f"{reason} after {after / 1000:.1f} s: {message}"
        case ev.AddressChanged(address=address):
            return _at(address).removeprefix(", ")
        case ev.Paused(kept=kept):
            return f"{kept} kept"
        case ev.RuntimeExited(exit_code=code, oom=oom, reason=reason):
            how = "no exit code" if code is None else f"exit code {code}"
            return ", ".join([how, *(["out of memory"] if oom else []), *([reason] if reason else [])])
        case _:
            return _describe_trouble(event)


def _describe_trouble(event: ev.Event) -> str:
    match event:
        case ev.ReconcileFailed(step=step, reason=reason, message=message, attempt=attempt):
            return _sentence(f"{step}, attempt {attempt}", reason, message)
        case (
            ev.Waited(step=step, reason=reason, message=message) | ev.Failed(step=step, reason=reason, message=message)
        ):
            return _sentence(step, reason, message)
        case ev.PauseFailed(reason=reason, message=message) | ev.ResumeFailed(reason=reason, message=message):
            return _sentence(reason, message)
        case ev.Overdue(phase=phase, since=since, times=times):
            return f"{phase} since {_instant(since)}, report {times}"
        case ev.RuntimeLost(reason=reason, missing_since=missing_since):
            return reason if missing_since is None else f"{reason} since {_instant(missing_since)}"
        case _:
            return ""


def _sentence(*parts: str) -> str:
    return ": ".join(filter(None, parts))


def _names(parts: tuple[Part, ...]) -> str:
    return ", ".join(part.name for part in parts) or "nothing known to the log"


def _at(address: Address | None) -> str:
    if address is None:
        return ""
    ports = ", ".join(f"{inside} at {outside}" for inside, outside in address.ports.items())
    return f", {address.network} {address.ip}".rstrip() + (f", {ports}" if ports else "")


def render(history: list[ev.Recorded], out: Console) -> None:
    """Print the history as a table, one event a row, and the state that it leads to."""
    made = table("position", "time (UTC)", "event", "actor", "what")
    for one in history:
        name = ev.REGISTRY.name_of(one.event)
        texts = (str(one.position), _instant(one.at), name, str(one.meta.actor), describe(one.event))
        made.add_row(*map(plain, texts))
    out.print(made)


def _instant(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


async def print_history(settings: Settings, sandbox_id: UUID, say: Say, *, as_json: bool) -> None:
    """Read from the database, so that it works while no server runs.

    Raises:
        NotFound: no such sandbox, of any tenant.
    """
    async with database(settings, say) as opened:
        loaded = await CurrentView(opened).load(sandbox_id, ANY_TENANT)
        if loaded is None:
            raise NotFound("DOCKER::SANDBOX_NOT_FOUND", f"there never was a sandbox {sandbox_id} in this database")
        sandbox, _ = loaded
        stored = EventLog(opened).whole_history(sandbox_id, sandbox.tenant)
        history = [decoded(ev.REGISTRY, one) async for one in stored]
    if as_json:
        for one in history:
            print_json({"type": ev.REGISTRY.name_of(one.event), **msgspec.to_builtins(one)})
        return
    out = console()
    render(history, out)
    out.print(plain(f"{sandbox_id} is {sandbox.phase}: {status_of(sandbox).message}"))
