"""`sandledger events`: every type of event says what happened, and what an engine said drives no terminal."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from uuid import UUID

import pytest
import uuid_utils.compat
from rich.console import Console

from app.cli import timeline
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.spec import SandboxSpec
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.errors import NotFound
from app.service.sandboxes import Service
from app.settings import Settings
from tests.support.stream import BEGIN, ID

META = Meta(Actor(ActorKind.API_KEY, "k", "default"), "test")
GOLDEN = Path(__file__).parents[1] / "golden"
NAME_SAYS_ALL = {"sandbox.pause_requested", "sandbox.resume_requested", "sandbox.resumed"}


@pytest.mark.parametrize("name", list(ev.REGISTRY.types))
def test_every_type_is_described(name: str):
    stored = json.loads((GOLDEN / f"{name}.1.json").read_text())
    event = ev.REGISTRY.decode(name, 1, json.dumps(stored.get("data", stored)))
    assert bool(timeline.describe(event)) is (name not in NAME_SAYS_ALL), timeline.describe(event)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (ev.Waited("fetch", "IMAGE_PULLING"), "fetch: IMAGE_PULLING"),
        (ev.Failed("ensure", "START_REJECTED", "no such device"), "ensure: START_REJECTED: no such device"),
        (ev.PauseFailed("PAUSE_REFUSED", "cgroup is busy"), "PAUSE_REFUSED: cgroup is busy"),
        (ev.ReconcileFailed("remove", "X", "no", 3), "remove, attempt 3: X: no"),
        (ev.Overdue("Stopping", BEGIN, 2), "Stopping since 2026-03-01 12:00:00.000, report 2"),
        (ev.RuntimeLost("MISSING", BEGIN), "MISSING since 2026-03-01 12:00:00.000"),
        (ev.RuntimeExited(137, oom=True), "exit code 137, out of memory"),
        (ev.RuntimeExited(None, reason="ENGINE_STOPPED"), "no exit code, ENGINE_STOPPED"),
        (ev.Ready(), "as soon as it ran"),
        (ev.Ready(1500, "agent"), "1.5 s after the start, says the agent"),
        (ev.Placed("default", 1, ID), "engine default, ONLY_ENGINE"),
        (ev.MetadataPatched({"a": "1"}, ("b",)), "+a, -b"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_in_these_words(event: ev.Event, text: str):
    assert timeline.describe(event) == text


def test_what_an_engine_says_is_no_markup_and_drives_no_terminal():
    said = "closing [/bold] [red]x[/red] \x1b]0;owned\x07"
    recorded = ev.Recorded(1, ID, "default", 1, BEGIN, ev.Failed("ensure", "X", said), META)
    out = StringIO()
    timeline.render([recorded], Console(file=out, width=400, force_terminal=True))
    assert "closing [/bold] [red]x[/red] \\x1b]0;owned\\x07" in out.getvalue()
    assert "\x07" not in out.getvalue()


async def test_an_unknown_id_is_said(settings: Settings):
    with pytest.raises(NotFound, match="there never was a sandbox"):
        await timeline.print_history(settings, UUID(int=1), print, as_json=False)


async def test_the_last_line_says_how_it_is(settings: Settings, service: Service, capsys: pytest.CaptureFixture[str]):
    sandbox_id = uuid_utils.compat.uuid7()
    await service.create(sandbox_id, "default", ev.Requested(SandboxSpec("x", ("y",)), "f"), None, META)
    await service.execute(sandbox_id, ANY_TENANT, cmd.RecordFailure("ensure", "X", "no [/x] \x1b[31m"), META)
    await timeline.print_history(settings, sandbox_id, print, as_json=False)
    shown = capsys.readouterr().out
    assert f"{sandbox_id} is Failed: no [/x] \\x1b[31m" in shown
    assert "\x1b" not in shown
