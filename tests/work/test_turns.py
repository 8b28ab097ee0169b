"""Commits of snapshots are bounded, for one tenant too, and nobody's sandbox stands still in a line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

from app.domain.sandbox.observed import Power
from app.domain.sandbox.state import Phase
from app.domain.snapshot.state import SnapshotState
from app.runtime.fake import name_of
from app.work.turns import BEGIN_SECONDS, Turns
from tests.work.stage import Stage

READY = SnapshotState.READY


def commits(stage: Stage, count: int) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return len(stage.engine.commits) == count

    return reached


def still(stage: Stage, sources: list[UUID]) -> int:
    return sum(stage.engine.containers[name_of(each)].power is Power.PAUSED for each in sources)


async def many(stage: Stage, until: Any, count: int, tenant: str) -> tuple[list[UUID], list[UUID]]:
    """Sandboxes of a tenant, and a snapshot that is asked for of each."""
    sources = [await stage.create(tenant=tenant) for _ in range(count)]
    await until(stage.is_phase(Phase.RUNNING, *sources))
    return sources, [await stage.take(source) for source in sources]


async def test_without_a_bound_all_are_copied_at_once(stage: Stage, until: Any):
    """The naive way: the disk of the engine, and the snapshots of all others, wait for one client."""
    stage.engine.commit_gate = asyncio.Event()
    async with stage.working(stage.worker(commits=99, tenant_commits=99)):
        sources, ids = await many(stage, until, 6, "acme")
        await until(commits(stage, 6))
        assert still(stage, sources) == 6
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, *ids))


async def test_many_of_one_tenant_leave_a_turn_for_another(stage: Stage, until: Any):
    stage.engine.commit_gate = asyncio.Event()
    worker = stage.worker(commits=3, tenant_commits=2)
    async with stage.working(worker):
        sources, ids = await many(stage, until, 6, "acme")
        await until(commits(stage, 2))
        others, theirs = await many(stage, until, 1, "default")
        await until(commits(stage, 3))
        assert still(stage, others) == 1
        assert still(stage, sources) == 2, "who waits for a turn goes on meanwhile"
        stage.engine.commit_gate.set()
        await until(stage.is_snapshot(READY, *ids, *theirs))
        await until(stage.is_idle())
        assert still(stage, [*sources, *others]) == 0
    told = [event for source in sources for event in await stage.told(source, "acme")]
    assert told.count("frozen") == len(ids), "none stood still for nothing"


async def test_who_stands_still_already_comes_first(stage: Stage, until: Any):
    """Its freeze was asked for by a worker that has gone; the line of this one is full of others."""
    stage.engine.commit_gate = asyncio.Event()
    first = stage.worker(worker_id="w1")
    async with stage.working(first):
        (source,), (frozen,) = await many(stage, until, 1, "acme")
        await until(commits(stage, 1))
        left = set(stage.engine.commits)
    second = stage.worker(worker_id="w2", commits=1, tenant_commits=1)
    second.commits.turns.begin(holder := uuid4(), "default")
    async with stage.working(second):
        _, ids = await many(stage, until, 3, "other")

        async def in_line() -> bool:
            return second.commits.turns.waiting >= {frozen, *ids}

        await until(in_line)
        assert still(stage, [source]) == 1
        second.commits.turns.leave(holder)
        await until(commits(stage, 2))
        assert {task.get_name() for task in asyncio.all_tasks()} >= {f"commit-{frozen}"}
        stage.engine.commit_gate.set()
        await asyncio.gather(*left)
        await until(stage.is_snapshot(READY, frozen, *ids))


def turns(most: int, share: int) -> tuple[Turns, list[UUID], list[float]]:
    """Turns, who was woken, and a clock of one number."""
    woken: list[UUID] = []
    clock = [0.0]
    return Turns(most, share, woken.append, lambda: clock[0]), woken, clock


def test_the_tenant_with_the_fewest_turns_is_next():
    made, woken, _ = turns(2, 2)
    mine, theirs = [uuid4() for _ in range(4)], uuid4()
    assert [made.ask(each, "acme", stands_still=False) > 0 for each in mine] == [False, False, True, True]
    assert made.ask(theirs, "default", stands_still=False) > 0
    made.leave(mine[0])
    assert woken == [theirs]
    made.leave(mine[1])
    assert woken == [theirs, mine[2]], "then who asked first"
    assert made.ask(theirs, "default", stands_still=False) == 0


def test_a_turn_that_is_not_begun_ends_and_one_that_is_does_not():
    made, woken, clock = turns(1, 1)
    one, two, three = uuid4(), uuid4(), uuid4()
    assert made.ask(one, "a", stands_still=False) == 0
    assert made.ask(two, "b", stands_still=False) > 0
    clock[0] += BEGIN_SECONDS
    assert made.ask(two, "b", stands_still=False) == 0
    made.begin(two, "b")
    clock[0] += 1000 * BEGIN_SECONDS
    assert made.ask(three, "c", stands_still=False) > 0
    made.leave(two)
    assert woken == [three]


def test_who_does_not_ask_again_falls_out_of_the_line():
    made, woken, clock = turns(1, 1)
    gone, there = uuid4(), uuid4()
    made.begin(holder := uuid4(), "a")
    assert made.ask(gone, "b", stands_still=True) > 0
    clock[0] += 1000
    assert made.ask(there, "c", stands_still=False) > 0
    made.leave(holder)
    assert woken == [there]
