"""`decide` by example, for what clients and deadlines ask: each rule of the contract once, in the words of its outcome."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.deadlines import TRANSITION
from app.domain.sandbox.decide import LATEST
from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Phase
from app.errors import Conflict, Invalid, NotFound, Rejected
from tests.support.stream import BEGIN, ID, PLACED, SECOND, Stream, in_phase, requested

EXPIRY = BEGIN + timedelta(seconds=600)
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
    before = list(stream.history)
    with pytest.raises(Rejected) as caught:
        stream.do(command)
    assert stream.history == before
    return caught.value


# Renew


@pytest.mark.parametrize("phase", VISIBLE)
def test_renewal_moves_the_expiry_in_every_visible_phase(phase: Phase):
    later = EXPIRY + timedelta(hours=1)
    stream = in_phase(phase)
    assert stream.do(cmd.Renew(later)) == (ev.Renewed(later, EXPIRY),)
    assert stream.sandbox.expires_at == later


def test_renewal_may_shorten():
    sooner = BEGIN + 10 * SECOND
    assert Stream().after(cmd.Renew(sooner)).sandbox.expires_at == sooner


def test_renewal_to_the_present_expiry_is_nothing_new():
    assert Stream().do(cmd.Renew(EXPIRY)) == ()


@pytest.mark.parametrize("seconds", [0, -1, -(10**6)])
def test_renewal_into_the_past_is_invalid(seconds: int):
    refusal = refused(Stream(), cmd.Renew(BEGIN + seconds * SECOND))
    assert (type(refusal), refusal.code) == (Invalid, "DOCKER::INVALID_EXPIRATION")


def test_renewal_without_an_expiry_conflicts():
    refusal = refused(Stream(requested(timeout_s=None)), cmd.Renew(EXPIRY))
    assert (type(refusal), refusal.code) == (Conflict, "DOCKER::INVALID_EXPIRATION")


@pytest.mark.parametrize("late", [0, 0.000001, 60])
def test_renewal_at_or_after_the_expiry_is_too_late_even_before_the_timer_came(late: float):
    stream = Stream().pass_time(600 + late)
    refusal = refused(stream, cmd.Renew(EXPIRY + timedelta(hours=1)))
    assert (type(refusal), refusal.code) == (Conflict, "DOCKER::INVALID_EXPIRATION")
    assert "too late" in refusal.message


def test_renewal_just_before_the_expiry_wins_and_expiry_then_finds_nothing_due():
    stream = Stream().pass_time(599.999999)
    stream.do(cmd.Renew(EXPIRY + timedelta(hours=1)))
    assert stream.pass_time(60).do(cmd.Expire()) == ()


def test_renewal_of_what_is_expiring_is_a_conflict_that_says_when_it_ended():
    stream = in_phase(Phase.RUNNING).pass_time(601).after(cmd.Expire())
    refusal = refused(stream, cmd.Renew(stream.now + timedelta(hours=1)))
    assert isinstance(refusal, Conflict)
    assert "expired by api_key default at 2026-03-01T12:10:01Z" in refusal.message
    closed = refused(stream.after(cmd.RecordRemoved()), cmd.Renew(stream.now + timedelta(hours=1)))
    assert isinstance(closed, NotFound)


def test_renewal_of_what_was_deleted_is_not_found():
    refusal = refused(in_phase(Phase.STOPPING), cmd.Renew(EXPIRY))
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
    assert stream.sandbox.metadata == {"keep": "1", "same": "3", "new": "4"}
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
            assert stream.sandbox.phase is Phase.PAUSING
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
            assert stream.sandbox.phase is Phase.RESUMING
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
    assert stream.sandbox.phase is Phase.STOPPING
    assert isinstance(refused(stream, cmd.Terminate()), NotFound)


def test_terminate_of_what_is_already_removed_closes_in_the_same_append():
    stream = in_phase(Phase.FAILED).after(cmd.RecordRemoved()).pass_time(5)
    assert stream.do(cmd.Terminate()) == (
        ev.TerminationRequested(ev.EndCause.USER_DELETE),
        ev.Terminated(ev.EndCause.USER_DELETE, 5000),
    )
    assert stream.sandbox.closed_at == stream.now


def test_expiry_of_what_is_already_removed_closes_in_the_same_append():
    stream = in_phase(Phase.FAILED).after(cmd.RecordRemoved()).pass_time(600)
    expired, terminated = stream.do(cmd.Expire())
    assert expired == ev.Expired(EXPIRY, ev.EndCause.EXPIRED)
    assert isinstance(terminated, ev.Terminated)


# Expiry


@pytest.mark.parametrize(("seconds", "due"), [(0, False), (599.999999, False), (600, True), (10**6, True)])
def test_expiry_comes_at_its_time_and_not_before(seconds: float, due: bool):
    events = in_phase(Phase.RUNNING).pass_time(seconds).do(cmd.Expire())
    assert events == ((ev.Expired(EXPIRY, ev.EndCause.EXPIRED),) if due else ())


def test_what_never_ran_expires_with_a_cause_of_its_own():
    stream = Stream().pass_time(600)
    assert stream.do(cmd.Expire()) == (ev.Expired(EXPIRY, ev.EndCause.EXPIRED_WHILE_PENDING),)


def test_without_an_expiry_nothing_expires():
    assert Stream(requested(timeout_s=None)).pass_time(10**9).do(cmd.Expire()) == ()


# An end of what is on no engine


@pytest.mark.parametrize("command", [cmd.Terminate(), cmd.Expire()])
def test_what_was_never_placed_is_closed_with_its_end(command: cmd.Command):
    stream = Stream(placed=False).pass_time(600)
    assert [type(event) for event in stream.do(command)][1:] == [ev.Terminated]
    assert stream.sandbox.closed_at == stream.now
    assert stream.deadlines == {}


def test_what_was_placed_may_be_on_its_engine_and_is_removed_there_first():
    assert Stream().do(cmd.Terminate()) == (ev.TerminationRequested(ev.EndCause.USER_DELETE),)


def test_a_life_is_never_shorter_than_nothing_though_the_clock_was_set_back():
    stream = Stream(placed=False)
    stream.now = BEGIN - 10 * SECOND
    assert stream.do(cmd.Terminate())[-1] == ev.Terminated(ev.EndCause.USER_DELETE, 0)


def test_an_end_in_a_word_of_a_newer_version_is_no_lost_renewal_and_reads_as_text():
    stream = Stream()
    stream.apply(ev.TerminationRequested("tenant_disabled"))
    refusal = refused(stream, cmd.Renew(EXPIRY))
    assert isinstance(refusal, NotFound)
    assert "ended (tenant_disabled) by api_key default at 2026-03-01T12:00:00Z" in refusal.message


# Placement


def test_it_is_placed_once():
    stream = Stream(placed=False)
    placed = cmd.RecordPlaced("default", 1, ID)
    assert stream.do(placed) == (PLACED,)
    assert (stream.sandbox.engine, stream.sandbox.epoch, stream.sandbox.object_id) == ("default", 1, ID)
    assert stream.do(cmd.RecordPlaced("other", 1, ID)) == ()


def test_what_failed_or_ended_is_not_placed_any_more():
    placed = cmd.RecordPlaced("default", 1, ID)
    for command in (cmd.RecordFailure("place", "SPEC_REJECTED", "no"), cmd.Terminate()):
        assert Stream(placed=False).after(command).do(placed) == ()


# A power that the engine refuses


@pytest.mark.parametrize(
    "command", [cmd.RecordPowerRefused("REFUSED", "not\0here"), cmd.RecordFailure("set_power", "REFUSED", "not\0here")]
)
def test_a_refused_pause_or_resume_never_costs_the_sandbox_whoever_reports_it(command: cmd.Command):
    pausing, resuming = in_phase(Phase.PAUSING), in_phase(Phase.RESUMING)
    assert pausing.do(command) == (ev.PauseFailed("REFUSED", "not\\x00here"),)
    assert pausing.sandbox.phase is Phase.RUNNING
    assert pausing.do(cmd.Pause()) == (ev.PauseRequested(),)
    assert resuming.do(command) == (ev.ResumeFailed("REFUSED", "not\\x00here"),)
    assert resuming.sandbox.phase is Phase.PAUSED
    assert resuming.do(cmd.Resume()) == (ev.ResumeRequested(),)
    for phase in set(Phase) - {Phase.PAUSING, Phase.RESUMING}:
        assert in_phase(phase).do(command) == ()


def test_a_pause_that_comes_after_it_was_given_up_is_taken_back():
    stream = in_phase(Phase.PAUSING).to_deadline(TRANSITION).after(cmd.EndTransition())
    assert stream.observe(Power.PAUSED).sandbox.phase is Phase.RESUMING
    assert TRANSITION in stream.deadlines
    assert stream.observe(Power.RUNNING).sandbox.phase is Phase.RUNNING
