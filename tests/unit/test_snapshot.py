"""The laws of a snapshot: whatever happens between any two of its steps, it ends, nothing of it stays that must not,
and its source goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from itertools import count
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as source_events
from app.domain.sandbox.deadlines import Due, Limits
from app.domain.sandbox.observed import Exit, Power
from app.domain.sandbox.state import Phase
from app.domain.snapshot import decide as do
from app.domain.snapshot import events as ev
from app.domain.snapshot import plan as steps
from app.domain.snapshot.decide import COMMIT, begin, changes, decide, restorable
from app.domain.snapshot.plan import MAX_ATTEMPTS, Found, plan
from app.domain.snapshot.state import Snapshot, SnapshotState, evolve, fold
from app.domain.stream import Recorded
from app.errors import Conflict, NotFound, Rejected
from tests.support.model import EngineModel, settle
from tests.support.payload import values
from tests.support.stream import BEGIN, META, Stream, in_phase

SNAPSHOT = UUID(int=7)
CREATING, READY, FAILED = SnapshotState.CREATING, SnapshotState.READY, SnapshotState.FAILED
USER = UUID(int=9)
COMMANDS: list[do.Command] = [
    do.RecordCommitted("sha256:raw", "sha256:layer", 5),
    do.RecordReady("sha256:clean", 4096),
    do.RecordFailed("snapshot_runtime_failed", "no"),
    do.EndCommit(),
    do.RecordArtifact(present=False),
    do.RecordArtifact(present=True),
    do.Delete(),
    do.Delete((USER,)),
    do.RecordRemoved(),
]


class Taken:
    """A snapshot in memory, with its deadline."""

    def __init__(self, first: ev.Requested) -> None:
        self.now = BEGIN
        self.history: list[ev.Recorded] = []
        self.due: datetime | None = None
        self.snapshot = evolve(None, self._record(first))
        self._set(changes(None, self.snapshot, Limits()).get(COMMIT))

    def _record(self, event: ev.Event) -> ev.Recorded:
        number = len(self.history) + 1
        recorded: ev.Recorded = Recorded(number * 3, SNAPSHOT, "default", number, self.now, event, META)
        self.history.append(recorded)
        return recorded

    def _set(self, due: Due | None) -> None:
        self.due = None if due is None or due.after_s is None else self.now + timedelta(seconds=due.after_s)

    def do(self, command: do.Command) -> do.Events:
        before = self.snapshot
        events = decide(before, command, self.now)
        for event in events:
            ev.REGISTRY.encode(event)
            self.snapshot = evolve(self.snapshot, self._record(event))
        if COMMIT in (changed := changes(before, self.snapshot, Limits())):
            self._set(changed[COMMIT])
        return events

    def fork(self) -> Taken:
        other = Taken.__new__(Taken)
        other.__dict__ |= self.__dict__
        other.history = list(self.history)
        return other


def taken(source: Stream | None = None, name: str | None = None) -> Taken:
    (first,) = begin((source or in_phase(Phase.RUNNING)).sandbox, name)
    assert isinstance(first, ev.Requested)
    return Taken(first)


def reachable() -> list[Taken]:
    """Every state that commands lead to."""
    found: dict[tuple[object, ...], Taken] = {}
    todo = [taken()]
    while todo:
        here = todo.pop()
        snapshot = here.snapshot
        key = (snapshot.state, snapshot.reason, snapshot.raw_id is None, snapshot.image_id is None, here.now)
        if key in found:
            continue
        found[key] = here
        for command in COMMANDS:
            there = here.fork()
            try:
                if there.do(command):
                    todo.append(there)
            except Rejected:
                continue
        if here.now == BEGIN:
            late = here.fork()
            late.now = BEGIN + timedelta(seconds=Limits().commit_s)
            todo.append(late)
    return list(found.values())


def test_every_state_folds_has_its_deadline_and_takes_no_command_twice():
    states = reachable()
    assert {each.snapshot.state for each in states} == set(SnapshotState)
    for each in states:
        assert fold(each.history) == each.snapshot
        assert (each.due is not None) == (each.snapshot.state is CREATING)
        for command in COMMANDS:
            there = each.fork()
            try:
                events = there.do(command)
            except Rejected:
                continue
            if events:
                try:
                    assert there.do(command) == ()
                except Rejected as refusal:
                    assert isinstance(refusal, Conflict | NotFound)  # noqa: PT017


def test_what_is_removed_takes_no_command():
    for each in reachable():
        if each.snapshot.state is SnapshotState.REMOVED:
            for command in COMMANDS:
                with pytest.raises(NotFound) if isinstance(command, do.Delete) else _nothing():
                    assert each.fork().do(command) == ()


class _nothing:  # noqa: N801 - beside pytest.raises
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def test_only_a_ready_snapshot_with_its_image_can_be_restored():
    for each in reachable():
        snapshot = each.snapshot
        if snapshot.state is READY and not snapshot.is_missing:
            assert restorable(snapshot) == "sha256:clean"
        else:
            with pytest.raises(Conflict):
                restorable(snapshot)


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.RUNNING])
def test_only_a_running_sandbox_has_snapshots(phase: Phase):
    with pytest.raises(Conflict, match="SNAPSHOT::INVALID_SOURCE_STATE"):
        begin(in_phase(phase).sandbox, None)


def test_a_deadline_that_is_not_due_does_nothing_and_one_that_is_tells_the_last_error():
    each = taken()
    assert each.do(do.EndCommit()) == ()
    assert each.due is not None
    each.now = each.due
    (failed,) = each.do(do.EndCommit(last_reason="COMMIT_FAILED", last_error="no space left"))
    assert isinstance(failed, ev.Failed)
    assert failed.reason == "snapshot_runtime_timeout"
    assert failed.message.endswith("The last attempt failed: no space left")


def test_users_keep_it_and_are_named():
    each = taken()
    each.do(COMMANDS[0])
    each.do(COMMANDS[1])
    with pytest.raises(Conflict, match=str(USER)):
        each.do(do.Delete((USER,)))
    many = tuple(UUID(int=number) for number in range(30))
    with pytest.raises(Conflict, match="and 10 more"):
        each.do(do.Delete(many))


# The plan, with a model of the engine and with the source's own reconciler


class Killed(Exception):
    """The worker died between acting and recording."""


class World:
    """A source on its engine, a snapshot of it, and the images that the engine has."""

    def __init__(self) -> None:
        self.source = Stream(None)
        self.engine = EngineModel()
        settle(self.source, self.engine)
        assert self.source.sandbox.phase is Phase.RUNNING
        self.taken = taken(self.source)
        self.raw: set[str] = set()
        self.clean: str | None = None
        self.attempts = 0
        self._made = count()

    @property
    def snapshot(self) -> Snapshot:
        return self.taken.snapshot

    def is_at_rest(self) -> bool:
        holds = self.engine.holds
        return holds is not None and holds.power in (Power.PAUSED, Power.EXITED)

    def run(self, *, killed_after: int | None = None, between: Callable[[int], None] = lambda _: None) -> int:
        """What the reconciler does. Says how many steps it took."""
        found: Found | None = None
        for number in range(20):
            between(number)
            step = plan(self.snapshot, self.source.sandbox, found, self.attempts)
            if isinstance(step, steps.Settled):
                return number
            found, record = self._act(step)
            if number == killed_after:
                raise Killed
            record()
            settle(self.source, self.engine)
        raise AssertionError(f"no goal: {self.snapshot}, {self.source.sandbox.frozen_by}")

    def _act(self, step: steps.Step) -> tuple[Found | None, Callable[[], object]]:
        match step:
            case steps.Freeze():
                self.attempts += 1
                return None, lambda: self.source.do(cmd.Freeze(SNAPSHOT))
            case steps.AwaitSource():
                return None, lambda: settle(self.source, self.engine)
            case steps.Commit():
                return None, self._commit()
            case steps.Thaw(reason=reason):
                return None, lambda: self.source.do(cmd.Thaw(SNAPSHOT, reason))
            case steps.Clean():
                assert self.snapshot.raw_id in self.raw or self.clean is not None, "an earlier run was cut"
                self.clean = "sha256:clean"
                self.raw.clear()
                return Found(self.clean), lambda: self.taken.do(do.RecordReady("sha256:clean"))
            case steps.Look():
                there = self.clean is not None
                return Found(self.clean, tuple(self.raw)), lambda: self.taken.do(do.RecordArtifact(present=there))
            case steps.DropImages(raw_only=raw_only):
                self.raw.clear()
                self.clean = self.clean if raw_only else None
                return Found(self.clean), lambda: None if raw_only else self.taken.do(do.RecordRemoved())
            case steps.Fail(reason=reason, message=message):
                return None, lambda: self.taken.do(do.RecordFailed(reason, message))
            case steps.Settled():
                raise AssertionError

    def _commit(self) -> Callable[[], object]:
        assert self.is_at_rest(), "a copy while something may write"
        raw = f"sha256:raw-{next(self._made)}"
        self.raw.add(raw)

        def record() -> None:
            if self.is_at_rest() and self.source.sandbox.object_id is not None:
                self.raw.intersection_update({raw})
                self.taken.do(do.RecordCommitted(raw, "sha256:layer"))

        return record

    def assert_goal(self) -> None:
        assert self.raw == set(), "secrets of the source stay on the disk"
        assert self.source.sandbox.frozen_by is None, "the source is forgotten"
        if self.source.sandbox.phase is Phase.RUNNING:
            assert self.engine.holds is not None
            assert self.engine.holds.power is Power.RUNNING
        assert (self.clean is not None) == (self.snapshot.state is READY)
        assert self.snapshot.state in (READY, FAILED, SnapshotState.REMOVED)


def test_when_all_goes_well_it_is_ready_and_the_source_goes_on():
    world = World()
    assert world.run() == 4, "freeze, commit, thaw, clean; what is not frozen any more needs no second thaw"
    world.assert_goal()
    assert world.snapshot.state is READY
    world.taken.do(do.Delete())
    world.run()
    world.assert_goal()
    assert world.snapshot.state is SnapshotState.REMOVED


@pytest.mark.parametrize("deleted", [False, True])
def test_a_kill_after_any_act_changes_nothing_about_the_goal(deleted: bool):
    kills = 0
    for act in range(8):
        world = World()
        if deleted:
            world.run()
            world.taken.do(do.Delete())
        try:
            world.run(killed_after=act)
        except Killed:
            kills += 1
        settle(world.source, world.engine)
        world.run()
        world.assert_goal()
        assert world.snapshot.state is (SnapshotState.REMOVED if deleted else READY)
    assert kills >= (1 if deleted else 4)


def _exit(world: World) -> None:
    if world.engine.holds is not None:
        world.engine.holds = replace(world.engine.holds, power=Power.EXITED, exit=Exit(1))


def _vanish(world: World) -> None:
    world.engine.holds = None


def _break(world: World) -> None:
    if world.engine.holds is not None and world.engine.holds.power is Power.PAUSED:
        world.engine.holds = replace(world.engine.holds, power=Power.RUNNING)


def _ask(*commands: cmd.Command) -> Callable[[World], None]:
    def ask(world: World) -> None:
        for command in commands:
            try:
                world.source.do(command)
            except Rejected:
                return

    return ask


ACCIDENTS: dict[str, Callable[[World], None]] = {
    "exit": _exit,
    "vanish": _vanish,
    "break": _break,
    "delete": _ask(cmd.Terminate()),
    "pause": _ask(cmd.Pause()),
    "pause and resume": _ask(cmd.Pause(), cmd.Resume()),
    "thaw": _ask(cmd.Thaw(SNAPSHOT, "DEADLINE")),
    "commit deadline": lambda world: world.taken.do(do.RecordFailed("snapshot_runtime_timeout", "")) and None,
}


@pytest.mark.parametrize("name", ACCIDENTS)
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("killed_after", [None, 0, 1, 2, 3])
def test_whatever_happens_to_the_source_the_snapshot_ends_and_it_goes_on(name: str, at: int, killed_after: int | None):
    world = World()

    def between(number: int) -> None:
        if number == at:
            ACCIDENTS[name](world)
            settle(world.source, world.engine)

    try:
        world.run(killed_after=killed_after, between=between)
    except Killed:
        settle(world.source, world.engine)
        world.run()
    settle(world.source, world.engine)
    world.run()
    world.assert_goal()


def test_a_source_that_never_stands_still_is_asked_three_times():
    world = World()
    world.engine.refuses = True
    world.run()
    world.assert_goal()
    assert world.snapshot.reason == "snapshot_runtime_failed"
    asked = [one for one in world.source.history if isinstance(one.event, source_events.FreezeRequested)]
    assert len(asked) == MAX_ATTEMPTS


# Reading: history must always read

LATER = st.one_of(*map(values, set(ev.EVENT_CLASSES) - {ev.Requested}))


@given(values(ev.Requested), st.lists(LATER | values(ev.Requested), max_size=10), st.booleans(), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_fold_and_plan_are_total_on_events_in_any_order(
    first: ev.Requested, events: list[ev.Event], has_source: bool, attempts: int
):
    snapshot = evolve(None, Recorded(1, SNAPSHOT, "default", 1, BEGIN, first, META))
    source = in_phase(Phase.RUNNING).sandbox if has_source else None
    for number, event in enumerate(events, start=2):
        at = BEGIN + timedelta(seconds=number)
        snapshot = evolve(snapshot, Recorded(number, SNAPSHOT, "default", number, at, event, META))
        for found in (None, Found(), Found("sha256:a", ("sha256:b",))):
            assert plan(snapshot, source, found, attempts) is not None
    assert snapshot.version == len(events) + 1


def test_a_stream_that_does_not_begin_with_requested_cannot_be_read():
    with pytest.raises(TypeError, match=r"does not begin with snapshot\.requested"):
        evolve(None, Recorded(1, SNAPSHOT, "default", 1, BEGIN, ev.Removed(), META))


def test_a_source_of_another_generation_is_another_object():
    source = in_phase(Phase.RUNNING)
    each = taken(source)
    later = replace(source.sandbox, generation=source.sandbox.generation + 1)
    assert plan(each.snapshot, later, None) == steps.Fail(
        "snapshot_source_ended", "The source sandbox ended before its files were copied."
    )
    assert isinstance(plan(each.snapshot, None, None), steps.Fail)
