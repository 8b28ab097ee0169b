"""The aggregate of an engine, by example: identity, silence, a log that went back, and which engine takes a sandbox."""

from __future__ import annotations

from copy import copy
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from app.domain.engine import events as ev
from app.domain.engine.decide import (
    Chosen,
    Command,
    NoEngine,
    RecordAgentInstalled,
    RecordLeftover,
    RecordLogWentBack,
    RecordNetwork,
    RecordSighting,
    RecordSilence,
    Sighting,
    Trust,
    agrees,
    begin,
    decide,
    place,
)
from app.domain.engine.events import LOG_WENT_BACK, MARK_ABSENT, MARK_OTHER, Capacity
from app.domain.engine.state import Engine, EngineState, evolve, fold, stream_of
from app.domain.sandbox.observed import Capabilities, Pausing
from app.domain.stream import PLATFORM_TENANT, Actor, ActorKind, Meta, Recorded
from tests.support.payload import values
from tests.support.stream import BEGIN

META = Meta(Actor(ActorKind.RECONCILER, "w1", "worker"), "test")
INSTALLATION = UUID("0198f000-0000-7000-8000-0000000000ff")
SIGHTING = Sighting(
    "default", "docker", "7TYS", "mark-1", "26.1.5", "1.45", capacity=Capacity(8 * 10**9, 2**34), labels={"zone": "a"}
)
SEEN = ev.Seen("7TYS", "26.1.5", "1.45", capacity=Capacity(8 * 10**9, 2**34))


class Stream:
    """An engine whose every event was decided and applied."""

    def __init__(self, sighting: Sighting = SIGHTING) -> None:
        self.now = BEGIN
        self.history: list[ev.Recorded] = []
        state = None
        for event in begin(sighting):
            state = evolve(state, self._record(event, sighting.name))
        assert state is not None
        self.engine: Engine = state

    def _record(self, event: ev.Event, name: str) -> ev.Recorded:
        number = len(self.history) + 1
        stream = stream_of(INSTALLATION, name)
        recorded = Recorded(number * 3, stream, PLATFORM_TENANT, number, self.now, event, META)
        self.history.append(recorded)
        return recorded

    def do(self, command: Command) -> tuple[ev.Event, ...]:
        events = decide(self.engine, command, self.now)
        for event in events:
            self.engine = evolve(self.engine, self._record(event, self.engine.name))
        return events

    def after(self, *commands: Command) -> Stream:
        for command in commands:
            assert self.do(command), f"{command} was meant to arrange something"
        return self

    def pass_time(self, seconds: float) -> Stream:
        self.now += timedelta(seconds=seconds)
        return self

    def fork(self) -> Stream:
        other = copy(self)
        other.history = list(self.history)
        return other


def sighted(**changed: Any) -> RecordSighting:
    return RecordSighting(replace(SIGHTING, **changed))


SILENCE = RecordSilence(BEGIN, "Connection refused.")
WENT_BACK = RecordLogWentBack(4711, 4800)
OTHER, ABSENT = sighted(mark="mark-2"), sighted(mark=None)


def test_at_first_contact_it_is_registered_as_it_showed_itself():
    assert begin(SIGHTING) == (
        ev.Registered("default", "docker", "mark-1", "7TYS", labels={"zone": "a"}, capacity=Capacity(8 * 10**9, 2**34)),
        SEEN,
    )
    engine = Stream().engine
    assert (engine.state, engine.epoch, engine.mark, engine.version) == (EngineState.UP, 1, "mark-1", 2)
    assert engine.id == stream_of(INSTALLATION, "default")
    assert engine.id != stream_of(INSTALLATION, "other")


def test_it_is_not_registered_before_our_mark_is_there():
    with pytest.raises(AssertionError):
        begin(replace(SIGHTING, mark=None))


def test_a_stream_that_does_not_begin_with_registered_cannot_be_read():
    with pytest.raises(TypeError, match=r"does not begin with engine\.registered"):
        fold([Recorded(1, INSTALLATION, PLATFORM_TENANT, 1, BEGIN, ev.Back(), META)])


# Identity: the engine's own id may change, our mark may not


def test_the_same_again_is_nothing_new():
    assert Stream().do(RecordSighting(SIGHTING)) == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"engine_id": "another"},
        {"version": "27.0"},
        {"api": "1.46"},
        {"capabilities": Capabilities(Pausing.NONE)},
        {"capacity": Capacity(4 * 10**9)},
    ],
)
def test_what_it_says_of_itself_may_change_and_is_recorded_once(changed: dict[str, Any]):
    stream = Stream()
    (event,) = stream.do(sighted(**changed))
    assert isinstance(event, ev.Seen)
    assert stream.engine.state is EngineState.UP
    assert stream.do(sighted(**changed)) == ()


@pytest.mark.parametrize("engine_id", ["7TYS", "another"])
@pytest.mark.parametrize(("mark", "why", "found"), [(None, MARK_ABSENT, "none"), ("mark-2", MARK_OTHER, "mark-2")])
def test_without_our_mark_it_is_another_engine_whatever_its_id(engine_id: str, mark: str | None, why: str, found: str):
    stream = Stream()
    assert agrees(stream.engine, replace(SIGHTING, engine_id=engine_id, mark=mark)) == why
    assert stream.do(sighted(engine_id=engine_id, mark=mark)) == (ev.Mismatch(why, "mark-1", found),)
    assert stream.engine.state is EngineState.MISMATCH
    assert stream.engine.engine_id == "7TYS", "a stranger tells nothing about the engine that we know"
    assert stream.do(sighted(engine_id=engine_id, mark=mark)) == ()


def test_another_kind_of_mismatch_is_told_and_the_right_mark_mends_all_of_them():
    stream = Stream().after(OTHER, ABSENT, OTHER).pass_time(61)
    assert stream.do(RecordSighting(SIGHTING)) == (ev.Back(61_000),)
    assert (stream.engine.state, stream.engine.trouble) == (EngineState.UP, "")
    assert stream.engine.state_since == stream.now


# Silence


def test_silence_is_recorded_once_and_ends_with_a_sighting():
    stream = Stream().pass_time(15)
    assert stream.do(SILENCE) == (ev.Dark(BEGIN, "Connection refused."),)
    assert stream.do(RecordSilence(BEGIN, "No route to host.")) == ()
    assert (stream.engine.state, stream.engine.state_since) == (EngineState.DARK, stream.now)
    assert stream.pass_time(2.5).do(RecordSighting(SIGHTING)) == (ev.Back(2500),)
    assert stream.do(RecordSighting(SIGHTING)) == ()


def test_an_engine_that_comes_back_upgraded_says_both():
    back = Stream().after(SILENCE).do(sighted(version="27.0", engine_id="another"))
    assert [type(event) for event in back] == [ev.Back, ev.Seen]


def test_what_comes_back_in_its_place_is_compared_first():
    stream = Stream().after(SILENCE)
    assert stream.do(OTHER) == (ev.Mismatch(MARK_OTHER, "mark-1", "mark-2"),)
    assert stream.do(SILENCE) == ()


def test_a_clock_that_was_set_back_makes_no_negative_duration():
    assert Stream().after(SILENCE).pass_time(-60).do(RecordSighting(SIGHTING)) == (ev.Back(0),)


# A log that went back


def test_a_log_that_went_back_is_not_mended_by_the_right_mark():
    stream = Stream()
    expected = ev.Mismatch(LOG_WENT_BACK, "at most position 4711", "position 4800")
    assert stream.do(WENT_BACK) == (expected,)
    assert stream.do(RecordLogWentBack(4712, 4801)) == ()
    assert stream.do(RecordSighting(SIGHTING)) == ()
    assert stream.engine.state is EngineState.MISMATCH
    assert stream.engine.trouble == "LOG_WENT_BACK: expected at most position 4711, found position 4800"


def test_what_it_says_of_itself_is_recorded_meanwhile():
    stream = Stream().after(WENT_BACK)
    (event,) = stream.do(sighted(version="27.0"))
    assert isinstance(event, ev.Seen)
    assert stream.engine.state is EngineState.MISMATCH


def test_an_operator_trusts_the_log_once_and_the_same_object_raises_no_second_alarm():
    stream = Stream().after(WENT_BACK).pass_time(60)
    assert stream.do(Trust()) == (ev.Back(60_000),)
    assert (stream.engine.state, stream.engine.trusted_position) == (EngineState.UP, 4800)
    assert stream.do(Trust()) == ()
    assert stream.do(WENT_BACK) == ()
    assert stream.do(RecordLogWentBack(4712, 4801)) == (
        ev.Mismatch(LOG_WENT_BACK, "at most position 4712", "position 4801"),
    )


def test_a_position_that_the_log_has_is_no_sign():
    assert Stream().do(RecordLogWentBack(4800, 4800)) == ()


@pytest.mark.parametrize("command", [SILENCE, OTHER, ABSENT])
def test_trust_is_for_a_log_that_went_back_only(command: Command):
    stream = Stream().after(command)
    assert stream.do(Trust()) == ()
    assert Stream().do(Trust()) == ()
    assert stream.engine.state is not EngineState.UP


def test_another_engine_hides_that_the_log_went_back_and_the_next_sweep_finds_it_again():
    stream = Stream().after(WENT_BACK, OTHER, RecordSighting(SIGHTING))
    assert (stream.engine.state, stream.engine.trusted_position) == (EngineState.UP, 0)
    assert stream.do(WENT_BACK) != ()


# Leftovers, and texts of an engine


def test_each_leftover_that_was_removed_is_told():
    stream = Stream()
    leftover = RecordLeftover("egress", "sandbox-egress-1", INSTALLATION, 4711)
    told = (ev.LeftoverRemoved("egress", "sandbox-egress-1", INSTALLATION, 4711),)
    assert stream.do(leftover) == told
    assert stream.do(leftover) == told


def test_whatever_an_engine_says_can_be_stored_and_is_compared_as_it_was_stored():
    odd = "a\0\x1b[2J\ud800" + "x" * 10_000
    strange = replace(SIGHTING, engine_id=odd, version=odd, api=odd)
    stream = Stream(strange)
    assert stream.do(RecordSighting(strange)) == ()
    stream.after(RecordLeftover("main", odd), RecordSilence(BEGIN, odd), sighted(mark=odd))
    for recorded in stream.history:
        stored = bytes(ev.REGISTRY.encode(recorded.event).data)
        assert b"\\u0000" not in stored
        assert len(stored) < 20_000


# Laws

COMMANDS: list[Command] = [
    RecordSighting(SIGHTING),
    sighted(version="27.0"),
    OTHER,
    ABSENT,
    SILENCE,
    WENT_BACK,
    RecordLogWentBack(4711, 4900),
    Trust(),
]


@given(st.lists(st.sampled_from(COMMANDS), max_size=8))
@settings(deadline=None)
def test_no_command_counts_twice_and_history_is_the_state(commands: list[Command]):
    stream = Stream()
    for command in commands:
        stream.pass_time(1).do(command)
        assert stream.fork().do(command) == ()
    assert fold(stream.history) == stream.engine
    half = len(stream.history) // 2
    assert fold(stream.history[half:], fold(stream.history[:half])) == stream.engine
    assert (stream.engine.state is EngineState.UP) == (stream.engine.trouble == "")


@given(st.lists(st.one_of(*map(values, ev.EVENT_CLASSES)), max_size=10))
@settings(max_examples=200, deadline=None)
def test_the_fold_is_total_on_events_in_any_order(events: list[ev.Event]):
    engine = Stream().engine
    for number, event in enumerate(events, start=3):
        engine = evolve(engine, Recorded(number, engine.id, PLATFORM_TENANT, number, BEGIN, event, META))
        assert decide(engine, RecordSighting(SIGHTING), BEGIN) is not None
    assert engine.version == len(events) + 2


# Which engine takes a sandbox


def named(name: str, *commands: Command) -> Engine:
    return Stream(replace(SIGHTING, name=name)).after(*commands).engine


def test_the_only_engine_takes_it():
    assert place([named("default")]) == Chosen("default", 1, "ONLY_ENGINE", 1)


def test_the_first_of_those_that_are_up_takes_it():
    engines = [named("c"), named("b"), named("a", SILENCE)]
    assert place(engines) == Chosen("b", 1, "FIRST_BY_NAME", 2)
    assert place([named("b"), named("a", OTHER)]) == Chosen("b", 1, "FIRST_BY_NAME", 1)


def test_when_none_can_take_it_each_says_why():
    found = place([named("a", SILENCE), named("b", OTHER)])
    assert found == NoEngine(
        "ENGINE_UNAVAILABLE",
        "No engine can take it: a is dark (Connection refused); b is mismatch (MARK_OTHER: expected mark-1, found "
        "mark-2).",
    )


def test_before_the_first_contact_there_is_none():
    found = place([])
    assert isinstance(found, NoEngine)
    assert found.reason == "ENGINE_UNAVAILABLE"
    assert "a worker registers one when it reaches it" in found.message


def test_an_instant_of_a_sighting_plays_no_part():
    early, late = (decide(Stream().engine, OTHER, at) for at in (BEGIN, datetime.max.replace(tzinfo=BEGIN.tzinfo)))
    assert early == late


# Agents that were installed there

IMAGE = "sha256:" + "ab" * 32
COPY = RecordAgentInstalled(IMAGE, ("execd", "bootstrap.sh"), 42, "helper-1")


def test_one_copy_is_recorded_once_whoever_reports_it():
    stream = Stream()
    assert stream.do(COPY) == (ev.AgentInstalled(IMAGE, ("execd", "bootstrap.sh"), 42, "helper-1"),)
    assert stream.do(COPY) == ()
    assert stream.engine.agents == {IMAGE: "helper-1"}
    assert stream.do(replace(COPY, helper="helper-2")) != (), "another copy"
    assert stream.do(replace(COPY, image_id="sha256:" + "cd" * 32)) != (), "another image"


def test_an_agent_that_was_removed_is_forgotten():
    stream = Stream()
    stream.do(COPY)
    stream.do(RecordLeftover("egress", f"sandbox-egress-{IMAGE[7:19]}"))
    assert stream.engine.agents == {IMAGE: "helper-1"}
    stream.do(RecordLeftover("agent", f"sandledger-agent-01234567-{IMAGE[7:19]}"))
    assert stream.engine.agents == {}
    assert stream.do(COPY) != ()


# Our own network there

NETWORK = RecordNetwork("sandledger-0198f000", "10.212.0.0/18", "id-1")


def test_one_network_is_recorded_once_whoever_reports_it():
    stream = Stream()
    assert stream.do(NETWORK) == (ev.NetworkPrepared("sandledger-0198f000", "10.212.0.0/18", "id-1"),)
    assert stream.do(NETWORK) == ()
    assert stream.do(replace(NETWORK, network_id="id-2")) != (), "it was made again"
    assert stream.engine.network == ev.NetworkPrepared("sandledger-0198f000", "10.212.0.0/18", "id-2")
