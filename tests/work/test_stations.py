"""A worker that cannot use its engine is not silent about it."""

from __future__ import annotations

from typing import Any

from tests.work.stage import Stage


async def test_a_worker_whose_engine_never_answered_says_so(stage: Stage, until: Any):
    """No stream of that engine is in the log, since there was no contact."""
    stage.engine.down = True
    stage.engine_name = "elsewhere"

    async def said() -> list[Any]:
        return await stage.sql("SELECT name, engine, trouble FROM stations")

    async def told() -> bool:
        return any("no contact" not in row["trouble"] for row in await said())

    async def silent() -> bool:
        return not await said()

    async with stage.working(stage.worker()):
        await until(told)
        (row,) = await said()
        assert (row["name"], row["engine"]) == ("test", "elsewhere")
        stage.engine.down = False
        await until(silent)
