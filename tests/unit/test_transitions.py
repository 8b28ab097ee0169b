"""The declared table against every state that can be reached."""

from __future__ import annotations

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox import transitions
from app.domain.sandbox.state import Phase, RuntimeState
from app.errors import IllegalTransition
from tests.support.moves import PHASE_MOVES
from tests.support.reachable import walk
from tests.support.stream import BEGIN, Stream, in_phase, requested


@pytest.mark.proof
def test_the_walk_is_not_trivial():
    states, _, _ = walk()
    assert len(states) > 500
    assert {stream.sandbox.phase for stream in states} == set(Phase)
    assert {stream.sandbox.observed for stream in states} == set(RuntimeState)
    assert {stream.sandbox.object_id is None for stream in states} == {True, False}


@pytest.mark.proof
def test_declared_moves_are_the_reachable_ones():
    _, moves, _ = walk()
    assert moves == set(PHASE_MOVES)


@pytest.mark.proof
def test_declared_events_are_the_reachable_ones():
    _, _, appended = walk()
    declared = {(event, phase) for event, phases in transitions.ALLOWED.items() for phase in phases}
    assert appended == declared


def test_every_event_but_the_first_stands_in_the_table():
    assert set(transitions.ALLOWED) == set(ev.EVENT_CLASSES) - {ev.Requested}


def test_an_event_outside_the_table_is_refused_with_names():
    with pytest.raises(IllegalTransition, match=r"sandbox.overdue cannot follow in phase Pending"):
        transitions.check(Stream().sandbox, ev.Overdue("Pending", BEGIN))


def test_a_second_beginning_is_refused():
    with pytest.raises(IllegalTransition):
        transitions.check(Stream().sandbox, requested())


def test_nothing_follows_the_end():
    closed = in_phase(Phase.STOPPING).after(cmd.RecordRemoved()).sandbox
    assert closed.closed_at is not None
    for event in (
        ev.RuntimeRemoved(),
        ev.Failed("ensure", "x", "y"),
        ev.Overdue("Stopping", BEGIN),
        ev.Terminated(ev.EndCause.EXPIRED, 1),
    ):
        with pytest.raises(IllegalTransition):
            transitions.check(closed, event)
