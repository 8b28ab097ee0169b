"""Trouble that never ends still leaves a trace that somebody can read."""

from __future__ import annotations

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase
from app.errors import RuntimeUnavailable
from tests.work.stage import Raiser, Stage


async def refused(stage: Stage, call: str, times: int) -> list[ev.ReconcileFailed]:
    """A sandbox whose `call` the engine, which is otherwise well, answers with 5xx so many times."""
    worker = stage.worker(stage.driver(before=Raiser(lambda: RuntimeUnavailable("500: disk full"), call)))
    sandbox_id = await stage.create()
    if call == "remove":
        await stage.settle(worker)
        await stage.ask(sandbox_id, cmd.Terminate())
    for _ in range(times):
        await stage.turn(worker)
        await stage.make_due(sandbox_id)
    assert not worker.station.open
    assert (await stage.row(sandbox_id))["attempts"] == 0, "refusals give nobody up"
    return [fact.event for fact in await stage.history(sandbox_id) if isinstance(fact.event, ev.ReconcileFailed)]


async def test_a_create_that_the_engine_refuses_again_and_again_is_told_thinly(stage: Stage) -> None:
    told = await refused(stage, "create", 25)
    assert [(event.step, event.reason, event.attempt) for event in told] == [
        ("ensure", "RUNTIME_UNAVAILABLE", 3),
        ("ensure", "RUNTIME_UNAVAILABLE", 10),
    ]
    assert "disk full" in told[0].message


async def test_a_removal_that_the_engine_refuses_again_and_again_is_told(stage: Stage) -> None:
    assert [event.step for event in await refused(stage, "remove", 4)] == ["remove"]


async def test_two_refusals_are_nobodys_history(stage: Stage) -> None:
    assert await refused(stage, "create", 2) == []


async def test_a_head_that_cannot_be_read_waits_longer_each_time_and_the_queue_says_why(stage: Stage) -> None:
    """Else every lease ends in the same traceback, and no operator sees which sandbox it is."""
    sandbox_id = await stage.create()
    (row,) = await stage.sql("SELECT app_role FROM installation")
    app_role = row["app_role"]
    await stage.sql(f"REVOKE SELECT ON sandboxes FROM {app_role}")
    worker = stage.worker()
    for attempt in (1, 2, 3):
        await stage.make_due(sandbox_id)
        await stage.turn(worker)
        row = await stage.row(sandbox_id)
        assert (row["attempts"], row["last_reason"], row["lease_owner"]) == (attempt, "INTERNAL_ERROR", None)
    await stage.sql(f"GRANT SELECT ON sandboxes TO {app_role}")
    await stage.make_due(sandbox_id)
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.RUNNING
