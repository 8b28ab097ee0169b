"""What an append does to the deadlines of a sandbox, and what the deadline of a transitional phase leads to, by example.

The laws for all states stand in `test_core_laws`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from uuid import UUID

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import EXPIRY, TRANSITION, Due, Limits, changes, longest
from app.domain.sandbox.observed import Exit, Power
from app.domain.sandbox.state import Desired, Phase
from tests.support.stream import BEGIN, LIMITS, PLACED, SECOND, Stream, in_phase, requested, seen

SNAPSHOT = UUID(int=9)
HOUR = timedelta(hours=1)
CREATED, RUNNING, PAUSED = (cmd.RecordSeen(seen(power)) for power in (Power.CREATED, Power.RUNNING, Power.PAUSED))
EXITED = cmd.RecordSeen(seen(Power.EXITED, end=Exit(0)))


def of(stream: Stream, command: cmd.Command) -> Mapping[str, Due | None]:
    before = stream.sandbox
    events = stream.do(command)
    assert events
    return changes(before, stream.sandbox, events, stream.now, LIMITS)


def test_a_request_sets_the_end_of_its_life_and_of_its_waiting():
    for placed in (True, False):
        events = (requested(600), *([PLACED] if placed else []))
        sandbox = Stream(requested(600), placed=placed).sandbox
        found = changes(None, sandbox, events, BEGIN, LIMITS)
        assert found == {EXPIRY: Due(after_s=600), TRANSITION: Due(after_s=900)}
    forever = changes(None, Stream(requested(None)).sandbox, (requested(None), PLACED), BEGIN, LIMITS)
    assert forever == {TRANSITION: Due(after_s=900)}


@pytest.mark.parametrize(
    ("phase", "command", "found"),
    [
        (Phase.PENDING, CREATED, {}),
        (Phase.PENDING, RUNNING, {TRANSITION: None}),
        (Phase.PENDING, PAUSED, {TRANSITION: Due(after_s=60)}),
        (Phase.PENDING, EXITED, {TRANSITION: None}),
        (Phase.PENDING, cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "no"), {TRANSITION: None}),
        (Phase.PENDING, cmd.RecordWaiting("fetch", "IMAGE_PULLING"), {}),
        (Phase.PENDING, cmd.Terminate(), {EXPIRY: None, TRANSITION: Due(after_s=60)}),
        (Phase.PENDING, cmd.Renew(BEGIN + HOUR), {EXPIRY: Due(at=BEGIN + HOUR)}),
        (Phase.RUNNING, cmd.Pause(), {TRANSITION: Due(after_s=60)}),
        (Phase.RUNNING, cmd.PatchMetadata({"a": "b"}), {}),
        (Phase.RUNNING, cmd.Renew(BEGIN + HOUR), {EXPIRY: Due(at=BEGIN + HOUR)}),
        (Phase.RUNNING, cmd.RecordLost(BEGIN), {}),
        (Phase.RUNNING, cmd.Terminate(), {EXPIRY: None, TRANSITION: Due(after_s=60)}),
        (Phase.PAUSING, PAUSED, {TRANSITION: None}),
        (Phase.PAUSING, cmd.RecordPowerRefused("REFUSED", "no"), {TRANSITION: None}),
        (Phase.PAUSING, EXITED, {TRANSITION: None}),
        (Phase.PAUSED, cmd.Resume(), {TRANSITION: Due(after_s=60)}),
        (Phase.PAUSED, RUNNING, {TRANSITION: Due(after_s=60)}),
        (Phase.RESUMING, RUNNING, {TRANSITION: None}),
        (Phase.RESUMING, cmd.RecordPowerRefused("REFUSED", "no"), {TRANSITION: None}),
        (Phase.TERMINATED, cmd.Terminate(), {EXPIRY: None, TRANSITION: Due(after_s=60)}),
        (Phase.TERMINATED, cmd.RecordRemoved(), {}),
        (Phase.FAILED, cmd.Renew(BEGIN + HOUR), {EXPIRY: Due(at=BEGIN + HOUR)}),
        (Phase.STOPPING, cmd.RecordRemoved(), {TRANSITION: None}),
        (Phase.STOPPING, cmd.RecordRetry("remove", "E", "m", 1), {}),
    ],
)
def test_the_difference_of_one_append(phase: Phase, command: cmd.Command, found: dict[str, Due | None]):
    assert of(in_phase(phase), command) == found


def test_an_end_without_an_expiry_takes_none_away():
    assert of(Stream(requested(None)), cmd.Terminate()) == {TRANSITION: Due(after_s=60)}


def test_an_end_that_closes_at_once_leaves_no_deadline():
    assert of(Stream(placed=False), cmd.Terminate()) == {EXPIRY: None, TRANSITION: None}
    removed = in_phase(Phase.FAILED).after(cmd.RecordRemoved())
    assert of(removed, cmd.Terminate()) == {EXPIRY: None}


def test_a_report_sets_the_next_one_counted_from_the_beginning_of_the_phase():
    stream = in_phase(Phase.STOPPING).pass_time(60)
    assert of(stream, cmd.EndTransition()) == {TRANSITION: Due(after_s=120)}
    late = in_phase(Phase.STOPPING).pass_time(100)
    assert of(late, cmd.EndTransition()) == {TRANSITION: Due(after_s=80)}


def test_a_restart_from_outside_while_pausing_begins_the_phase_anew_and_keeps_its_end():
    stream = Stream().observe(Power.RUNNING, started_at=BEGIN).after(cmd.Pause()).pass_time(50)
    restarted = cmd.RecordSeen(seen(Power.RUNNING, started_at=BEGIN + 49 * SECOND))
    assert of(stream, restarted) == {TRANSITION: Due(after_s=60)}
    assert stream.sandbox.phase is Phase.PAUSING
    # With the first deadline alone, it would fire too early, do nothing and be gone.
    (event,) = stream.to_deadline(TRANSITION).do(cmd.EndTransition())
    assert isinstance(event, ev.PauseFailed)


@pytest.mark.parametrize(
    ("elapsed", "times", "next_in"),
    [
        *[(0, 0, 60), (59.9, 0, 0.1), (60, 1, 120), (179, 1, 1), (180, 2, 240), (420, 3, 480), (900, 4, 960)],
        *[(1860, 5, 1920), (3780, 6, 3600), (7380, 7, 3600), (10_980, 8, 3600)],
    ],
)
def test_reports_double_up_to_an_hour(elapsed: float, times: int, next_in: float):
    assert LIMITS.report(elapsed) == (times, pytest.approx(next_in))


def test_the_operators_limits_are_those_of_the_phases():
    limits = Limits(1, 2, 3, 4)
    assert {phase: limits.of(phase) for phase in Phase if limits.of(phase)} == {
        Phase.PENDING: 1,
        Phase.PAUSING: 2,
        Phase.RESUMING: 3,
        Phase.STOPPING: 4,
    }


# When the deadline of a transitional phase fires


PLAIN = cmd.EndTransition()


def fired(stream: Stream, command: cmd.EndTransition = PLAIN) -> ev.Event:
    """The one event of the deadline, which must do nothing a moment before it is due."""
    early = stream.fork().to_deadline(TRANSITION)
    early.now -= timedelta(microseconds=1)
    assert early.do(command) == ()
    (event,) = stream.to_deadline(TRANSITION).do(command)
    return event


@pytest.mark.parametrize(
    ("stream", "command", "step", "message"),
    [
        (Stream(placed=False), PLAIN, "place", "The sandbox was not running within 900 s."),
        (Stream(), PLAIN, "ensure", "The sandbox was not running within 900 s."),
        (
            Stream().after(cmd.RecordWaiting("fetch", "IMAGE_PULLING", "3 of 7 layers.")),
            PLAIN,
            "fetch",
            "The sandbox was not running within 900 s; it waited in step fetch for IMAGE_PULLING (3 of 7 layers).",
        ),
        (
            Stream(placed=False).after(cmd.RecordWaiting("place", "NO_CAPACITY")),
            cmd.EndTransition(last_reason="RUNTIME_UNAVAILABLE", last_error="Connection refused."),
            "place",
            (
                "The sandbox was not running within 900 s; it waited in step place for NO_CAPACITY; the last attempt failed "
                "with RUNTIME_UNAVAILABLE (Connection refused)."
            ),
        ),
        (
            Stream().after(cmd.RecordRetry("ensure", "START_FAILED", "no more disk", 1)),
            cmd.EndTransition(last_reason="START_FAILED", last_error="no more disk, again"),
            "ensure",
            "The sandbox was not running within 900 s; it waited in step ensure for START_FAILED (no more disk).",
        ),
        (
            Stream().observe(Power.CREATED),
            cmd.EndTransition(last_error="an error without a word"),
            "ensure",
            "The sandbox was not running within 900 s; the last attempt failed with an error (an error without a word).",
        ),
    ],
)
def test_what_stays_pending_fails_and_the_message_names_what_it_waited_for(
    stream: Stream, command: cmd.EndTransition, step: str, message: str
):
    stream = stream.fork()
    assert fired(stream, command) == ev.Failed(step, "PROVISIONING_TIMEOUT", message)
    assert stream.sandbox.phase is Phase.FAILED


def test_a_pause_that_does_not_come_is_given_up_and_the_sandbox_goes_on_running():
    stream = in_phase(Phase.PAUSING)
    command = cmd.EndTransition(last_reason="RUNTIME_UNAVAILABLE", last_error="no answer")
    assert fired(stream, command) == ev.PauseFailed(
        "PAUSE_TIMEOUT",
        "The pause took longer than 60 s; the last attempt failed with RUNTIME_UNAVAILABLE (no answer).",
    )
    assert (stream.sandbox.phase, stream.sandbox.desired) == (Phase.RUNNING, Desired.RUNNING)
    assert stream.sandbox.may_run
    assert TRANSITION not in stream.deadlines


def test_a_resume_that_does_not_come_is_given_up_and_the_sandbox_stays_paused():
    stream = in_phase(Phase.RESUMING)
    assert fired(stream) == ev.ResumeFailed("RESUME_TIMEOUT", "The resume took longer than 60 s.")
    assert (stream.sandbox.phase, stream.sandbox.desired) == (Phase.PAUSED, Desired.PAUSED)
    assert TRANSITION not in stream.deadlines


def test_a_removal_that_does_not_come_is_reported_ever_less_often_and_never_given_up():
    stream = in_phase(Phase.STOPPING)
    since = stream.now
    waits: list[float] = []
    early = stream.fork().to_deadline(TRANSITION).pass_time(-0.000001)
    assert early.do(cmd.EndTransition()) == ()
    for times in range(1, 11):
        before = stream.now
        report = stream.to_deadline(TRANSITION).do(cmd.EndTransition())
        assert report == (ev.Overdue("Stopping", since, times),)
        waits.append((stream.now - before).total_seconds())
        assert stream.sandbox.phase is Phase.STOPPING
    assert waits == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600, 3600]
    assert stream.after(cmd.RecordRemoved()).deadlines == {}


def test_a_report_that_comes_late_counts_those_that_were_missed():
    stream = in_phase(Phase.STOPPING).pass_time(500)
    assert stream.do(cmd.EndTransition()) == (ev.Overdue("Stopping", BEGIN, 3),)
    assert stream.deadlines[TRANSITION] == BEGIN + 900 * SECOND


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.PAUSED, Phase.TERMINATED, Phase.FAILED])
def test_a_phase_that_may_last_has_no_end_of_its_own(phase: Phase):
    stream = in_phase(phase)
    assert TRANSITION not in stream.deadlines
    assert stream.pass_time(10**6).do(cmd.EndTransition()) == ()


def test_the_operators_limits_hold():
    stream = in_phase(Phase.PAUSING).pass_time(60)
    assert stream.do(cmd.EndTransition(Limits(pausing_s=61))) == ()
    (event,) = stream.pass_time(1).do(cmd.EndTransition(Limits(pausing_s=61)))
    assert isinstance(event, ev.PauseFailed)
    assert "longer than 61 s" in event.message


def test_a_resume_has_its_time_after_the_end_of_a_freeze():
    stream = in_phase(Phase.RUNNING)
    stream.do(cmd.Freeze(SNAPSHOT))
    stream.do(cmd.Pause())
    stream.do(PAUSED)
    stream.now += SECOND
    stream.do(cmd.Resume())
    sandbox = stream.sandbox
    assert sandbox.phase is Phase.RESUMING
    assert sandbox.freeze_at is not None
    whole = longest(sandbox, LIMITS)
    assert whole is not None
    assert sandbox.changed_at + timedelta(seconds=whole) == sandbox.freeze_at + timedelta(
        seconds=LIMITS.freeze_s + LIMITS.resuming_s
    )
    assert stream.deadlines[TRANSITION] == sandbox.changed_at + timedelta(seconds=whole)
    stream.now = sandbox.changed_at + timedelta(seconds=LIMITS.resuming_s)
    assert not stream.do(cmd.EndTransition(LIMITS)), "the snapshot holds it still, and its own deadline ends that"
    stream.now = sandbox.changed_at + timedelta(seconds=whole)
    (failed,) = stream.do(cmd.EndTransition(LIMITS))
    assert isinstance(failed, ev.ResumeFailed)
    late = Limits(freeze_s=0)
    assert longest(sandbox, late) == late.resuming_s
