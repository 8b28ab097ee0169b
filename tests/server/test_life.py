"""The file by which a supervisor sees that a worker without a port is alive."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from app.server.life import life_file, show_life

LONG_AGO = 1_000_000_000


@asynccontextmanager
async def shown(path: Path, alive: list[bool]) -> AsyncIterator[asyncio.Queue[bool]]:
    """Shows life inside the block. The queue has one entry for each time that somebody was asked."""
    asked: asyncio.Queue[bool] = asyncio.Queue()

    def is_alive() -> bool:
        asked.put_nowait(alive[0])
        return alive[0]

    task = asyncio.create_task(show_life(is_alive, path, every=0.001))
    try:
        yield asked
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def rounds(asked: asyncio.Queue[bool], count: int) -> None:
    async with asyncio.timeout(20):
        for _ in range(count):
            await asked.get()


async def test_the_time_of_the_file_moves_only_while_all_loops_go_round(tmp_path: Path):
    path, alive = life_file(tmp_path / "not" / "there yet"), [True]
    async with shown(path, alive) as asked:
        await rounds(asked, 2)
        assert path.exists()
        os.utime(path, (LONG_AGO, LONG_AGO))
        await rounds(asked, asked.qsize() + 2)
        assert path.stat().st_mtime > LONG_AGO
        alive[0] = False
        await rounds(asked, asked.qsize() + 1)
        os.utime(path, (LONG_AGO, LONG_AGO))
        await rounds(asked, asked.qsize() + 3)
        assert path.stat().st_mtime == LONG_AGO


async def test_a_file_of_an_earlier_process_says_nothing(tmp_path: Path):
    path = life_file(tmp_path)
    path.touch()
    async with shown(path, [False]) as asked:
        await rounds(asked, 2)
        assert not path.exists()


async def test_a_folder_that_cannot_be_had_ends_no_server(tmp_path: Path):
    (tmp_path / "file").touch()
    async with asyncio.timeout(20):
        await show_life(lambda: True, life_file(tmp_path / "file"))
