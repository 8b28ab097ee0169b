"""What observations of an engine, and their absence, add to the log, by example."""

from __future__ import annotations

import json
from datetime import datetime
from uuid import UUID

import pytest
from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Address, Exit, Part, Power, Verdict, Waiting
from app.domain.sandbox.state import Phase, RuntimeState
from app.domain.sandbox.status import status_of
from tests.support.stream import BEGIN, SECOND, Stream, in_phase, parts, requested, seen

LATER = BEGIN + SECOND
UP = (Phase.RUNNING, Phase.PAUSING, Phase.PAUSED, Phase.RESUMING)
HERE = Address("bridge", "172.17.0.5", {"8080": "127.0.0.1:49153"})
THERE = Address("bridge", "172.17.0.9", {"8080": "127.0.0.1:49155"})


def ran_since(at: datetime | None = BEGIN, *, paused: bool = False) -> Stream:
    """Running or Paused, with a known start and address."""
    stream = Stream().observe(Power.RUNNING, started_at=at, address=HERE)
    return stream.after(cmd.Pause()).observe(Power.PAUSED, started_at=at) if paused else stream


def kinds(events: tuple[ev.Event, ...]) -> list[type[ev.Event]]:
    return [type(event) for event in events]


# The first sight


def test_an_object_that_runs_is_created_started_and_ready_in_one_append():
    shown = replace(seen(Power.RUNNING, started_at=LATER, address=HERE, image_id="sha256:1"), node="n1", generation=2)
    assert Stream().do(cmd.RecordSeen(shown)) == (
        ev.Fetched("sha256:1", cached=True),
        ev.RuntimeCreated(2, parts()),
        ev.Started(1, LATER, HERE, "n1"),
        ev.Ready(),
    )


def test_a_fetch_that_was_recorded_is_not_recorded_again_with_the_object():
    stream = Stream().after(cmd.RecordFetched("sha256:1", "sha256:d", 120, 8250))
    assert kinds(stream.do(cmd.RecordSeen(seen(Power.CREATED, image_id="sha256:1")))) == [ev.RuntimeCreated]
    assert stream.sandbox.runtime is not None
    assert (stream.sandbox.runtime.image_id, stream.sandbox.runtime.image_digest) == ("sha256:1", "sha256:d")


def test_an_object_of_another_sandbox_says_nothing_about_this_one():
    stranger = seen(Power.RUNNING, object_id=UUID(int=7))
    for stream in (Stream(placed=False), Stream(), in_phase(Phase.RUNNING)):
        assert stream.do(cmd.RecordSeen(stranger, "sweep")) == ()


def test_supporting_parts_alone_are_no_sign_of_life():
    shown = replace(seen(Power.RUNNING), parts=(Part("egress", "e1", "sandbox-egress"),))
    assert Stream().do(cmd.RecordSeen(shown)) == ()
    assert in_phase(Phase.RUNNING).do(cmd.RecordSeen(shown)) == ()


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.PAUSED, Phase.STOPPING])
def test_observing_the_same_again_is_nothing_new(phase: Phase):
    stream = in_phase(phase)
    power = Power.PAUSED if phase is Phase.PAUSED else Power.RUNNING
    assert stream.do(cmd.RecordSeen(seen(power, adopted=True), "sweep")) == ()


def test_an_object_left_by_an_earlier_attempt_is_adopted():
    created, *_ = Stream().do(cmd.RecordSeen(seen(Power.RUNNING, adopted=True)))
    assert created == ev.RuntimeAdopted(1, parts(), "create_conflict")
    for found_by in ("observe", "sweep"):
        assert Stream().do(cmd.RecordSeen(seen(Power.CREATED), found_by)) == (ev.RuntimeAdopted(1, parts(), found_by),)


def test_an_object_that_vanished_before_it_ran_is_created_anew_and_not_adopted():
    stream = Stream().observe(Power.CREATED)
    again = replace(seen(Power.CREATED, "r2"), generation=2)
    assert stream.do(cmd.RecordSeen(again)) == (ev.RuntimeCreated(2, parts("r2")),)
    assert stream.sandbox.generation == 2


@pytest.mark.parametrize(("asked", "found", "known"), [(None, 4, 4), (2, 2, 2), (2, None, 2), (None, None, None)])
def test_the_object_says_how_many_gpus_it_has(asked: int | None, found: int | None, known: int | None):
    """Of "all" only the engine knows how many they are."""
    shown = replace(seen(Power.RUNNING), gpus=found)
    for report, kind in (
        (cmd.RecordSeen(shown), ev.RuntimeCreated),
        (cmd.RecordSeen(shown, "sweep"), ev.RuntimeAdopted),
        (cmd.RecordSeen(replace(shown, adopted=True)), ev.RuntimeAdopted),
    ):
        stream = Stream(replace(requested(), gpus=asked, gpus_all=asked is None))
        made, *_ = stream.do(report)
        assert isinstance(made, kind)
        assert made.gpus == found
        assert stream.sandbox.gpus == known


# Ready


def test_it_is_pending_until_it_is_ready():
    stream = Stream()
    for event in (ev.RuntimeCreated(1, parts()), ev.Started(1, BEGIN)):
        stream.apply(event)
        assert stream.sandbox.phase is Phase.PENDING
    assert stream.sandbox.observed is RuntimeState.RUNNING
    assert stream.pass_time(2).apply(ev.Ready(2000, "agent")).sandbox.phase is Phase.RUNNING
    assert stream.sandbox.ready_at == stream.sandbox.changed_at == stream.now


def test_a_restart_makes_it_ready_anew():
    stream = ran_since()
    stream.apply(ev.Restarted(2, occurred_at=LATER))
    assert (stream.sandbox.phase, stream.sandbox.ready_at) == (Phase.PENDING, None)


def test_a_run_that_nothing_probes_is_ready_at_once_however_late_it_is_noticed():
    """The gap between the engine's time of the start and our record of it is no time that the sandbox needed."""
    stream = Stream().pass_time(90)
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING, started_at=BEGIN)))[-1] == ev.Ready(0, "runtime")
    again = stream.pass_time(90).do(cmd.RecordSeen(seen(Power.RUNNING, started_at=LATER)))
    assert again[-1] == ev.Ready(0, "runtime")


# When it was paused and resumed


def power_events(
    stream: Stream, power: Power, since: datetime | None, **details: datetime | None
) -> tuple[ev.Event, ...]:
    """What such an observation adds to a fork of the stream."""
    return stream.fork().do(cmd.RecordSeen(replace(seen(power, **details), power_since=since), "observe"))


def test_a_pause_and_a_resume_have_the_time_that_the_engine_told():
    running, paused = ran_since().pass_time(60), ran_since(paused=True).pass_time(60)
    assert power_events(running, Power.PAUSED, LATER) == (ev.Paused(LATER),)
    assert power_events(paused, Power.RUNNING, LATER) == (ev.Resumed(LATER),)
    assert power_events(running, Power.PAUSED, None) == (ev.Paused(),)


def test_a_time_from_before_the_present_phase_or_run_is_an_earlier_pause():
    """Paused, resumed by us, and paused again, of which the engine's word is still on its way."""
    resumed = ran_since(paused=True).pass_time(2).after(cmd.Resume()).pass_time(2).observe(Power.RUNNING)
    assert resumed.sandbox.changed_at == BEGIN + 4 * SECOND
    for early in (BEGIN, LATER, BEGIN + 4 * SECOND):
        assert power_events(resumed, Power.PAUSED, early) == (ev.Paused(),)
    true = BEGIN + 5 * SECOND
    assert power_events(resumed, Power.PAUSED, true) == (ev.Paused(true),)
    *_, last = power_events(resumed, Power.PAUSED, true, started_at=BEGIN + 6 * SECOND)
    assert last == ev.Paused(), "it was restarted after that"


# Waiting


def test_a_wait_is_recorded_when_step_or_reason_changes_and_not_when_its_text_does():
    stream = Stream()
    assert stream.do(cmd.RecordWaiting("fetch", "IMAGE_PULLING", "1 of 7")) == (
        ev.Waited("fetch", "IMAGE_PULLING", "1 of 7"),
    )
    assert stream.do(cmd.RecordWaiting("fetch", "IMAGE_PULLING", "2 of 7")) == ()
    assert stream.do(cmd.RecordWaiting("fetch", "REGISTRY_RATE_LIMITED"))
    assert stream.do(cmd.RecordWaiting("ensure", "REGISTRY_RATE_LIMITED"))


@pytest.mark.parametrize(
    "progress",
    [
        cmd.RecordFetched("sha256:1"),
        cmd.RecordSeen(seen(Power.CREATED)),
        cmd.RecordSeen(seen(Power.RUNNING)),
        cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "no such image"),
        cmd.Terminate(),
    ],
)
def test_what_was_waited_for_is_forgotten_when_it_went_on(progress: cmd.Command):
    stream = Stream().after(cmd.RecordWaiting("fetch", "IMAGE_PULLING"))
    assert stream.sandbox.waiting == Waiting("fetch", "IMAGE_PULLING")
    assert stream.after(progress).sandbox.waiting is None


def test_a_sandbox_without_an_engine_waits_for_one_until_it_is_placed():
    stream = Stream(placed=False).after(cmd.RecordWaiting("place", "NO_CAPACITY"))
    assert stream.sandbox.waiting == Waiting("place", "NO_CAPACITY")
    assert stream.after(cmd.RecordPlaced("default", 1, stream.sandbox.id)).sandbox.waiting is None
    assert stream.do(cmd.RecordWaiting("place", "NO_CAPACITY")) == ()


@pytest.mark.parametrize("phase", sorted(set(Phase) - {Phase.PENDING}))
def test_only_what_is_pending_waits(phase: Phase):
    stream = in_phase(phase)
    assert stream.do(cmd.RecordWaiting("fetch", "IMAGE_PULLING")) == ()
    assert stream.after(cmd.RecordRetry("remove", "E", "m", 1)).sandbox.waiting is None


def test_an_object_that_is_not_up_yet_says_why_and_says_it_once():
    shown = seen(Power.CREATED, waiting=Waiting("ensure", "POD_UNSCHEDULABLE", "0/3 nodes\0"))
    stream = Stream()
    assert stream.do(cmd.RecordSeen(shown)) == (
        ev.RuntimeCreated(1, parts()),
        ev.Waited("ensure", "POD_UNSCHEDULABLE", "0/3 nodes\\x00"),
    )
    assert stream.do(cmd.RecordSeen(shown, "observe")) == ()


def test_a_new_object_that_waits_for_the_same_says_so_in_its_own_append():
    wait = Waiting("ensure", "POD_UNSCHEDULABLE")
    stream = Stream().observe(Power.CREATED, waiting=wait)
    again = cmd.RecordSeen(seen(Power.CREATED, "r2", waiting=wait))
    assert kinds(stream.do(again)) == [ev.RuntimeCreated, ev.Waited]
    assert stream.do(again) == ()


def test_a_failed_attempt_is_what_a_pending_sandbox_waits_for():
    stream = Stream().after(cmd.RecordRetry("ensure", "START_FAILED", "no more disk", 1))
    assert stream.sandbox.waiting == Waiting("ensure", "START_FAILED", "no more disk")


# A verdict that comes after `ensure`


def test_a_late_verdict_fails_it():
    stream = Stream().observe(Power.CREATED)
    shown = seen(Power.CREATED, verdict=Verdict("IMAGE_NOT_FOUND", "no such image\0"))
    assert stream.do(cmd.RecordSeen(shown, "observe")) == (
        ev.Failed("ensure", "IMAGE_NOT_FOUND", "no such image\\x00"),
    )
    assert stream.do(cmd.RecordSeen(shown, "observe")) == ()


def test_a_verdict_on_a_new_object_stands_behind_the_object_so_that_it_is_removed():
    shown = seen(Power.CREATED, verdict=Verdict("IMAGE_NOT_FOUND", "no such image"))
    assert kinds(Stream().do(cmd.RecordSeen(shown))) == [ev.RuntimeCreated, ev.Failed]


def test_a_verdict_on_what_has_ended_is_not_recorded():
    shown = seen(Power.RUNNING, verdict=Verdict("IMAGE_NOT_FOUND", "no such image"))
    assert in_phase(Phase.STOPPING).do(cmd.RecordSeen(shown)) == ()


def test_a_verdict_on_what_was_ready_is_an_end_like_any_other():
    """Something ran in it, so it is no fault of its image."""
    shown = seen(Power.EXITED, end=Exit(1), verdict=Verdict("IMAGE_HAS_NO_SHELL", "no /bin/sh"))
    assert kinds(ran_since().do(cmd.RecordSeen(shown, "observe"))) == [ev.RuntimeExited]


# A second run (B8)


def test_a_start_that_moved_is_a_restart_from_outside():
    stream = ran_since()
    again = cmd.RecordSeen(seen(Power.RUNNING, started_at=LATER, address=THERE), "observe")
    assert stream.do(again) == (
        ev.Restarted(2, 1, "outside", "filesystem", occurred_at=LATER, address=THERE),
        ev.Ready(),
    )
    assert (stream.sandbox.run, stream.sandbox.phase, stream.sandbox.address) == (2, Phase.RUNNING, THERE)
    assert stream.do(again) == ()


@pytest.mark.parametrize("at", [BEGIN, BEGIN - SECOND, None])
def test_an_older_observation_is_no_restart(at: datetime | None):
    assert ran_since().do(cmd.RecordSeen(seen(Power.RUNNING, started_at=at), "sweep")) == ()


def test_a_start_of_unknown_time_is_no_restart():
    assert ran_since(None).do(cmd.RecordSeen(seen(Power.RUNNING, started_at=LATER), "sweep")) == ()


def test_after_a_power_loss_the_engine_remembers_only_the_create_and_the_second_start_is_told():
    stream = ran_since()
    assert stream.do(cmd.RecordSeen(seen(Power.CREATED), "observe")) == ()
    assert kinds(stream.do(cmd.RecordSeen(seen(Power.RUNNING, started_at=LATER, adopted=True)))) == [
        ev.Restarted,
        ev.Ready,
    ]


def test_a_second_run_that_has_ended_already_is_told_before_its_end():
    stream = ran_since()
    shown = seen(Power.EXITED, started_at=LATER, end=Exit(3))
    restarted, ready, exited = stream.do(cmd.RecordSeen(shown, "observe"))
    assert isinstance(restarted, ev.Restarted)
    assert isinstance(ready, ev.Ready)
    assert exited == ev.RuntimeExited(3, run=2)


def test_another_object_that_runs_is_adopted_and_begins_with_nothing():
    stream = ran_since()
    adopted, restarted, ready = stream.do(cmd.RecordSeen(seen(Power.RUNNING, "r2", started_at=LATER), "observe"))
    assert adopted == ev.RuntimeAdopted(1, parts("r2"), "observe")
    assert restarted == ev.Restarted(2, 1, "outside", "nothing", occurred_at=LATER)
    assert ready == ev.Ready()
    assert stream.sandbox.phase is Phase.RUNNING


def test_another_object_does_not_inherit_the_address():
    assert ran_since().observe(Power.RUNNING, "r2", started_at=LATER).sandbox.address is None
    assert ran_since().observe(Power.RUNNING, started_at=LATER).sandbox.address == HERE


def test_a_paused_sandbox_that_was_restarted_outside_runs_and_is_paused_again():
    stream = ran_since(paused=True)
    stream.do(cmd.RecordSeen(seen(Power.RUNNING, started_at=LATER), "observe"))
    assert (stream.sandbox.run, stream.sandbox.phase) == (2, Phase.PAUSING)
    stream.do(cmd.RecordSeen(seen(Power.PAUSED, started_at=LATER), "observe"))
    assert stream.sandbox.phase is Phase.PAUSED


def test_another_object_that_never_ran_means_that_what_ran_is_gone():
    stream = in_phase(Phase.RUNNING)
    assert stream.do(cmd.RecordSeen(seen(Power.CREATED, "r2"))) == (ev.RuntimeLost(),)
    assert (stream.sandbox.phase, status_of(stream.sandbox).reason) == (Phase.FAILED, "RUNTIME_LOST")


# Exits


@pytest.mark.parametrize(
    ("code", "phase"), [(0, Phase.TERMINATED), (1, Phase.FAILED), (-1, Phase.FAILED), (None, Phase.FAILED)]
)
def test_its_own_exit_shows_as_terminated_or_failed(code: int | None, phase: Phase):
    stream = in_phase(Phase.RUNNING).observe(Power.EXITED, end=Exit(code, at=BEGIN))
    assert stream.sandbox.phase is phase
    assert stream.sandbox.runtime is not None
    assert stream.sandbox.runtime.finished_at == BEGIN


def test_an_exit_of_what_never_started_belongs_to_no_run():
    stream = Stream()
    events = stream.do(cmd.RecordSeen(seen(Power.EXITED, end=Exit(127, message="not found"))))
    assert kinds(events) == [ev.RuntimeCreated, ev.RuntimeExited]
    assert events[-1] == ev.RuntimeExited(127, message="not found", run=0)
    assert stream.sandbox.phase is Phase.FAILED


def test_an_exit_without_details_is_an_exit():
    (event,) = in_phase(Phase.RUNNING).do(cmd.RecordSeen(seen(Power.EXITED)))
    assert event == ev.RuntimeExited()


def test_its_own_exit_is_final():
    stream = in_phase(Phase.TERMINATED)
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING))) == ()
    assert stream.do(cmd.RecordRemoved()) == (ev.RuntimeRemoved(parts()),)
    assert stream.sandbox.phase is Phase.TERMINATED


def test_paused_and_resumed_from_outside_shows():
    assert in_phase(Phase.RUNNING).observe(Power.PAUSED).sandbox.phase is Phase.RESUMING
    assert in_phase(Phase.PAUSED).observe(Power.RUNNING).sandbox.phase is Phase.PAUSING


# Loss, removal, failure


@pytest.mark.parametrize("phase", UP)
def test_a_loss_is_recorded_once(phase: Phase):
    stream = in_phase(phase)
    assert stream.do(cmd.RecordLost(BEGIN)) == (ev.RuntimeLost("MISSING", BEGIN),)
    assert (stream.sandbox.phase, status_of(stream.sandbox).reason) == (Phase.FAILED, "RUNTIME_LOST")
    assert stream.do(cmd.RecordLost(LATER)) == ()


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.TERMINATED, Phase.FAILED])
def test_what_has_no_living_object_cannot_lose_it(phase: Phase):
    assert in_phase(phase).do(cmd.RecordLost(BEGIN)) == ()
    assert Stream().after(cmd.RecordFetched("sha256:1")).do(cmd.RecordLost(BEGIN)) == ()


def test_removal_closes_what_has_ended_and_keeps_its_cause_and_exit_code():
    stream = in_phase(Phase.TERMINATED).pass_time(10).after(cmd.Terminate()).pass_time(5)
    assert stream.do(cmd.RecordRemoved()) == (
        ev.RuntimeRemoved(parts()),
        ev.Terminated(ev.EndCause.USER_DELETE, 10_000, 0),
    )
    assert stream.do(cmd.RecordRemoved()) == ()


@pytest.mark.parametrize("phase", [Phase.PENDING, Phase.RUNNING, Phase.PAUSED])
def test_a_removal_of_what_shall_live_is_not_recorded(phase: Phase):
    assert in_phase(phase).do(cmd.RecordRemoved()) == ()


def test_nothing_is_removed_of_what_was_never_placed():
    stream = Stream(placed=False).after(cmd.RecordFailure("place", "SPEC_REJECTED", "no"))
    assert stream.do(cmd.RecordRemoved()) == ()


def test_a_failure_is_final():
    stream = Stream().observe(Power.CREATED).after(cmd.RecordFailure("ensure", "NO_PLATFORM", "no such platform"))
    assert stream.do(cmd.RecordFailure("ensure", "OTHER", "second opinion")) == ()
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING))) == ()
    assert stream.sandbox.failure is not None
    assert stream.sandbox.failure.reason == "NO_PLATFORM"


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.TERMINATED])
def test_what_has_ended_cannot_fail(phase: Phase):
    assert in_phase(phase).do(cmd.RecordFailure("ensure", "E", "m")) == ()


def test_a_retry_is_recorded_while_it_matters():
    stream = in_phase(Phase.STOPPING)
    assert stream.do(cmd.RecordRetry("remove", "E", "m", 3)) == (ev.ReconcileFailed("remove", "E", "m", 3),)
    assert stream.after(cmd.RecordRemoved()).do(cmd.RecordRetry("remove", "E", "m", 4)) == ()


@pytest.mark.parametrize("text", ["a\0b", "half \ud800 a pair", "x" * 100_000, "\x1b[2J"])
def test_whatever_an_engine_says_can_be_stored(text: str):
    for command in (
        cmd.RecordFailure("ensure", "E", text),
        cmd.RecordRetry("ensure", "E", text, 1),
        cmd.RecordWaiting("ensure", "E", text),
        cmd.EndTransition(last_reason="E", last_error=text),
        cmd.RecordSeen(seen(Power.EXITED, end=Exit(1, message=text))),
        cmd.RecordSeen(seen(Power.CREATED, waiting=Waiting("ensure", "E", text))),
        cmd.RecordSeen(seen(Power.CREATED, verdict=Verdict("E", text))),
    ):
        events = Stream().pass_time(900).do(command)
        assert events
        for event in events:
            stored = bytes(ev.REGISTRY.encode(event).data)
            assert b"\\u0000" not in stored
            assert b"\\u001b" not in stored
            assert len(stored) < 10_000
            json.loads(stored)


# Whether it can ever run again (A7: secrets are erased when not)


@pytest.mark.parametrize("phase", Phase)
def test_it_may_run_until_an_exit_a_loss_a_failure_or_an_end(phase: Phase):
    assert in_phase(phase).sandbox.may_run == (phase in (Phase.PENDING, *UP))


def test_a_loss_is_the_last_of_it_and_a_refused_pause_is_not():
    assert not in_phase(Phase.RUNNING).after(cmd.RecordLost(BEGIN)).sandbox.may_run
    assert in_phase(Phase.PAUSING).after(cmd.RecordPowerRefused("REFUSED", "no")).sandbox.may_run


# Another address of the same run


@pytest.mark.parametrize("power", [Power.RUNNING, Power.PAUSED])
def test_a_later_look_that_finds_another_address_is_told(power: Power):
    stream = ran_since()
    moved = cmd.RecordSeen(seen(power, started_at=BEGIN, address=THERE), "observe")
    assert ev.AddressChanged(THERE) in stream.do(moved)
    assert stream.sandbox.address == THERE
    assert stream.do(moved) == ()


@pytest.mark.parametrize("at", [BEGIN, None])
@pytest.mark.parametrize(
    "shown",
    [None, Address(HERE.network), Address(HERE.network, HERE.ip), Address(HERE.network, "", HERE.ports), HERE],
    ids=["nothing", "network", "ip", "ports", "all"],
)
def test_what_is_not_shown_overwrites_nothing(shown: Address | None, at: datetime | None):
    """An engine that restarts, and one that lists, show less than there is."""
    stream = ran_since()
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING, started_at=at, address=shown), "sweep")) == ()
    assert stream.sandbox.address == HERE


def test_an_address_of_an_earlier_run_is_no_news():
    stream = ran_since(LATER)
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING, started_at=BEGIN, address=THERE), "sweep")) == ()


def test_ports_alone_may_change():
    stream = ran_since()
    other = Address(HERE.network, HERE.ip, {"8080": "127.0.0.1:1"})
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING, started_at=BEGIN, address=other), "observe")) == (
        ev.AddressChanged(other),
    )


def test_one_that_ends_needs_no_address():
    stream = ran_since()
    stream.do(cmd.Terminate())
    assert stream.do(cmd.RecordSeen(seen(Power.RUNNING, started_at=BEGIN, address=THERE), "observe")) == ()
