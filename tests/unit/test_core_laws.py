"""The laws of the core: what holds for every sequence of commands, from every state, with every engine behind it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from enum import Enum
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec import Struct

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.decide import LATEST, Events, decide
from app.domain.sandbox.observed import Exit, Look, Observed, Power
from app.domain.sandbox.plan import Absence, ConfirmMissing, Ensure, Lose, Observe, Remove, SetPower, Settled, plan
from app.domain.sandbox.state import Desired, RuntimeState, Sandbox, fold
from app.errors import Rejected
from tests.support.reachable import COMMANDS, walk
from tests.support.stream import BEGIN, ID, Stream, requested, seen

MOST_STEPS = 4
GRACE = timedelta(seconds=5)


class Killed(Exception):
    """The worker died between acting and recording."""


class EngineModel:
    """The smallest engine that keeps the promises of `app.runtime.driver`: at most one object, adopted by name."""

    def __init__(self, holds: Observed | None) -> None:
        self.holds = holds

    def ensure(self) -> Observed:
        if self.holds is None:
            self.holds = seen(Power.RUNNING, "made")
        else:
            started = self.holds.power is Power.CREATED
            power = Power.RUNNING if started else self.holds.power
            self.holds = msgspec.structs.replace(self.holds, power=power, adopted=True)
        return self.holds

    def set_power(self, power: Power) -> Observed | None:
        if self.holds is not None and self.holds.power in (Power.RUNNING, Power.PAUSED):
            self.holds = msgspec.structs.replace(self.holds, power=power)
        return self.holds


def settle(stream: Stream, engine: EngineModel, *, killed_after: int | None = None) -> int:
    """What the reconciler does, without the waiting. Says how many steps it took; dies after the given act."""
    look: Look | None = None
    missing_since: datetime | None = None
    for number in range(MOST_STEPS + 1):
        step = plan(stream.box, look, Absence(stream.now, missing_since, GRACE))
        fact: cmd.Command | None = None
        match step:
            case Settled():
                return number
            case Observe():
                look = Look(engine.holds)
            case Ensure():
                look = Look(engine.ensure())
            case SetPower(power=power):
                look = Look(engine.set_power(power))
            case Remove():
                engine.holds = None
                look, fact = Look(None), cmd.RecordRemoved()
            case ConfirmMissing(until=until):
                missing_since = missing_since or stream.now
                stream.now, look = until, None
            case Lose(missing_since=since):
                fact = cmd.RecordLost(since)
        if number == killed_after:
            raise Killed
        if look is not None and look.observed is not None:
            fact = cmd.RecordSeen(look.observed)
        if fact is not None:
            stream.do(fact)
    raise AssertionError(f"no goal after {MOST_STEPS} steps: {stream.box.phase}, {stream.box.observed}, {engine.holds}")


def assert_goal(box: Sandbox, engine: EngineModel) -> None:
    """What is wanted is so, and the log says what the engine says."""
    there = None if engine.holds is None else engine.holds.power
    if box.desired is Desired.TERMINATED:
        assert box.closed_at is not None
        assert there is None
    elif box.failure is not None or box.observed is RuntimeState.REMOVED:
        assert box.observed is RuntimeState.REMOVED
        assert there is None
    elif box.observed is RuntimeState.LOST:
        assert there is None
    elif box.observed is RuntimeState.EXITED:
        assert there in (None, Power.CREATED, Power.EXITED)
    else:
        assert box.observed.value == box.desired.value
        assert there is not None
        assert there.value == box.desired.value
        assert box.runtime is not None
        assert engine.holds is not None
        assert box.runtime.id == engine.holds.runtime_id


ENGINES: list[Observed | None] = [
    None,
    *(seen(power, runtime_id) for power in Power for runtime_id in ("r1", "r2")),
    seen(Power.EXITED, end=Exit(0)),
]


def test_from_every_state_and_every_engine_the_goal_is_reached():
    most = 0
    for state in walk()[0]:
        for holds in ENGINES:
            stream, engine = state.fork(), EngineModel(holds)
            most = max(most, settle(stream, engine))
            assert_goal(stream.box, engine)
    assert most == MOST_STEPS, "the bound is not what it could be"


def test_a_kill_after_any_act_changes_nothing_about_the_goal():
    kills = 0
    for state in walk()[0]:
        for holds in ENGINES:
            for act in range(MOST_STEPS):
                stream, engine = state.fork(), EngineModel(holds)
                try:
                    settle(stream, engine, killed_after=act)
                except Killed:
                    kills += 1
                else:
                    break
                settle(stream, engine)
                assert_goal(stream.box, engine)
    assert kills > len(walk()[0])


def _repeats(command: cmd.Command) -> bool:
    """A failed try is a fact of its own each time; whoever reports them thins them."""
    return not isinstance(command, cmd.RecordRetry)


def answer(stream: Stream, command: cmd.Command) -> Events | int:
    """The events, or the status of the refusal."""
    try:
        return decide(stream.box, command, stream.now)
    except Rejected as refusal:
        return refusal.status


def assert_repetition_is_nothing(stream: Stream, command: cmd.Command) -> None:
    """The second time nothing is new, or the contract has a word for it."""
    assert answer(stream, command) in ((), 404, 409), command


def test_no_command_counts_twice_in_any_state():
    for state in walk()[0]:
        for command in filter(_repeats, COMMANDS):
            stream = state.fork()
            try:
                stream.do(command)
            except Rejected:
                continue
            assert_repetition_is_nothing(stream, command)


def test_closed_is_final():
    closed = [state for state in walk()[0] if state.box.closed_at is not None]
    assert len(closed) > 5
    for state in closed:
        for command in COMMANDS:
            assert answer(state, command) in ((), 404)


def test_facts_are_decided_on_the_state_alone_whatever_the_time():
    facts = [command for command in COMMANDS if type(command).__name__.startswith("Record")]
    for state in walk()[0]:
        for fact in facts:
            assert decide(state.box, fact, state.now) == decide(state.box, fact, BEGIN - timedelta(days=9999))


# Values: random names, texts, times and numbers, where the walk above had a few fixed ones.

instants = st.datetimes(
    datetime.fromisoformat("2000-01-01"), datetime.fromisoformat("9998-01-01"), timezones=st.just(UTC)
)
texts = st.text(max_size=20)
labels = st.from_regex(r"[a-z]([a-z0-9]{0,5})", fullmatch=True)
exits = st.builds(Exit, st.integers(-1, 255), st.booleans(), texts, st.none() | instants)
looks = st.builds(
    Observed,
    st.just(ID),
    st.sampled_from(["r1", "r2", "r3"]),
    labels,
    st.sampled_from(Power),
    generation=st.integers(1, 3),
    image_digest=st.none() | labels,
    created_at=st.none() | instants,
    started_at=st.none() | instants,
    exit=st.none() | exits,
    adopted=st.booleans(),
)
far = st.datetimes(
    datetime.fromisoformat("2026-01-01"), datetime.fromisoformat("9999-12-31T23:59:59"), timezones=st.just(UTC)
)
near = st.integers(-10, 2000)
commands = st.one_of(
    st.builds(cmd.Renew, far, st.none() | st.integers(60, 10**9)),
    st.builds(cmd.PatchMetadata, st.dictionaries(labels | texts, st.none() | labels | texts, max_size=4), st.integers(1, 6)),
    st.builds(cmd.Pause),
    st.builds(cmd.Resume),
    st.builds(cmd.Terminate),
    st.builds(cmd.Expire),
    st.builds(cmd.RecordSeen, looks, st.sampled_from(["ensure", "resync", "observe"])),
    st.builds(cmd.RecordLost, instants),
    st.builds(cmd.RecordRemoved),
    st.builds(cmd.RecordFailure, labels, texts),
    st.builds(cmd.RecordRetry, labels, labels, texts, st.integers(1, 20)),
)  # fmt: skip


class AnyCourse(RuleBasedStateMachine):
    """A sandbox that is asked and told anything, in any order, while time passes."""

    @initialize(timeout_s=st.none() | st.integers(60, 10_000), metadata=st.dictionaries(labels, labels, max_size=3))
    def begin(self, timeout_s: int | None, metadata: dict[str, str]) -> None:
        self.stream = Stream(requested(timeout_s, metadata))

    @rule(seconds=st.integers(0, 900))
    def time_passes(self, seconds: int) -> None:
        self.stream.pass_time(seconds)

    @rule(seconds=near, limit=st.none() | st.integers(60, 3600))
    def renewed_nearby(self, seconds: int, limit: int | None) -> None:
        self.told(cmd.Renew(self.stream.now + timedelta(seconds=seconds), limit))

    @rule(command=commands)
    def told(self, command: cmd.Command) -> None:
        before = self.stream.box
        try:
            events = self.stream.do(command)
        except Rejected:
            assert self.stream.box is before
            return
        after = self.stream.box
        assert after.version == before.version + len(events)
        if after.expires_at != before.expires_at:
            assert any(isinstance(event, ev.LeaseRenewed) for event in events)
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
        facts = self.stream.facts
        half = len(facts) // 2
        assert fold(facts) == self.stream.box
        assert fold(facts[half:], fold(facts[:half])) == self.stream.box
        assert self.stream.box.status.reason

    @rule(holds=st.sampled_from(ENGINES))
    def it_would_settle(self, holds: Observed | None) -> None:
        stream, engine = self.stream.fork(), EngineModel(holds)
        settle(stream, engine)
        assert_goal(stream.box, engine)


AnyCourse.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyCourse = pytest.mark.timeout(120)(AnyCourse.TestCase)


def _values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return st.one_of(*map(_values, args))
    if origin is dict:
        return st.dictionaries(_values(args[0]), _values(args[1]), max_size=3)
    if origin is tuple:
        return st.lists(_values(args[0]), max_size=3).map(tuple)
    if issubclass(kind, Struct):
        return st.builds(kind, **{name: _values(type_) for name, type_ in get_type_hints(kind).items()})
    if issubclass(kind, Enum):
        return st.sampled_from(kind)
    simple = {
        str: texts,
        bool: st.booleans(),
        int: st.integers(-(2**53), 2**53),
        float: st.floats(allow_nan=False, allow_infinity=False),
        datetime: instants,
        type(None): st.none(),
    }
    return simple[kind]


@pytest.mark.parametrize("kind", ev.EVENT_CLASSES, ids=ev.wire_name)
def test_an_event_reads_back_as_it_was_written(kind: type[ev.Event]):
    @given(_values(kind))
    @settings(max_examples=40, deadline=None)
    def check(event: ev.Event) -> None:
        name = ev.wire_name(event)
        stored = json.loads(msgspec.json.encode(ev.to_payload(event)))
        assert ev.from_payload(name, ev.SCHEMA[name], stored) == event

    check()


@given(_values(ev.Meta))
@settings(deadline=None)
def test_meta_reads_back_as_it_was_written(meta: ev.Meta):
    assert ev.read_meta(json.loads(msgspec.json.encode(meta))) == meta
