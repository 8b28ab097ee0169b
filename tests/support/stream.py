"""One stream in memory: commands in, events out, on a clock that is an argument. No database."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from datetime import datetime, timedelta
from uuid import UUID

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox import transitions
from app.domain.sandbox.decide import Events, decide
from app.domain.sandbox.observed import Exit, Observed, Power
from app.domain.sandbox.spec import SandboxSpec
from app.domain.sandbox.state import Phase, Sandbox, evolve

BEGIN = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
ID = UUID("0198f000-0000-7000-8000-000000000001")
META = ev.Meta(ev.Actor(ev.ActorKind.API_KEY, "k1", "default"), "test")
SECOND = timedelta(seconds=1)


def requested(timeout_s: int | None = 600, metadata: dict[str, str] | None = None) -> ev.Requested:
    """The event that begins a stream."""
    spec = SandboxSpec("busybox", ("sleep", "60"), timeout_s=timeout_s)
    return ev.Requested("default", "fake", spec, "f" * 64, metadata or {})


def seen(
    power: Power,
    runtime_id: str = "r1",
    *,
    started_at: datetime | None = None,
    end: Exit | None = None,
    adopted: bool = False,
) -> Observed:
    """One look at the engine's object."""
    return Observed(ID, runtime_id, f"sbx-{ID}", power, started_at=started_at, exit=end, adopted=adopted)


class Stream:
    """A sandbox whose every event was decided, checked against the declared table and applied."""

    def __init__(self, begin: ev.Requested | None = None) -> None:
        self.now = BEGIN
        self.facts: list[ev.Recorded] = []
        self.box: Sandbox = evolve(None, self._record(begin or requested()))

    def _record(self, event: ev.Event) -> ev.Recorded:
        number = len(self.facts) + 1
        fact = ev.Recorded(number * 3, ID, number, self.now, event, META)
        self.facts.append(fact)
        return fact

    def do(self, command: cmd.Command) -> Events:
        """As the service does it: decide, check, evolve; the move of the whole append must be declared."""
        before = self.box
        events = decide(before, command, self.now)
        for event in events:
            transitions.check(self.box, event)
            self.box = evolve(self.box, self._record(event))
        move = (before.phase, self.box.phase)
        assert before.phase is self.box.phase or move in transitions.PHASE_MOVES, f"{move} by {command}: {events}"
        return events

    def after(self, *commands: cmd.Command) -> Stream:
        """Do all of it; handy for arranging."""
        for command in commands:
            self.do(command)
        return self

    def look(self, power: Power, **details: object) -> Stream:
        """The engine showed it."""
        return self.after(cmd.RecordSeen(seen(power, **details)))  # pyright: ignore[reportArgumentType]

    def fork(self) -> Stream:
        """The same history, free to go another way."""
        other = copy(self)
        other.facts = list(self.facts)
        return other

    def pass_time(self, seconds: float) -> Stream:
        """Let the clock run."""
        self.now += timedelta(seconds=seconds)
        return self


def in_phase(phase: Phase) -> Stream:
    """A stream that has come to this phase by the shortest ordinary way."""
    stream = Stream()
    ways: dict[Phase, Iterable[cmd.Command]] = {
        Phase.PENDING: (),
        Phase.RUNNING: (cmd.RecordSeen(seen(Power.RUNNING)),),
        Phase.PAUSING: (cmd.RecordSeen(seen(Power.RUNNING)), cmd.Pause()),
        Phase.PAUSED: (cmd.RecordSeen(seen(Power.RUNNING)), cmd.Pause(), cmd.RecordSeen(seen(Power.PAUSED))),
        Phase.RESUMING: (
            cmd.RecordSeen(seen(Power.RUNNING)),
            cmd.Pause(),
            cmd.RecordSeen(seen(Power.PAUSED)),
            cmd.Resume(),
        ),
        Phase.STOPPING: (cmd.RecordSeen(seen(Power.RUNNING)), cmd.Terminate()),
        Phase.TERMINATED: (
            cmd.RecordSeen(seen(Power.RUNNING)),
            cmd.RecordSeen(seen(Power.EXITED, end=Exit(0))),
        ),
        Phase.FAILED: (cmd.RecordFailure("IMAGE_NOT_FOUND", "no such image"),),
    }
    stream.after(*ways[phase])
    assert stream.box.phase is phase
    return stream
