"""The one next step of the reconciler, by example."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Answer, Observed, Part, Power, Waiting
from app.domain.sandbox.plan import (
    STEP_NAMES,
    WAIT_INTERVAL,
    Absence,
    ConfirmMissing,
    Ensure,
    Lose,
    Observe,
    Place,
    Remove,
    SetPower,
    Settled,
    Step,
    Wait,
    plan,
)
from app.domain.sandbox.state import Phase
from tests.support.stream import BEGIN, SECOND, Stream, in_phase, seen

ABSENT: Any = "absent"
WAITING = Waiting("ensure", "POD_UNSCHEDULABLE")
UNSCHEDULED = seen(Power.CREATED, waiting=WAITING)
ONLY_EGRESS = replace(seen(Power.RUNNING), parts=(Part("egress", "e1", "sandbox-egress"),))


def next_step(stream: Stream, shown: Observed | None, absence: Absence | None = None) -> Step:
    answer = None if shown is None else Answer(None if shown is ABSENT else shown)
    return plan(stream.sandbox, answer, absence or Absence(stream.now, None, 5 * SECOND))


def _closed() -> Stream:
    return in_phase(Phase.STOPPING).after(cmd.RecordRemoved())


def _removed() -> Stream:
    return in_phase(Phase.FAILED).after(cmd.RecordRemoved())


def _unplaced(*commands: cmd.Command) -> Stream:
    return Stream(placed=False).after(*commands)


@pytest.mark.parametrize(
    ("stream", "shown", "step"),
    [
        (_unplaced(), None, Place()),
        (_unplaced(cmd.RecordFailure("place", "SPEC_REJECTED", "no")), None, Settled()),
        (_unplaced(cmd.Terminate()), None, Settled()),
        (Stream(), None, Ensure()),
        (Stream(), ABSENT, Ensure()),
        (Stream().observe(Power.CREATED), seen(Power.CREATED), Ensure()),
        (Stream().observe(Power.CREATED), UNSCHEDULED, Wait(BEGIN + WAIT_INTERVAL, WAITING)),
        (in_phase(Phase.RUNNING), None, Observe()),
        (in_phase(Phase.RUNNING), seen(Power.RUNNING), Settled()),
        (in_phase(Phase.RUNNING), seen(Power.CREATED), Ensure()),
        (in_phase(Phase.RUNNING), UNSCHEDULED, Wait(BEGIN + WAIT_INTERVAL, WAITING)),
        (in_phase(Phase.RUNNING), ABSENT, ConfirmMissing(BEGIN + 5 * SECOND)),
        (in_phase(Phase.RUNNING), ONLY_EGRESS, ConfirmMissing(BEGIN + 5 * SECOND)),
        (in_phase(Phase.RUNNING).observe(Power.PAUSED), seen(Power.PAUSED), SetPower(Power.RUNNING)),
        (in_phase(Phase.PAUSED).observe(Power.RUNNING), seen(Power.RUNNING), SetPower(Power.PAUSED)),
        (in_phase(Phase.RUNNING).observe(Power.CREATED, "r2"), seen(Power.CREATED, "r2"), Remove()),
        (in_phase(Phase.PAUSING), None, SetPower(Power.PAUSED)),
        (in_phase(Phase.PAUSED), seen(Power.PAUSED), Settled()),
        (in_phase(Phase.RESUMING), None, SetPower(Power.RUNNING)),
        (in_phase(Phase.TERMINATED), None, Observe()),
        (in_phase(Phase.TERMINATED), seen(Power.EXITED), Settled()),
        (in_phase(Phase.TERMINATED), seen(Power.RUNNING), Remove()),
        (in_phase(Phase.FAILED), None, Remove()),
        (in_phase(Phase.STOPPING), None, Remove()),
        (_removed(), None, Observe()),
        (_removed(), ABSENT, Settled()),
        (_removed(), seen(Power.CREATED, "late"), Remove()),
        (_closed(), None, Observe()),
        (_closed(), ABSENT, Settled()),
        (_closed(), seen(Power.RUNNING, "late"), Remove()),
    ],
)
def test_the_next_step(stream: Stream, shown: Observed | None, step: Step):
    assert next_step(stream, shown) == step


def test_an_absence_is_believed_when_it_has_lasted():
    stream = in_phase(Phase.RUNNING)
    soon = Absence(BEGIN + 4 * SECOND, BEGIN, 5 * SECOND)
    assert next_step(stream, ABSENT, soon) == ConfirmMissing(BEGIN + 5 * SECOND)
    later = Absence(BEGIN + 5 * SECOND, BEGIN, 5 * SECOND)
    assert next_step(stream, ABSENT, later) == Lose(BEGIN)


def test_after_a_refused_pause_nothing_is_tried_again():
    refused = cmd.RecordPowerRefused("REFUSED", "no")
    assert next_step(in_phase(Phase.PAUSING).after(refused), seen(Power.RUNNING)) == Settled()
    assert next_step(in_phase(Phase.RESUMING).after(refused), seen(Power.PAUSED)) == Settled()


def test_the_words_of_the_steps_are_those_of_the_catalogue():
    assert sorted(STEP_NAMES.values()) == [
        "ensure",
        "fetch",
        "install_agent",
        "observe",
        "place",
        "probe",
        "remove",
        "set_power",
    ]
