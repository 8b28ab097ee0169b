"""`decide` and `plan` by example: each rule of the contract once, in the words of its outcome."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.decide import LATEST
from app.domain.sandbox.observed import Exit, Look, Power
from app.domain.sandbox.plan import Absence, Ensure, Observe, Remove, SetPower, Settled, Step, plan
from app.domain.sandbox.state import Phase, RuntimeState, Sandbox
from app.errors import Conflict, Invalid, NotFound, Rejected
from tests.support.stream import BEGIN, SECOND, Stream, in_phase, requested, seen

DEADLINE = BEGIN + timedelta(seconds=600)
VISIBLE = (
    Phase.PENDING,
    Phase.RUNNING,
    Phase.PAUSING,
    Phase.PAUSED,
    Phase.RESUMING,
    Phase.TERMINATED,
    Phase.FAILED,
)


def refused(stream: Stream, command: cmd.Command) -> Rejected:
    before = list(stream.facts)
    with pytest.raises(Rejected) as caught:
        stream.do(command)
    assert stream.facts == before
    return caught.value


# Renew


@pytest.mark.parametrize("phase", VISIBLE)
def test_renewal_moves_the_deadline_in_every_visible_phase(phase: Phase):
    later = DEADLINE + timedelta(hours=1)
    stream = in_phase(phase)
    assert stream.do(cmd.Renew(later)) == (ev.LeaseRenewed(later, DEADLINE),)
    assert stream.box.expires_at == later


def test_renewal_may_shorten():
    sooner = BEGIN + 10 * SECOND
    assert Stream().after(cmd.Renew(sooner)).box.expires_at == sooner


def test_renewal_to_the_present_deadline_is_nothing_new():
    assert Stream().do(cmd.Renew(DEADLINE)) == ()


@pytest.mark.parametrize("seconds", [0, -1, -(10**6)])
def test_renewal_into_the_past_is_invalid(seconds: int):
    refusal = refused(Stream(), cmd.Renew(BEGIN + seconds * SECOND))
    assert (type(refusal), refusal.code) == (Invalid, "DOCKER::INVALID_EXPIRATION")


def test_renewal_without_a_deadline_conflicts():
    refusal = refused(Stream(requested(timeout_s=None)), cmd.Renew(DEADLINE))
    assert (type(refusal), refusal.code) == (Conflict, "DOCKER::INVALID_EXPIRATION")


@pytest.mark.parametrize("late", [0, 0.000001, 60])
def test_renewal_at_or_after_the_deadline_is_too_late_even_before_the_timer_came(late: float):
    stream = Stream().pass_time(600 + late)
    refusal = refused(stream, cmd.Renew(DEADLINE + timedelta(hours=1)))
    assert (type(refusal), refusal.code) == (Conflict, "DOCKER::INVALID_EXPIRATION")
    assert "too late" in refusal.message


def test_renewal_just_before_the_deadline_wins_and_expiry_then_finds_nothing_due():
    stream = Stream().pass_time(599.999999)
    stream.do(cmd.Renew(DEADLINE + timedelta(hours=1)))
    assert stream.pass_time(60).do(cmd.Expire()) == ()


def test_renewal_of_what_is_expiring_is_a_conflict_that_says_when_it_ended():
    stream = in_phase(Phase.RUNNING).pass_time(601).after(cmd.Expire())
    refusal = refused(stream, cmd.Renew(stream.now + timedelta(hours=1)))
    assert isinstance(refusal, Conflict)
    assert "expired by api_key default at 2026-03-01T12:10:01Z" in refusal.message
    closed = refused(stream.after(cmd.RecordRemoved()), cmd.Renew(stream.now + timedelta(hours=1)))
    assert isinstance(closed, NotFound)


def test_renewal_of_what_was_deleted_is_not_found():
    refusal = refused(in_phase(Phase.STOPPING), cmd.Renew(DEADLINE))
    assert (type(refusal), refusal.code) == (NotFound, "DOCKER::SANDBOX_NOT_FOUND")
    assert "deleted by api_key default" in refusal.message


def test_the_longest_timeout_is_counted_from_now():
    stream = Stream().pass_time(100)
    assert stream.fork().do(cmd.Renew(stream.now + 3600 * SECOND, 3600))
    refusal = refused(stream, cmd.Renew(stream.now + 3600 * SECOND + timedelta(microseconds=1), 3600))
    assert (type(refusal), refusal.code) == (Invalid, "SANDBOX::INVALID_PARAMETER")


def test_the_calendar_ends_before_the_year_9999():
    assert Stream().do(cmd.Renew(LATEST - timedelta(microseconds=1)))
    for instant in (LATEST, datetime.max.replace(tzinfo=UTC)):
        assert refused(Stream(), cmd.Renew(instant)).code == "SANDBOX::INVALID_PARAMETER"


# Metadata


def test_a_patch_sets_and_removes_and_keeps_the_rest():
    stream = Stream(requested(metadata={"keep": "1", "drop": "2", "same": "3"}))
    patch = {"new": "4", "drop": None, "absent": None, "same": "3"}
    assert stream.do(cmd.PatchMetadata(patch)) == (ev.MetadataPatched({"new": "4"}, ("drop",)),)
    assert stream.box.metadata == {"keep": "1", "same": "3", "new": "4"}
    assert stream.do(cmd.PatchMetadata(patch)) == ()
    assert stream.do(cmd.PatchMetadata({})) == ()


@pytest.mark.parametrize(
    ("patch", "code"),
    [
        ({"opensandbox.io/x": "1"}, "INVALID_METADATA_LABEL"),
        ({"opensandbox.io/x": None}, "INVALID_METADATA_LABEL"),
        ({"bad key": "1"}, "SANDBOX::INVALID_METADATA_LABEL"),
        ({"": "1"}, "SANDBOX::INVALID_METADATA_LABEL"),
        ({"k": "v\n"}, "SANDBOX::INVALID_METADATA_LABEL"),
        ({"k": "a\0b"}, "SANDBOX::INVALID_METADATA_LABEL"),
        ({"k": "x" * 64}, "SANDBOX::INVALID_METADATA_LABEL"),
        ({"Upper.case/k": "v"}, "SANDBOX::INVALID_METADATA_LABEL"),
        ({"a/b/c": "v"}, "SANDBOX::INVALID_METADATA_LABEL"),
    ],
)
def test_labels_follow_the_rules(patch: dict[str, str | None], code: str):
    assert refused(Stream(), cmd.PatchMetadata(patch)).code == code


def test_metadata_is_bounded_by_what_it_becomes():
    stream = Stream(requested(metadata={"a": "1", "b": "2"}))
    assert stream.fork().do(cmd.PatchMetadata({"a": None, "c": "3"}, max_entries=2))
    assert refused(stream, cmd.PatchMetadata({"c": "3"}, max_entries=2)).code == "SANDBOX::INVALID_PARAMETER"


# Pause, resume, terminate


@pytest.mark.parametrize("phase", Phase)
def test_pause_by_phase(phase: Phase):
    stream = in_phase(phase)
    match phase:
        case Phase.RUNNING:
            assert stream.do(cmd.Pause()) == (ev.PauseRequested(),)
            assert stream.box.phase is Phase.PAUSING
        case Phase.PAUSING:
            assert stream.do(cmd.Pause()) == ()
        case Phase.STOPPING:
            assert isinstance(refused(stream, cmd.Pause()), NotFound)
        case _:
            refusal = refused(stream, cmd.Pause())
            assert (type(refusal), refusal.code) == (Conflict, "DOCKER::SANDBOX_NOT_RUNNING")


@pytest.mark.parametrize("phase", Phase)
def test_resume_by_phase(phase: Phase):
    stream = in_phase(phase)
    match phase:
        case Phase.PAUSED:
            assert stream.do(cmd.Resume()) == (ev.ResumeRequested(),)
            assert stream.box.phase is Phase.RESUMING
        case Phase.RESUMING:
            assert stream.do(cmd.Resume()) == ()
        case Phase.STOPPING:
            assert isinstance(refused(stream, cmd.Resume()), NotFound)
        case _:
            refusal = refused(stream, cmd.Resume())
            assert (type(refusal), refusal.code) == (Conflict, "DOCKER::SANDBOX_NOT_PAUSED")


@pytest.mark.parametrize("phase", VISIBLE)
def test_terminate_ends_it_for_clients_at_once_and_a_second_one_is_not_found(phase: Phase):
    stream = in_phase(phase).after(cmd.Terminate())
    assert stream.box.phase is Phase.STOPPING
    assert isinstance(refused(stream, cmd.Terminate()), NotFound)


def test_terminate_of_what_is_already_removed_closes_in_the_same_append():
    stream = in_phase(Phase.FAILED).after(cmd.RecordRemoved()).pass_time(5)
    assert stream.do(cmd.Terminate()) == (
        ev.TerminationRequested(),
        ev.Terminated(ev.EndCause.USER_DELETE, 5.0),
    )
    assert stream.box.closed_at == stream.now


def test_expiry_of_what_is_already_removed_closes_in_the_same_append():
    stream = in_phase(Phase.FAILED).after(cmd.RecordRemoved()).pass_time(600)
    expired, terminated = stream.do(cmd.Expire())
    assert expired == ev.Expired(DEADLINE, ev.EndCause.EXPIRED)
    assert isinstance(terminated, ev.Terminated)


# Expiry


@pytest.mark.parametrize(("seconds", "due"), [(0, False), (599.999999, False), (600, True), (10**6, True)])
def test_expiry_comes_at_the_deadline_and_not_before(seconds: float, due: bool):
    events = in_phase(Phase.RUNNING).pass_time(seconds).do(cmd.Expire())
    assert events == ((ev.Expired(DEADLINE, ev.EndCause.EXPIRED),) if due else ())


def test_what_never_ran_expires_with_a_cause_of_its_own():
    stream = Stream().pass_time(600)
    assert stream.do(cmd.Expire()) == (ev.Expired(DEADLINE, ev.EndCause.EXPIRED_WHILE_PENDING),)
    assert "expired before it could be provisioned" in stream.box.status.message


def test_no_deadline_no_expiry():
    assert Stream(requested(timeout_s=None)).pass_time(10**9).do(cmd.Expire()) == ()


# What the engine shows


def test_a_first_look_at_something_running_is_created_and_started():
    look = seen(Power.RUNNING, started_at=BEGIN)
    assert Stream().do(cmd.RecordSeen(look)) == (ev.RuntimeCreated("r1", look.name), ev.Started(BEGIN))


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.PAUSED, Phase.STOPPING])
def test_seeing_the_same_again_is_nothing_new(phase: Phase):
    stream = in_phase(phase)
    power = Power.PAUSED if phase is Phase.PAUSED else Power.RUNNING
    assert stream.do(cmd.RecordSeen(seen(power, adopted=True), "resync")) == ()


def test_an_object_left_by_an_earlier_try_is_adopted():
    created, _ = Stream().do(cmd.RecordSeen(seen(Power.RUNNING, adopted=True)))
    assert isinstance(created, ev.RuntimeAdopted)
    assert created.found_by == "create_conflict"
    (swept,) = Stream().do(cmd.RecordSeen(seen(Power.CREATED), "resync"))
    assert isinstance(swept, ev.RuntimeAdopted)
    assert swept.found_by == "resync"


def test_another_running_object_under_its_name_is_adopted():
    stream = in_phase(Phase.RUNNING)
    adopted, started = stream.do(cmd.RecordSeen(seen(Power.RUNNING, "r2"), "observe"))
    assert isinstance(adopted, ev.RuntimeAdopted)
    assert isinstance(started, ev.Started)
    assert stream.box.phase is Phase.RUNNING


def test_another_object_under_its_name_that_never_ran_means_that_what_ran_is_gone():
    stream = in_phase(Phase.RUNNING)
    assert stream.do(cmd.RecordSeen(seen(Power.CREATED, "r2"))) == (ev.RuntimeLost("r1"),)
    assert stream.box.phase is Phase.FAILED
    assert stream.box.status.reason == "RUNTIME_LOST"
    assert next_step(stream, seen(Power.CREATED, "r2")) == Remove()


def test_paused_and_resumed_behind_our_back_shows():
    stream = in_phase(Phase.RUNNING).look(Power.PAUSED)
    assert stream.box.phase is Phase.RESUMING
    assert next_step(stream, seen(Power.PAUSED)) == SetPower(Power.RUNNING)
    stream = in_phase(Phase.PAUSED).look(Power.RUNNING)
    assert stream.box.phase is Phase.PAUSING
    assert next_step(stream, seen(Power.RUNNING)) == SetPower(Power.PAUSED)


@pytest.mark.parametrize(("code", "phase"), [(0, Phase.TERMINATED), (1, Phase.FAILED), (-1, Phase.FAILED)])
def test_its_own_end_shows_as_terminated_or_failed(code: int, phase: Phase):
    stream = in_phase(Phase.RUNNING).look(Power.EXITED, end=Exit(code, at=BEGIN))
    assert stream.box.phase is phase
    assert stream.box.runtime is not None
    assert stream.box.runtime.finished_at == BEGIN


def test_an_end_nobody_saw_running():
    events = Stream().do(cmd.RecordSeen(seen(Power.EXITED, end=Exit(127, message="not found"))))
    assert [type(event) for event in events] == [ev.RuntimeCreated, ev.RuntimeExited]
    stream = Stream().look(Power.EXITED, end=Exit(127, message="not found"))
    assert stream.box.phase is Phase.FAILED
    assert stream.box.status.message == "Sandbox container exited with code 127: not found."


def test_out_of_memory_is_named():
    stream = in_phase(Phase.RUNNING).look(Power.EXITED, end=Exit(137, oom=True))
    assert "ran out of memory" in stream.box.status.message


def test_an_end_without_details_is_an_end():
    (event,) = in_phase(Phase.RUNNING).do(cmd.RecordSeen(seen(Power.EXITED)))
    assert event == ev.RuntimeExited(-1)


def test_its_own_end_is_final_and_what_stirs_afterwards_is_removed():
    stream = in_phase(Phase.TERMINATED)
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING))) == ()
    assert next_step(stream, seen(Power.RUNNING)) == Remove()
    assert stream.do(cmd.RecordRemoved()) == (ev.RuntimeRemoved("r1"),)
    assert stream.box.phase is Phase.TERMINATED


@pytest.mark.parametrize("text", ["a\0b", "half \ud800 a pair", "x" * 100_000])
def test_whatever_an_engine_says_can_be_stored(text: str):
    for command in (
        cmd.RecordFailure("E", text),
        cmd.RecordRetry("ensure", "E", text, 1),
        cmd.RecordSeen(seen(Power.EXITED, end=Exit(1, message=text))),
    ):
        stored = msgspec.json.encode([ev.to_payload(event) for event in Stream().do(command)])
        assert b"\\u0000" not in stored
        assert len(stored) < 10_000
        json.loads(stored)


# Loss, removal, failure


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.PAUSING, Phase.PAUSED, Phase.RESUMING])
def test_a_loss_is_recorded_once(phase: Phase):
    stream = in_phase(phase)
    assert stream.do(cmd.RecordLost(BEGIN)) == (ev.RuntimeLost("r1", BEGIN),)
    assert (stream.box.phase, stream.box.status.reason) == (Phase.FAILED, "RUNTIME_LOST")
    assert stream.do(cmd.RecordLost(BEGIN + SECOND)) == ()


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.TERMINATED, Phase.FAILED])
def test_what_has_no_living_runtime_cannot_lose_it(phase: Phase):
    assert in_phase(phase).do(cmd.RecordLost(BEGIN)) == ()


def test_a_loss_still_reads_as_one_after_the_leftovers_are_removed():
    stream = in_phase(Phase.RUNNING).after(cmd.RecordLost(BEGIN), cmd.RecordRemoved())
    assert stream.box.observed is RuntimeState.REMOVED
    assert (stream.box.phase, stream.box.status.reason) == (Phase.FAILED, "RUNTIME_LOST")
    assert "None" not in stream.box.status.message


def test_removal_closes_what_has_ended_and_keeps_its_cause_and_exit_code():
    stream = in_phase(Phase.TERMINATED).pass_time(10).after(cmd.Terminate()).pass_time(5)
    assert stream.do(cmd.RecordRemoved()) == (
        ev.RuntimeRemoved("r1"),
        ev.Terminated(ev.EndCause.USER_DELETE, 10.0, 0),
    )
    assert stream.do(cmd.RecordRemoved()) == ()


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.RUNNING, Phase.PAUSED])
def test_a_removal_of_what_shall_live_is_no_fact(phase: Phase):
    assert in_phase(phase).do(cmd.RecordRemoved()) == ()


def test_a_failure_is_final_and_its_leftovers_go():
    stream = Stream().look(Power.CREATED).after(cmd.RecordFailure("NO_PLATFORM", "no such platform"))
    assert (stream.box.status.reason, stream.box.status.message) == ("NO_PLATFORM", "no such platform")
    assert stream.do(cmd.RecordFailure("OTHER", "second opinion")) == ()
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING))) == ()
    assert next_step(stream, None) == Remove()


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.TERMINATED])
def test_what_has_ended_cannot_fail(phase: Phase):
    assert in_phase(phase).do(cmd.RecordFailure("E", "m")) == ()


def test_a_retry_is_recorded_while_it_matters():
    stream = in_phase(Phase.STOPPING)
    assert stream.do(cmd.RecordRetry("remove", "E", "m", 3)) == (ev.ReconcileFailed("remove", "E", "m", 3),)
    assert stream.after(cmd.RecordRemoved()).do(cmd.RecordRetry("remove", "E", "m", 4)) == ()


# Plan


def next_step(stream: Stream, look: object) -> Step:
    shown = None if look is None else Look(None if look == "absent" else look)  # pyright: ignore[reportArgumentType]
    return plan(stream.box, shown, Absence(stream.now, None, 5 * SECOND))


def _closed() -> Stream:
    return in_phase(Phase.STOPPING).after(cmd.RecordRemoved())


def _removed() -> Stream:
    return in_phase(Phase.FAILED).after(cmd.RecordRemoved())


@pytest.mark.parametrize(
    ("stream", "look", "step"),
    [
        (Stream(), None, Ensure()),
        (Stream().look(Power.CREATED), seen(Power.CREATED), Ensure()),
        (in_phase(Phase.RUNNING), None, Observe()),
        (in_phase(Phase.RUNNING), seen(Power.RUNNING), Settled()),
        (in_phase(Phase.RUNNING), seen(Power.CREATED), Ensure()),
        (in_phase(Phase.PAUSING), None, SetPower(Power.PAUSED)),
        (in_phase(Phase.RESUMING), None, SetPower(Power.RUNNING)),
        (in_phase(Phase.TERMINATED), None, Observe()),
        (in_phase(Phase.TERMINATED), seen(Power.EXITED), Settled()),
        (in_phase(Phase.STOPPING), None, Remove()),
        (_removed(), None, Observe()),
        (_removed(), "absent", Settled()),
        (_removed(), seen(Power.CREATED, "late"), Remove()),
        (_closed(), None, Observe()),
        (_closed(), "absent", Settled()),
        (_closed(), seen(Power.RUNNING, "late"), Remove()),
    ],
)
def test_the_next_step(stream: Stream, look: object, step: Step):
    assert next_step(stream, look) == step


def test_what_clients_see_of_an_end_names_when_and_by_whom():
    box: Sandbox = in_phase(Phase.RUNNING).pass_time(1.5).after(cmd.Terminate()).box
    assert box.status.reason == "USER_DELETE"
    assert box.status.message == (
        "Sandbox is being removed: deleted by api_key default at 2026-03-01T12:00:01.500000Z."
    )
