"""The log explains itself: every event that follows from another names it."""

from __future__ import annotations

from uuid import UUID

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Exit
from app.errors import RuntimeRejected
from app.runtime.driver import Power
from app.runtime.fake import name_of as container_of
from tests.work.stage import Raiser, Stage, name_of


async def causes(stage: Stage, sandbox_id: UUID) -> list[tuple[str, str | None]]:
    """Each event, and the one it names as its cause."""
    history = await stage.history(sandbox_id)
    names = {fact.position: name_of(fact.event) for fact in history}
    for fact in history:
        assert fact.meta.cause is None or fact.meta.cause < fact.position
    return [(names[fact.position], None if fact.meta.cause is None else names[fact.meta.cause]) for fact in history]


async def test_a_life_on_request(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    assert await causes(stage, sandbox_id) == [
        ("requested", None),
        ("placed", None),
        ("fetched", "placed"),
        ("runtime_created", "placed"),
        ("started", "placed"),
        ("ready", "placed"),
        ("termination_requested", None),
        ("runtime_removed", "termination_requested"),
        ("terminated", "termination_requested"),
    ]


async def test_what_is_cleared_away_after_a_failure_follows_from_the_failure(stage: Stage):
    refuses = Raiser(lambda: RuntimeRejected("IMAGE_NOT_FOUND", "no such image"), "create")
    sandbox_id = await stage.create()
    await stage.settle(stage.worker(stage.driver(before=refuses)))
    assert await causes(stage, sandbox_id) == [
        ("requested", None),
        ("placed", None),
        ("failed", "placed"),
        ("runtime_removed", "failed"),
    ]


async def test_what_is_put_right_follows_from_what_was_found(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    stage.engine.set_power(container_of(sandbox_id), Power.PAUSED)
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    assert (await causes(stage, sandbox_id))[-2:] == [("paused", None), ("resumed", "paused")]


async def test_an_exit_at_once_follows_from_the_start(stage: Stage):
    stage.engine.scripts[sandbox_id := await stage.create()] = Exit(3)
    await stage.settle(stage.worker())
    assert (await causes(stage, sandbox_id))[-1] == ("runtime_exited", "ready")


async def test_what_follows_a_pull_follows_from_the_image(stage: Stage):
    stage.pull("big")
    sandbox_id = await stage.create(image="big")
    await stage.settle(stage.worker())
    assert (await causes(stage, sandbox_id))[2:] == [
        ("waiting", "placed"),
        ("fetched", "waiting"),
        ("runtime_created", "fetched"),
        ("started", "fetched"),
        ("ready", "fetched"),
    ]
