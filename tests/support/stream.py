"""One stream in memory: commands in, events out, on a clock that is an argument. No database."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox import transitions
from app.domain.sandbox.deadlines import Limits, changes
from app.domain.sandbox.decide import Events, decide
from app.domain.sandbox.observed import Address, Exit, Observed, Part, Power, Verdict, Waiting
from app.domain.sandbox.spec import SandboxSpec
from app.domain.sandbox.state import Phase, Sandbox, evolve
from app.domain.stream import Actor, ActorKind, Meta, Recorded
from tests.support.moves import PHASE_MOVES

BEGIN = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
ID = UUID("0198f000-0000-7000-8000-000000000001")
TENANT = "default"
META = Meta(Actor(ActorKind.API_KEY, "k1", "default"), "test")
PLACED = ev.Placed("default", 1, ID)
SECOND = timedelta(seconds=1)
LIMITS = Limits()


def requested(timeout_s: int | None = 600, metadata: dict[str, str] | None = None) -> ev.Requested:
    """The event that begins a stream."""
    spec = SandboxSpec("busybox", ("sleep", "60"))
    return ev.Requested(spec, "f" * 64, metadata or {}, timeout_s)


def parts(runtime_id: str = "r1", object_id: UUID = ID) -> tuple[Part, ...]:
    """What an object of one container is made of."""
    return (Part("main", runtime_id, f"sandbox-{object_id}"),)


def seen(
    power: Power,
    runtime_id: str = "r1",
    *,
    object_id: UUID = ID,
    started_at: datetime | None = None,
    end: Exit | None = None,
    adopted: bool = False,
    waiting: Waiting | None = None,
    verdict: Verdict | None = None,
    address: Address | None = None,
    image_id: str | None = None,
    agent: bool = False,
) -> Observed:
    """One observation of the engine's object."""
    return Observed(
        object_id,
        parts(runtime_id, object_id),
        power,
        started_at=started_at,
        exit=end,
        adopted=adopted,
        waiting=waiting,
        verdict=verdict,
        address=address,
        image_id=image_id,
        agent=agent,
    )


def about(object_id: UUID, command: cmd.Command) -> cmd.Command:
    """The command, with its observation about this object; any other command as it is."""
    if not isinstance(command, cmd.RecordSeen):
        return command
    return replace(command, observed=replace(command.observed, object_id=object_id))


class Stream:
    """A sandbox whose every event was decided, checked against the declared table and applied, with its deadlines."""

    def __init__(self, begin: ev.Requested | None = None, *, placed: bool = True) -> None:
        self.now = BEGIN
        self.history: list[ev.Recorded] = []
        self.deadlines: dict[str, datetime] = {}
        events: Events = (begin or requested(), *([PLACED] if placed else []))
        self.sandbox: Sandbox = evolve(None, self._record(events[0]))
        for event in events[1:]:
            self.sandbox = evolve(self.sandbox, self._record(event))
        self._set_deadlines(None, events)

    def _record(self, event: ev.Event) -> ev.Recorded:
        number = len(self.history) + 1
        recorded = Recorded(number * 3, ID, "default", number, self.now, event, META)
        self.history.append(recorded)
        return recorded

    def _set_deadlines(self, before: Sandbox | None, events: Events) -> None:
        for name, due in changes(before, self.sandbox, events, self.now, LIMITS).items():
            if due is None:
                del self.deadlines[name]  # a deadline that is taken away was there
            elif due.at is not None:
                self.deadlines[name] = due.at
            else:
                assert due.after_s is not None
                self.deadlines[name] = self.now + timedelta(seconds=due.after_s)

    def do(self, command: cmd.Command) -> Events:
        """As the service does it: decide, check, evolve; the move of the whole append must be declared."""
        before = self.sandbox
        events = decide(before, command, self.now)
        for event in events:
            transitions.check(self.sandbox, event)
            self.sandbox = evolve(self.sandbox, self._record(event))
        move = (before.phase, self.sandbox.phase)
        assert before.phase is self.sandbox.phase or move in PHASE_MOVES, f"{move} by {command}: {events}"
        if events:
            self._set_deadlines(before, events)
        return events

    def apply(self, event: ev.Event) -> Stream:
        """An event that a newer version decided."""
        before = self.sandbox
        self.sandbox = evolve(before, self._record(event))
        self._set_deadlines(before, (event,))
        return self

    def after(self, *commands: cmd.Command) -> Stream:
        """Do all of it; handy for arranging."""
        for command in commands:
            self.do(command)
        return self

    def observe(self, power: Power, runtime_id: str = "r1", **details: Any) -> Stream:
        """The engine showed it."""
        return self.after(cmd.RecordSeen(seen(power, runtime_id, **details)))

    def fork(self) -> Stream:
        """The same history, free to go another way."""
        other = copy(self)
        other.history = list(self.history)
        other.deadlines = dict(self.deadlines)
        return other

    def pass_time(self, seconds: float) -> Stream:
        """Let the clock run."""
        self.now += timedelta(seconds=seconds)
        return self

    def to_deadline(self, name: str) -> Stream:
        """Let the clock run until the deadline fires."""
        self.now = self.deadlines[name]
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
        Phase.FAILED: (cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "no such image"),),
    }
    stream.after(*ways[phase])
    assert stream.sandbox.phase is phase
    return stream
