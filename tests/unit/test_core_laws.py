"""The laws of the core: what holds for every sequence of commands, from every state, with every engine behind it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import EXPIRY, FREEZE, READY, TRANSITION, longest
from app.domain.sandbox.decide import LATEST, Events, decide
from app.domain.sandbox.observed import Answer, Exit, Observed, Part, Power, Verdict, Waiting
from app.domain.sandbox.plan import Absence, plan
from app.domain.sandbox.state import Phase, evolve, fold
from app.domain.sandbox.status import Attempt, status_of
from app.domain.stream import Recorded
from app.errors import Conflict, NotFound, Rejected
from tests.support.model import GRACE, EngineModel, Killed, assert_goal, settle
from tests.support.payload import instants, texts, values
from tests.support.reachable import COMMANDS, walk
from tests.support.stream import BEGIN, ID, LIMITS, META, PLACED, Stream, requested, seen

MAX_STEPS_TO_GOAL = 4
TRANSITIONAL = (Phase.PENDING, Phase.PAUSING, Phase.RESUMING, Phase.STOPPING)
HELD: list[Observed | None] = [
    None,
    *(seen(power, runtime_id) for power in Power for runtime_id in ("r1", "r2")),
    seen(Power.EXITED, end=Exit(0)),
    seen(Power.CREATED, waiting=Waiting("ensure", "POD_UNSCHEDULABLE")),
]


def engines() -> list[EngineModel]:
    """Everything that an engine may hold, and an empty one that needs a fetch and is slow."""
    return [*map(EngineModel, HELD), EngineModel(has_image=False, slow=True)]


@pytest.mark.proof
def test_from_every_state_and_every_engine_the_goal_is_reached():
    most = 0
    for state in walk()[0]:
        for engine in engines():
            stream = state.fork()
            most = max(most, settle(stream, engine))
            assert_goal(stream.sandbox, engine)
    assert most == MAX_STEPS_TO_GOAL, "the bound is not what it could be"


@pytest.mark.proof
def test_a_kill_after_any_act_changes_nothing_about_the_goal():
    kills = 0
    for state in walk()[0]:
        for number in range(len(engines())):
            for act in range(MAX_STEPS_TO_GOAL):
                stream, engine = state.fork(), engines()[number]
                try:
                    settle(stream, engine, killed_after=act)
                except Killed:
                    kills += 1
                else:
                    break
                settle(stream, engine)
                assert_goal(stream.sandbox, engine)
    assert kills > len(walk()[0])


@pytest.mark.proof
def test_an_engine_that_refuses_every_pause_and_resume_costs_no_sandbox():
    refused = 0
    for state in walk()[0]:
        for power in (Power.RUNNING, Power.PAUSED):
            stream, engine = state.fork(), EngineModel(seen(power), refuses=True)
            settle(stream, engine)
            new = [recorded.event for recorded in stream.history[len(state.history) :]]
            if not any(isinstance(event, ev.PauseFailed | ev.ResumeFailed) for event in new):
                continue
            refused += 1
            assert stream.sandbox.may_run
            assert stream.sandbox.phase in (Phase.RUNNING, Phase.PAUSED)
            assert_goal(stream.sandbox, engine)
    assert refused > 20


def _repeats(command: cmd.Command) -> bool:
    """A failed attempt is new each time; whoever reports them thins them. So is each report of what is overdue, each
    link, and each revocation: links may have been made since the last one.
    """
    return not isinstance(command, cmd.RecordRetry | cmd.CreateLink | cmd.RevokeLinks)


def answer(stream: Stream, command: cmd.Command) -> Events | type[Rejected]:
    """The events, or the kind of refusal."""
    try:
        return decide(stream.sandbox, command, stream.now)
    except Rejected as refusal:
        return type(refusal)


def assert_repetition_is_nothing(stream: Stream, command: cmd.Command) -> None:
    """The second time nothing is new, or the contract has a word for it."""
    again = answer(stream, command)
    if isinstance(command, cmd.EndTransition) and stream.sandbox.phase is Phase.STOPPING:
        assert isinstance(again, tuple)
        assert all(isinstance(event, ev.Overdue) for event in again)
    else:
        assert again in ((), NotFound, Conflict), command


@pytest.mark.proof
def test_no_command_counts_twice_in_any_state():
    for state in walk()[0]:
        for command in filter(_repeats, COMMANDS):
            stream = state.fork()
            try:
                events = stream.do(command)
            except Rejected:
                continue
            if events:
                assert_repetition_is_nothing(stream, command)


@pytest.mark.proof
def test_closed_is_final():
    closed = [state for state in walk()[0] if state.sandbox.closed_at is not None]
    assert len(closed) > 5
    for state in closed:
        for command in COMMANDS:
            assert answer(state, command) in ((), NotFound)


@pytest.mark.proof
def test_nothing_is_closed_while_something_of_it_may_be_on_an_engine():
    for state in walk()[0]:
        types = [type(recorded.event) for recorded in state.history]
        if ev.Terminated in types:
            assert types[-1] is ev.Terminated
            assert ev.RuntimeRemoved in types or ev.Placed not in types


@pytest.mark.proof
def test_observations_are_decided_on_the_state_alone_whatever_the_time():
    observations = [command for command in COMMANDS if type(command).__name__.startswith("Record")]
    for state in walk()[0]:
        for one in observations:
            early = decide(state.sandbox, one, BEGIN - timedelta(days=9999))
            assert decide(state.sandbox, one, state.now) == early


# Deadlines


def assert_deadlines(stream: Stream) -> None:
    """What the differences have added up to is what the state demands."""
    sandbox, found = stream.sandbox, dict(stream.deadlines)
    assert found.pop(EXPIRY, None) == (None if sandbox.ending is not None else sandbox.expires_at)
    limit = longest(sandbox, LIMITS)
    fires_at = found.pop(TRANSITION, None)
    assert (fires_at is None) == (limit is None), sandbox.phase
    if fires_at is not None and sandbox.phase is not Phase.STOPPING:
        assert (fires_at - sandbox.changed_at).total_seconds() == limit
    asked = sandbox.freeze_at if sandbox.holds_still else None
    assert found.pop(FREEZE, None) == (None if asked is None else asked + timedelta(seconds=LIMITS.freeze_s))
    began = sandbox.begun_at if sandbox.awaits_agent else None
    assert found.pop(READY, None) == (None if began is None else began + timedelta(seconds=LIMITS.ready_s))
    assert not found


@pytest.mark.proof
def test_every_state_has_the_deadlines_that_it_needs_and_no_other():
    for state in walk()[0]:
        assert_deadlines(state)


@pytest.mark.proof
def test_every_transitional_phase_ends_or_is_reported_when_its_deadline_fires():
    met: set[Phase] = set()
    for state in walk()[0]:
        before = state.sandbox.phase
        if before not in TRANSITIONAL:
            continue
        met.add(before)
        stream = state.fork().to_deadline(TRANSITION)
        (event,) = stream.do(cmd.EndTransition())
        if before is Phase.STOPPING:
            assert isinstance(event, ev.Overdue)
            assert stream.deadlines[TRANSITION] > stream.now
        else:
            # Paused from outside before the agent answered: the next transition has a deadline of its own.
            resumes = state.sandbox.awaits_agent and TRANSITION in stream.deadlines
            assert stream.sandbox.phase not in TRANSITIONAL or resumes
            assert stream.sandbox.may_run == (before is not Phase.PENDING or state.sandbox.awaits_agent)
    assert met == set(TRANSITIONAL)


# Values: random names, texts, times and numbers, where the walk above had a few fixed ones.

SNAPSHOTS = [UUID(int=7), UUID(int=8)]
labels = st.from_regex(r"[a-z]([a-z0-9]{0,5})", fullmatch=True)
exits = st.builds(
    Exit, st.none() | st.integers(-1, 255), st.booleans(), texts, st.none() | instants, st.none() | labels
)
mains = st.builds(Part, st.just("main"), st.sampled_from(["r1", "r2", "r3"]), labels)
observations = st.builds(
    Observed,
    st.just(ID),
    st.tuples(mains) | st.tuples(values(Part), mains) | st.just(()),
    st.sampled_from(Power),
    generation=st.integers(1, 3),
    image_id=st.none() | labels,
    image_digest=st.none() | labels,
    created_at=st.none() | instants,
    started_at=st.none() | instants,
    exit=st.none() | exits,
    adopted=st.booleans(),
    waiting=st.none() | st.builds(Waiting, labels, labels, texts),
    verdict=st.none() | st.none() | st.builds(Verdict, labels, texts),
    agent=st.booleans(),
)
far = st.datetimes(
    datetime.fromisoformat("2026-01-01"), datetime.fromisoformat("9999-12-31T23:59:59"), timezones=st.just(UTC)
)
near = st.integers(-10, 2000)
steps = st.sampled_from(["place", "fetch", "ensure", "probe", "observe", "set_power", "remove"])
commands = st.one_of(
    st.builds(cmd.Renew, far, st.none() | st.integers(60, 10**9)),
    st.builds(cmd.PatchMetadata, st.dictionaries(labels | texts, st.none() | labels | texts, max_size=4), st.integers(1, 6)),
    st.builds(cmd.Pause),
    st.builds(cmd.Resume),
    st.builds(cmd.Terminate),
    st.builds(cmd.Expire),
    st.builds(cmd.EndTransition, last_reason=st.none() | labels, last_error=st.none() | texts),
    st.builds(cmd.EndProbe),
    st.builds(cmd.Freeze, st.sampled_from(SNAPSHOTS)),
    st.builds(cmd.Thaw, st.sampled_from(SNAPSHOTS), labels),
    st.builds(cmd.EndFreeze),
    st.builds(cmd.RecordReady, st.integers(0, 4)),
    st.builds(cmd.RecordPlaced, labels, st.integers(1, 3), st.just(ID)),
    st.builds(cmd.RecordWaiting, steps, labels, texts),
    st.builds(cmd.RecordFetched, labels, st.none() | labels, st.none() | st.integers(0, 2**40)),
    st.builds(cmd.RecordSeen, observations, st.sampled_from(["ensure", "sweep", "observe"])),
    st.builds(cmd.RecordLost, instants),
    st.builds(cmd.RecordRemoved),
    st.builds(cmd.RecordFailure, steps, labels, texts),
    st.builds(cmd.RecordPowerRefused, labels, texts),
    st.builds(cmd.RecordRetry, steps, labels, texts, st.integers(1, 20)),
)  # fmt: skip


class AnyCourse(RuleBasedStateMachine):
    """A sandbox that is asked and told anything, in any order, while time passes."""

    @initialize(
        timeout_s=st.none() | st.integers(60, 10_000),
        metadata=st.dictionaries(labels, labels, max_size=3),
        placed=st.booleans(),
    )
    def begin(self, timeout_s: int | None, metadata: dict[str, str], placed: bool) -> None:
        self.stream = Stream(requested(timeout_s, metadata), placed=placed)

    @rule(seconds=st.integers(0, 900))
    def time_passes(self, seconds: int) -> None:
        self.stream.pass_time(seconds)

    @rule(seconds=near, limit=st.none() | st.integers(60, 3600))
    def renewed_nearby(self, seconds: int, limit: int | None) -> None:
        self.told(cmd.Renew(self.stream.now + timedelta(seconds=seconds), limit))

    @rule(command=commands)
    def told(self, command: cmd.Command) -> None:
        before = self.stream.sandbox
        try:
            events = self.stream.do(command)
        except Rejected:
            assert self.stream.sandbox is before
            return
        after = self.stream.sandbox
        for event in events:
            ev.REGISTRY.encode(event)
        assert after.version == before.version + len(events)
        assert after.run <= before.run + 1
        assert before.may_run or not after.may_run
        if after.expires_at != before.expires_at:
            assert any(isinstance(event, ev.Renewed) for event in events)
            assert after.expires_at is not None
            assert self.stream.now < after.expires_at < LATEST
        if before.ending is not None:
            assert after.ending == before.ending
        if before.closed_at is not None:
            assert after is before
        if _repeats(command):
            assert_repetition_is_nothing(self.stream, command)

    @invariant()
    def history_is_the_state(self) -> None:
        history = self.stream.history
        half = len(history) // 2
        assert fold(history) == self.stream.sandbox
        assert fold(history[half:], fold(history[:half])) == self.stream.sandbox
        assert status_of(self.stream.sandbox).reason
        assert_deadlines(self.stream)
        sandbox = self.stream.sandbox
        assert sandbox.waiting is None or sandbox.phase is Phase.PENDING or sandbox.agent_trouble is not None

    @rule(holds=st.sampled_from(HELD), has_image=st.booleans(), slow=st.booleans())
    def it_would_settle(self, holds: Observed | None, has_image: bool, slow: bool) -> None:
        stream, engine = self.stream.fork(), EngineModel(holds, has_image=has_image, slow=slow)
        settle(stream, engine)
        assert_goal(stream.sandbox, engine)


AnyCourse.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyCourse = pytest.mark.timeout(120)(AnyCourse.TestCase)


# Reading: history must always read, whatever was appended by whichever version

LATER = st.one_of(*map(values, set(ev.EVENT_CLASSES) - {ev.Requested}))


@given(st.lists(st.just(requested()) | LATER, max_size=12), st.none() | st.sampled_from(list(Power)))
@settings(max_examples=400, deadline=None)
def test_the_fold_is_total_on_events_in_any_order(events: list[ev.Event], power: Power | None):
    sandbox = Stream(placed=False).sandbox
    for number, event in enumerate(events, start=2):
        at = BEGIN + timedelta(seconds=number)
        sandbox = evolve(sandbox, Recorded(number, ID, "default", number, at, event, META))
        assert status_of(sandbox, Attempt(attempts=1)).message
        assert sandbox.phase in Phase
        answer = None if power is None else Answer(seen(power))
        assert plan(sandbox, answer, Absence(at, None, GRACE)) is not None
    assert sandbox.version == len(events) + 1


def test_the_state_keeps_the_highest_schema_number_that_was_stored_whatever_this_version_would_write():
    sandbox = None
    for number, (event, schema) in enumerate(
        [(requested(), 2), (PLACED, 1), (ev.RuntimeLost(), 3), (ev.Paused(), 1)], 1
    ):
        sandbox = evolve(sandbox, Recorded(number, ID, "default", number, BEGIN, event, META, schema))
        assert sandbox.schema == (2 if number < 3 else 3)


def test_a_stream_that_does_not_begin_with_requested_cannot_be_read():
    with pytest.raises(TypeError, match=r"does not begin with sandbox\.requested"):
        evolve(None, Recorded(1, ID, "default", 1, BEGIN, ev.Paused(), META))
