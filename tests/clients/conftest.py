"""Two API servers and two workers on one database, behind a round robin, and sandboxes with an agent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiodocker
import pytest
from msgspec import Struct

from tests.agent.image import ensure_agent_image
from tests.chaos.conftest import docker, home, image, serve  # noqa: F401 - fixtures
from tests.chaos.harness import KEY, ServerProcess
from tests.clients.front import Front


class Fleet(Struct, frozen=True):
    """What clients see is `front`; the rest is there to be killed."""

    front: Front
    apis: tuple[ServerProcess, ServerProcess]
    workers: tuple[ServerProcess, ServerProcess]

    def connection(self, **more: Any) -> dict[str, Any]:
        """Keywords of the SDK's connection."""
        return {"api_key": KEY, "domain": self.front.domain, **more}

    async def kill_one_of_each(self) -> None:
        for process in (self.apis[0], self.workers[0]):
            await asyncio.to_thread(process.kill)
        self.front.leave_out(self.apis[0].base)


@pytest.fixture
async def agent_image(docker: aiodocker.Docker) -> str:  # noqa: F811
    """The stand-in's, or that of SANDLEDGER_AGENT_IMAGE, which the engine must have."""
    return os.environ.get("SANDLEDGER_AGENT_IMAGE") or await ensure_agent_image(docker)


@pytest.fixture
async def fleet(serve: Callable[..., Awaitable[ServerProcess]], agent_image: str) -> AsyncIterator[Fleet]:  # noqa: F811
    runtime = f'execd_image = "{agent_image}"'
    # The first one makes the key of the installation; the others find it.
    first = await serve("api", "api1", runtime=runtime)
    second, *workers = await asyncio.gather(
        serve("api", "api2", runtime=runtime),
        serve("worker", "worker1", runtime=runtime),
        serve("worker", "worker2", runtime=runtime),
    )
    async with Front([first.base, second.base]) as front:
        yield Fleet(front, (first, second), (workers[0], workers[1]))


def once_all_are_there(parties: int, act: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    """What several lives await after their first acts. The last one to arrive acts, and then all go on."""
    arrived, acted = 0, asyncio.Event()

    async def between() -> None:
        nonlocal arrived
        arrived += 1
        if arrived == parties:
            await act()
            acted.set()
        await acted.wait()

    return between
