"""Looks at a driver that several conformance cases share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

from app.runtime.driver import Driver, FetchedImage, Image, InstalledAgent, Leftover, Observed, Power, Ref, Workload
from app.runtime.faults import AttemptFailed, ImageMissing
from tests.drivers.rig import Rig

Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]


def id_of(seen: Observed) -> str:
    """The engine's own id of the part that runs the workload."""
    assert seen.main is not None
    return seen.main.runtime_id


async def power_of(driver: Driver, ref: Ref) -> Power | None:
    seen = await driver.observe(ref)
    return seen.power if seen else None


async def inventory(driver: Driver) -> list[Observed]:
    return [seen async for seen in driver.inventory() if isinstance(seen, Observed)]


async def leftovers(driver: Driver) -> list[Leftover]:
    return [seen async for seen in driver.inventory() if isinstance(seen, Leftover)]


async def fetch(driver: Driver, reference: str, **changes: Any) -> FetchedImage:
    return await driver.fetch(Image(reference, **changes), lambda _: None)


async def run(driver: Driver, work: Workload) -> Observed:
    """Ensure, with a fetch before it, as a worker does."""
    try:
        return await driver.ensure(work)
    except ImageMissing:
        await driver.fetch(work.image, lambda _: None)
        return await driver.ensure(work)


async def insist(driver: Driver, image: str) -> InstalledAgent:
    """Again as long as another one copies, as a worker does."""
    while True:
        try:
            return await driver.install_agent(image)
        except AttemptFailed as failed:
            assert failed.reason == "AGENT_INSTALLING"  # noqa: PT017
            await asyncio.sleep(0)


async def exited(rig: Rig, work: Workload, eventually: Eventually) -> Observed:
    async def look() -> Observed | None:
        seen = await rig.driver.observe(work.ref)
        return seen if seen is not None and seen.power is Power.EXITED else None

    return await eventually(look)


@asynccontextmanager
async def heard(rig: Rig, eventually: Eventually) -> AsyncIterator[set[UUID]]:
    ids: set[UUID] = set()

    async def listen() -> None:
        async for hint in rig.driver.hints():
            if hint is not None:
                ids.add(hint.object_id)

    task = asyncio.create_task(listen())
    try:
        await eventually(rig.listening)
        yield ids
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
