"""What clients are told of a state, by example."""

from __future__ import annotations

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.observed import Exit, Power, Waiting
from app.domain.sandbox.state import Phase
from app.domain.sandbox.status import Attempt, status_of
from tests.support.stream import BEGIN, Stream, in_phase, seen

PROVISIONED = "Sandbox is accepted; its container is being provisioned."
AWAY = "Sandbox is accepted; it waits for its engine, which cannot be used at the moment."


def told(stream: Stream, attempt: Attempt | None = None) -> tuple[str, str]:
    status = status_of(stream.sandbox, attempt)
    assert (status.state, status.last_transition_at) == (stream.sandbox.phase, stream.sandbox.changed_at)
    return status.reason, status.message


def waits(step: str, reason: str, message: str = "") -> Stream:
    return Stream().after(cmd.RecordWaiting(step, reason, message))


@pytest.mark.parametrize(
    ("stream", "attempt", "reason", "message"),
    [
        (Stream(), None, "SANDBOX_PENDING", PROVISIONED),
        (Stream(), Attempt(claimed=True), "SANDBOX_PENDING", PROVISIONED),
        (
            Stream(),
            Attempt(waits_for_slot=True),
            "WAITING_FOR_SLOT",
            "Sandbox is accepted; it waits for a worker that is free.",
        ),
        (Stream(), Attempt(waits_for_slot=True, engine_away=True), "RUNTIME_UNAVAILABLE", AWAY),
        (waits("fetch", "IMAGE_PULLING"), Attempt(engine_away=True), "RUNTIME_UNAVAILABLE", AWAY),
        (
            Stream(),
            Attempt(waits_for_slot=True, last_reason="RUNTIME_UNAVAILABLE", last_error="no such socket"),
            "RUNTIME_UNAVAILABLE",
            f"{AWAY} The last attempt failed with RUNTIME_UNAVAILABLE: no such socket; it will be repeated.",
        ),
        (
            Stream(placed=False).after(cmd.RecordWaiting("place", "NO_CAPACITY", "default is full")),
            None,
            "NO_CAPACITY",
            "default is full.",
        ),
        (waits("fetch", "IMAGE_PULLING"), None, "IMAGE_PULLING", "Sandbox waits in step fetch."),
        (
            waits("fetch", "IMAGE_PULLING", "The image is being pulled"),
            Attempt(progress="3 of 7 layers, 41.2 of 120.0 MB"),
            "IMAGE_PULLING",
            "The image is being pulled. 3 of 7 layers, 41.2 of 120.0 MB.",
        ),
        (Stream().observe(Power.CREATED), None, "CONTAINER_STARTING", "Sandbox container is starting."),
        (
            Stream().observe(Power.CREATED, waiting=Waiting("ensure", "POD_UNSCHEDULABLE", "0/3 nodes.")),
            None,
            "POD_UNSCHEDULABLE",
            "0/3 nodes.",
        ),
    ],
)
def test_what_is_pending_says_what_it_waits_for(stream: Stream, attempt: Attempt | None, reason: str, message: str):
    assert told(stream, attempt) == (reason, message)


@pytest.mark.parametrize(
    ("stream", "attempt", "reason", "message"),
    [
        (
            Stream(),
            Attempt(attempts=2, last_reason="START_FAILED", last_error="no more disk."),
            "START_FAILED",
            (
                "Sandbox is accepted; it could not be provided yet. Attempt 2 failed with START_FAILED: no more disk; it "
                "will be repeated."
            ),
        ),
        (
            Stream(),
            Attempt(claimed=True, attempts=2, last_error="no more disk"),
            "SANDBOX_PENDING",
            (
                "Sandbox is accepted; it could not be provided yet. Attempt 2 failed: no more disk; the next one is under "
                "way."
            ),
        ),
        (
            Stream(),
            Attempt(last_reason="RUNTIME_UNAVAILABLE", last_error="Connection refused"),
            "RUNTIME_UNAVAILABLE",
            (
                "Sandbox is accepted; it could not be provided yet. The last attempt failed with RUNTIME_UNAVAILABLE: "
                "Connection refused; it will be repeated."
            ),
        ),
        (
            Stream().after(cmd.RecordRetry("ensure", "START_FAILED", "no more disk", 1)),
            Attempt(attempts=1, last_reason="START_FAILED", last_error="no more disk"),
            "START_FAILED",
            "no more disk. Attempt 1 failed with START_FAILED; it will be repeated.",
        ),
        (
            waits("fetch", "IMAGE_PULLING", "The image is being pulled."),
            Attempt(attempts=3, last_reason="IMAGE_PULL_FAILED", last_error="EOF", progress="1 of 7 layers"),
            "IMAGE_PULLING",
            (
                "The image is being pulled. 1 of 7 layers. Attempt 3 failed with IMAGE_PULL_FAILED: EOF; it will be "
                "repeated."
            ),
        ),
        (
            Stream(),
            Attempt(attempts=4),
            "SANDBOX_PENDING",
            "Sandbox is accepted; it could not be provided yet. Attempt 4 failed; it will be repeated.",
        ),
    ],
)
def test_what_is_pending_says_what_went_wrong(stream: Stream, attempt: Attempt, reason: str, message: str):
    assert told(stream, attempt) == (reason, message)


def test_it_never_just_is_being_provisioned_while_attempts_fail():
    for attempts in (0, 1, 7):
        for reason in (None, "E"):
            for error in (None, "boom"):
                attempt = Attempt(attempts=attempts, last_reason=reason, last_error=error)
                for stream in (Stream(), Stream(placed=False), Stream().observe(Power.CREATED)):
                    _, message = told(stream, attempt)
                    assert ("failed" in message) == bool(attempts or reason or error)
                    assert error is None or error in message
                    assert reason is None or reason in message
                    assert PROVISIONED not in message or not (attempts or reason or error)


@pytest.mark.parametrize("phase", sorted(set(Phase) - {Phase.PENDING}))
def test_the_queue_is_shown_of_what_is_pending_only(phase: Phase):
    stream = in_phase(phase)
    attempt = Attempt(waits_for_slot=True, attempts=3, last_reason="E", last_error="boom", progress="1 of 7")
    assert told(stream, attempt) == told(stream)


@pytest.mark.parametrize(
    ("phase", "reason", "message"),
    [
        (Phase.RUNNING, "CONTAINER_RUNNING", "Sandbox container is running."),
        (Phase.PAUSING, "PAUSING", "Sandbox container is being paused."),
        (Phase.PAUSED, "CONTAINER_PAUSED", "Sandbox container is paused."),
        (Phase.RESUMING, "RESUMING", "Sandbox container is being resumed."),
        (Phase.TERMINATED, "CONTAINER_EXITED", "Sandbox container exited successfully."),
        (Phase.FAILED, "IMAGE_NOT_FOUND", "no such image"),
    ],
)
def test_what_is_not_pending(phase: Phase, reason: str, message: str):
    assert told(in_phase(phase)) == (reason, message)


def test_a_failure_without_a_text_names_its_step():
    stream = Stream().after(cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", ""))
    assert told(stream) == ("IMAGE_NOT_FOUND", "Sandbox failed in step fetch.")


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (Exit(127, message="not found."), "Sandbox container exited with code 127: not found."),
        (Exit(1), "Sandbox container exited with code 1."),
        (Exit(), "Sandbox container exited with a code that the engine did not keep."),
        (Exit(137, oom=True), "Sandbox container ran out of memory and was killed, with exit code 137."),
        (
            Exit(143, reason="EVICTED", message="disk"),
            "Sandbox container exited with code 143, as after SIGTERM (EVICTED): disk.",
        ),
        (Exit(137), "Sandbox container exited with code 137, as after SIGKILL."),
        (Exit(139), "Sandbox container exited with code 139, as after SIGSEGV."),
        (Exit(128), "Sandbox container exited with code 128."),
        (Exit(255), "Sandbox container exited with code 255."),
        (Exit(-9), "Sandbox container exited with code -9."),
        (
            Exit(137, reason="ENGINE_STOPPED"),
            (
                "Sandbox container ended with exit code 137 while its engine was stopped or restarting; the engine ends its "
                "containers then unless it runs with live-restore."
            ),
        ),
        (
            Exit(reason="ENGINE_STOPPED"),
            (
                "Sandbox container ended with a code that the engine did not keep while its engine was stopped or "
                "restarting; the engine ends its containers then unless it runs with live-restore."
            ),
        ),
    ],
)
def test_an_exit_is_explained_and_stays_so_after_its_removal(end: Exit, message: str):
    stream = in_phase(Phase.RUNNING).observe(Power.EXITED, end=end)
    assert told(stream) == ("CONTAINER_EXITED_ERROR", message)
    assert told(stream.after(cmd.RecordRemoved())) == ("CONTAINER_EXITED_ERROR", message)


def test_an_exit_with_code_0_while_the_engine_was_away_says_so_too():
    stream = in_phase(Phase.RUNNING).observe(Power.EXITED, end=Exit(0, reason="ENGINE_STOPPED"))
    reason, message = told(stream)
    assert (stream.sandbox.phase, reason) == (Phase.TERMINATED, "CONTAINER_EXITED")
    assert "while its engine was stopped or restarting" in message


def test_a_loss_still_reads_as_one_after_the_leftovers_are_removed():
    stream = in_phase(Phase.RUNNING).after(cmd.RecordLost(BEGIN))
    lost = told(stream)
    assert lost == ("RUNTIME_LOST", "Sandbox container disappeared from the engine without being asked to.")
    assert told(stream.after(cmd.RecordRemoved())) == lost


def test_an_end_names_when_and_by_whom():
    stream = in_phase(Phase.RUNNING).pass_time(1.5).after(cmd.Terminate())
    ended = "deleted by api_key default at 2026-03-01T12:00:01.500000Z"
    assert told(stream) == ("USER_DELETE", f"Sandbox is being removed: {ended}.")
    assert told(stream.after(cmd.RecordRemoved())) == ("USER_DELETE", f"Sandbox has ended: {ended}.")


def test_what_never_ran_expires_in_words_of_its_own():
    stream = Stream().pass_time(600).after(cmd.Expire())
    assert told(stream) == (
        "EXPIRED_WHILE_PENDING",
        "Sandbox is being removed: expired before it could be provisioned, by api_key default at 2026-03-01T12:10:00Z.",
    )


def test_an_end_in_a_word_of_a_newer_version_is_shown_as_it_is():
    stream = Stream().apply(ev.TerminationRequested("drained"))
    assert told(stream)[0] == "DRAINED"
    assert "ended (drained) by api_key default" in told(stream)[1]


def test_while_it_is_pending_a_new_run_hides_the_exit_of_the_one_before():
    stream = Stream().observe(Power.RUNNING, started_at=BEGIN)
    assert stream.sandbox.runtime is not None
    stream.do(cmd.RecordSeen(seen(Power.EXITED, end=Exit(1))))
    stream.apply(ev.Restarted(2))
    assert told(stream)[0] == "AGENT_STARTING"
