"""Looks at a driver that several conformance cases share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

from app.runtime.driver import Driver, Observed, Power, Workload
from tests.drivers.rigs import Rig

Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]


async def power_of(driver: Driver, sandbox_id: UUID) -> Power | None:
    seen = await driver.observe(sandbox_id)
    return seen.power if seen else None


async def inventory(driver: Driver) -> list[Observed]:
    return [seen async for seen in driver.inventory()]


async def exited(rig: Rig, work: Workload, eventually: Eventually) -> Observed:
    async def look() -> Observed | None:
        seen = await rig.driver.observe(work.sandbox_id)
        return seen if seen is not None and seen.power is Power.EXITED else None

    return await eventually(look)


@asynccontextmanager
async def heard(rig: Rig, eventually: Eventually) -> AsyncIterator[set[UUID]]:
    ids: set[UUID] = set()

    async def listen() -> None:
        async for sandbox_id in rig.driver.hints():
            if sandbox_id is not None:
                ids.add(sandbox_id)

    task = asyncio.create_task(listen())
    try:
        await eventually(rig.listening)
        yield ids
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
