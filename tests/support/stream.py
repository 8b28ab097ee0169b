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
from app.domain.sandbox.observed import Address, Exit, Observed, Part, Power, Verdict, Waiting
from app.domain.sandbox.spec import SandboxSpec
from app.domain.sandbox.state import Phase, Sandbox, evolve
from app.domain.stream import Actor, ActorKind, Meta, Recorded

BEGIN = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
ID = UUID("0198f000-0000-7000-8000-000000000001")
TENANT = "default"
META = Meta(Actor(ActorKind.API_KEY, "k1", "default"), "test")
PLACED = ev.Placed("default", 1, ID)
SECOND = timedelta(seconds=1)


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
) -> Observed:
    """One look at the engine's object."""
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
    )


class Stream:
    """A sandbox whose every event was decided, checked against the declared table and applied."""

    def __init__(self, begin: ev.Requested | None = None, *, placed: bool = True) -> None:
        self.now = BEGIN
        self.facts: list[ev.Recorded] = []
        self.sandbox: Sandbox = evolve(None, self._record(begin or requested()))
        if placed:
            self.sandbox = evolve(self.sandbox, self._record(PLACED))

    def _record(self, event: ev.Event) -> ev.Recorded:
        number = len(self.facts) + 1
        fact = Recorded(number * 3, ID, "default", number, self.now, event, META)
        self.facts.append(fact)
        return fact

    def do(self, command: cmd.Command) -> Events:
        """As the service does it: decide, check, evolve; the move of the whole append must be declared."""
        before = self.sandbox
        events = decide(before, command, self.now)
        for event in events:
            transitions.check(self.sandbox, event)
            self.sandbox = evolve(self.sandbox, self._record(event))
        move = (before.phase, self.sandbox.phase)
        assert before.phase is self.sandbox.phase or move in transitions.PHASE_MOVES, f"{move} by {command}: {events}"
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
        Phase.FAILED: (cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "no such image"),),
    }
    stream.after(*ways[phase])
    assert stream.sandbox.phase is phase
    return stream
