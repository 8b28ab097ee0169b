"""Engines for driver tests. `REQUIRE_ENGINE=1` turns the skip of a missing engine into a failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiodocker
import aiohttp
import pytest

from app.cli.local_image import ensure_busybox_image
from app.errors import RuntimeUnavailable
from tests.drivers.registry import Registry
from tests.drivers.rig import BUSYBOX, Rig
from tests.drivers.rigs import DockerRig, FakeRig
from tests.support.needs import refuse_or_skip

PATIENCE = 30.0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engine: needs a real container engine; REQUIRE_ENGINE=1 forbids the skip")


async def prepare(address: str) -> None:
    async with aiodocker.Docker(address, timeout=aiohttp.ClientTimeout(total=60)) as docker:
        await ensure_busybox_image(docker, BUSYBOX)


@pytest.fixture(scope="session")
def engine(docker_host: str) -> str:
    """The address of an engine that answers and has the image that the tests run."""
    try:
        asyncio.run(prepare(docker_host))
    except RuntimeUnavailable as error:
        refuse_or_skip(f"no engine can be used: {error}")
    return docker_host


@pytest.fixture
async def docker_rig(engine: str) -> AsyncIterator[DockerRig]:
    rig = await DockerRig.start(engine)
    try:
        yield rig
    finally:
        await rig.close()


@pytest.fixture(params=["fake", pytest.param("docker", marks=pytest.mark.engine)])
def kind(request: pytest.FixtureRequest) -> str | None:
    """The address of a real engine, or None for the fake."""
    return request.getfixturevalue("engine") if request.param == "docker" else None


@pytest.fixture
async def rig(kind: str | None) -> AsyncIterator[Rig]:
    rig: Rig = FakeRig() if kind is None else await DockerRig.start(kind)
    try:
        yield rig
    finally:
        await rig.close()


@pytest.fixture
async def registry(docker_rig: DockerRig) -> Registry:
    return await docker_rig.registry()


@pytest.fixture
def eventually() -> Callable[[Callable[[], Any]], Awaitable[Any]]:
    """Poll until the question, sync or async, has a truthy answer; fail after a deadline."""

    async def poll(question: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = question()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return answer
            assert time.monotonic() < deadline, "it never happened"
            await asyncio.sleep(0.01)

    return poll
