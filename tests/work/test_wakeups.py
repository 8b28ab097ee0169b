"""Who is woken by what: workers for work only, by others and not by themselves."""

from __future__ import annotations

import asyncio
from uuid import uuid4

from app.store.database.pool import Database
from app.store.log.signal import Signal


async def hearing(signal: Signal, other: Signal) -> None:
    """Until what the one says reaches the other."""
    probe = uuid4()
    with other.subscribe(probe) as news:
        async with asyncio.timeout(30):
            while not await news.wait(0.05):
                signal.poke(probe, work=False)


async def test_workers_of_other_processes_hear_of_work_and_of_nothing_else(database: Database, signal: Signal):
    other = Signal(database)
    task = asyncio.create_task(other.run())
    await hearing(signal, other)
    with other.subscribe_work() as work, signal.subscribe_work() as own, other.subscribe() as news:
        sandbox_id = uuid4()
        for _ in range(5):
            signal.poke(sandbox_id, work=False)
            assert await news.wait(30)
        assert not await work.wait(0), "each change of metadata would have cost a claim"
        signal.poke(sandbox_id, work=True)
        assert await work.wait(30)
        assert await own.wait(0), "in the same process it is at once"
        await hearing(other, signal)  # the echo has been here by now
        assert not await own.wait(0), "and its echo wakes nobody"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_last_words_are_sent(database: Database, signal: Signal):
    """What a worker hands back when it stops is for the others at once, not when they next look."""
    leaving = Signal(database)
    task = asyncio.create_task(leaving.run())
    await hearing(leaving, signal)
    last = uuid4()
    with signal.subscribe(last) as news, signal.subscribe_work() as work:
        leaving.poke(last)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await news.wait(30)
        assert await work.wait(30)
