"""A model of an engine and of the reconciler's loop around `plan`, without waiting and without I/O."""

from __future__ import annotations

from datetime import datetime, timedelta

from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Answer, Observed, Power, Waiting
from app.domain.sandbox.plan import (
    Absence,
    ConfirmMissing,
    Ensure,
    Fetch,
    InstallAgent,
    Lose,
    Observe,
    Place,
    Probe,
    Remove,
    SetPower,
    Settled,
    Step,
    Wait,
    plan,
)
from app.domain.sandbox.state import Desired, Phase, RuntimeState, Sandbox
from tests.support.stream import ID, Stream, seen

GRACE = timedelta(seconds=5)
MAX_STEPS = 8


class Killed(Exception):
    """The worker died between acting and recording."""


class PowerRefused(Exception):
    """The engine will not pause or resume."""


class EngineModel:
    """The smallest engine that keeps the promises of `app.runtime.driver`: at most one object, adopted by name."""

    def __init__(
        self, holds: Observed | None = None, *, has_image: bool = True, slow: bool = False, refuses: bool = False
    ) -> None:
        """`slow`: an object is up only when it is observed after a wait. `refuses`: no pause, no resume."""
        self.holds = holds
        self.has_image = has_image
        self.slow = slow
        self.refuses = refuses

    def ensure(self) -> Observed | None:
        """None = the image is missing."""
        if self.holds is None and not self.has_image:
            return None
        power = Power.RUNNING
        waiting = None
        if self.slow and (self.holds is None or self.holds.power is Power.CREATED):
            power, waiting = Power.CREATED, Waiting("ensure", "POD_UNSCHEDULABLE")
        if self.holds is None:
            self.holds = seen(power, "made", waiting=waiting)
            return self.holds
        if self.holds.power is Power.CREATED:
            self.holds = replace(self.holds, power=power, waiting=waiting)
        self.holds = replace(self.holds, adopted=True)
        return self.holds

    def time_passes(self) -> None:
        """What was waited for happens."""
        self.slow = False
        if self.holds is not None and self.holds.waiting is not None:
            self.holds = replace(self.holds, power=Power.RUNNING, waiting=None)

    def set_power(self, power: Power) -> Observed | None:
        if self.holds is not None and self.holds.power in (Power.RUNNING, Power.PAUSED):
            if self.refuses and self.holds.power is not power:
                raise PowerRefused
            self.holds = replace(self.holds, power=power)
        return self.holds


class Run:
    """One run of the reconciler."""

    def __init__(self, stream: Stream, engine: EngineModel) -> None:
        self.stream = stream
        self.engine = engine
        self.answer: Answer | None = None
        self.missing_since: datetime | None = None

    def next_step(self) -> Step:
        return plan(self.stream.sandbox, self.answer, Absence(self.stream.now, self.missing_since, GRACE))

    def act(self, step: Step) -> list[cmd.Command]:
        """Do it at the engine. Says what is to be recorded."""
        match step:
            case Settled():
                return []
            case Place():
                return [cmd.RecordPlaced("default", 1, ID)]
            case Observe():
                return self._saw(self.engine.holds, "observe")
            case Ensure() | Fetch():
                return self._ensure()
            case InstallAgent():
                raise AssertionError("the core does not plan it")
            case Probe():
                return [cmd.RecordReady(self.stream.sandbox.run)]
            case SetPower(power=power):
                try:
                    return self._saw(self.engine.set_power(power), "observe")
                except PowerRefused:
                    return [cmd.RecordPowerRefused("REFUSED", "the engine will not", power)]
            case Remove():
                self.engine.holds = None
                self.answer = Answer(None)
                return [cmd.RecordRemoved()]
            case Wait(until=until):
                self.stream.now, self.answer = until, None
                self.engine.time_passes()
                return self._saw(self.engine.holds, "observe")
            case ConfirmMissing(until=until):
                self.missing_since = self.missing_since or self.stream.now
                self.stream.now, self.answer = until, None
                return []
            case Lose(missing_since=since):
                return [cmd.RecordLost(since)]

    def _ensure(self) -> list[cmd.Command]:
        made = self.engine.ensure()
        if made is None:
            self.engine.has_image = True
            return [cmd.RecordWaiting("fetch", "IMAGE_PULLING"), cmd.RecordFetched("sha256:1")]
        return self._saw(made, "ensure")

    def _saw(self, shown: Observed | None, found_by: str) -> list[cmd.Command]:
        self.answer = Answer(shown)
        return [] if shown is None else [cmd.RecordSeen(shown, found_by)]


def settle(stream: Stream, engine: EngineModel, *, killed_after: int | None = None) -> int:
    """What the reconciler does, without the waiting. Says how many steps it took; dies after the given act."""
    run = Run(stream, engine)
    for number in range(MAX_STEPS + 1):
        step = run.next_step()
        if isinstance(step, Settled) or _is_resumed_later(step, stream.sandbox):
            return number
        commands = run.act(step)
        if number == killed_after:
            raise Killed
        stream.after(*commands)
    sandbox = stream.sandbox
    raise AssertionError(f"no goal after {MAX_STEPS} steps: {sandbox.phase}, {sandbox.observed}, {engine.holds}")


def _is_resumed_later(step: Step, sandbox: Sandbox) -> bool:
    """It waits for a snapshot that holds it still, and nothing else can be done for it."""
    held = sandbox.holds_still and sandbox.phase is Phase.RESUMING
    return held and isinstance(step, Wait) and step.waiting.reason == "SNAPSHOT_IN_PROGRESS"


def assert_goal(sandbox: Sandbox, engine: EngineModel) -> None:
    """What is wanted is so, and the log says what the engine says."""
    there = None if engine.holds is None else engine.holds.power
    if sandbox.object_id is None:
        assert not sandbox.may_run
        assert (sandbox.closed_at is None) == (sandbox.ending is None)
    elif sandbox.desired is Desired.TERMINATED:
        assert sandbox.closed_at is not None
        assert there is None
    elif sandbox.failure is not None or sandbox.observed is RuntimeState.REMOVED:
        assert sandbox.observed is RuntimeState.REMOVED
        assert there is None
    elif sandbox.observed is RuntimeState.LOST:
        assert there is None
    elif sandbox.observed is RuntimeState.EXITED:
        assert there in (None, Power.CREATED, Power.EXITED)
    else:
        assert there is not None
        if sandbox.holds_still:
            # For its owner it runs, or is paused, or is about to be resumed when the snapshot lets it.
            assert sandbox.frozen_by is not None
            assert sandbox.frozen_by.run == sandbox.run
            assert there is Power.PAUSED
        else:
            assert sandbox.frozen_by is None
            assert sandbox.observed.value == sandbox.desired.value
            assert there.value == sandbox.desired.value
        assert sandbox.runtime is not None
        assert engine.holds is not None
        assert sandbox.runtime.main is not None
        assert engine.holds.main is not None
        assert sandbox.runtime.main.runtime_id == engine.holds.main.runtime_id
