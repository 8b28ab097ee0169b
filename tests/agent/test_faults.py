"""The faults that the stand-in agent plays, on this machine and without a container."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from app.agent import TOKEN_HEADER
from tests.agent.conftest import TOKEN
from tests.agent.image import STANDIN
from tests.support.cluster import free_port

Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]


@asynccontextmanager
async def agent(**env: str) -> AsyncIterator[tuple[aiohttp.ClientSession, asyncio.subprocess.Process]]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, STANDIN / "execd.py", "-port", str(port), env={"EXECD_ACCESS_TOKEN": TOKEN, **env}
    )
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers={TOKEN_HEADER: TOKEN}) as session:
            yield session, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ping(session: aiohttp.ClientSession) -> int | None:
    try:
        async with session.get("/ping") as answer:
            return answer.status
    except aiohttp.ClientError:
        return None


async def test_without_a_fault(eventually: Eventually):
    async with agent() as (session, _):
        assert await eventually(lambda: ping(session)) == 200


async def test_another_token(eventually: Eventually):
    async with agent(STANDIN_TOKEN="another") as (session, _):
        assert await eventually(lambda: ping(session)) == 401


async def test_another_service(eventually: Eventually):
    async with agent(STANDIN_OTHER="1") as (session, _):
        assert await eventually(lambda: ping(session)) == 404


async def test_no_answer():
    async with agent(STANDIN_SILENT="1") as (session, _):
        connected = asyncio.Event()
        while not connected.is_set():
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
            except OSError:
                await asyncio.sleep(0.01)
            else:
                writer.close()
                connected.set()
        with pytest.raises(TimeoutError):
            await session.get("/ping", timeout=aiohttp.ClientTimeout(total=0.2))


async def test_death_after_some_requests(eventually: Eventually):
    async with agent(STANDIN_DIES_AFTER="2") as (session, process):
        assert await eventually(lambda: ping(session)) == 200
        assert await ping(session) == 200
        assert await ping(session) is None
        assert await process.wait() == 1


async def test_a_late_start(eventually: Eventually):
    async with agent(STANDIN_LATE_SECONDS="0.3") as (session, _):
        asked_in_vain = 0
        while await ping(session) is None:
            asked_in_vain += 1
            await asyncio.sleep(0.01)
        assert asked_in_vain > 5
