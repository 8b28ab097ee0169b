"""The postmaster is killed while two servers that share it accept creates: each 202 is kept, each sandbox made once."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiodocker
import httpx
import pytest

from tests.chaos.harness import Engine, ServerProcess, body, end, reaches, until, write_config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
WANTED = 4
"""Accepted creates a server before the kill, and again after it."""


def embedded(home: Path, docker_host: str, name: str) -> Path:
    config = write_config(home, "x", docker_host, name)
    config.write_text("\n".join(line for line in config.read_text().splitlines() if not line.startswith("dsn")))
    return config


@pytest.mark.proof
async def test_accepted_is_kept_whoever_is_killed(home: Path, docker_host: str, image: str, docker: aiodocker.Docker):
    one, two = (ServerProcess(embedded(home, docker_host, name)) for name in ("one", "two"))
    seen = Engine(docker)
    accepted: list[list[str]] = [[], []]
    try:
        for server in (one, two):
            await asyncio.to_thread(server.start)
        async with one.client() as first, two.client() as second:

            async def load(client: httpx.AsyncClient, ids: list[str], most: int) -> None:
                while len(ids) < most:
                    answer = await client.post("/sandboxes", json=body(image))
                    assert answer.status_code in (202, 503), answer.text
                    if answer.status_code == 202:
                        ids.append(answer.json()["id"])

            loads = [
                asyncio.create_task(load(*pair, 2 * WANTED)) for pair in ((first, accepted[0]), (second, accepted[1]))
            ]

            async def half() -> bool:
                return all(len(ids) >= WANTED for ids in accepted)

            await until(half, "some are accepted")
            pid_file = next(home.rglob("postmaster.pid"))
            os.kill(int(pid_file.read_text().split("\n", 1)[0]), signal.SIGKILL)
            await asyncio.gather(*loads)
            one.kill()
            ids = [*accepted[0], *accepted[1]]
            await asyncio.gather(*(reaches(second, sandbox, "Running", 90) for sandbox in ids))
            for sandbox in ids:
                assert len(await seen.containers(sandbox=sandbox)) == 1
            for sandbox in ids:
                assert (await second.delete(f"/sandboxes/{sandbox}")).status_code == 204
            await asyncio.gather(*(reaches(second, sandbox, "Terminated", 90) for sandbox in ids))
        two.send(signal.SIGTERM)
        assert await asyncio.to_thread(two.wait) == 0
    finally:
        await end(docker, (one, two))
