"""Diagnostics end to end: the API process has no engine, and the worker that has one dies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.chaos.harness import ServerProcess, body, reaches, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]
SECRET = "s3cr3t-of-a-client"


async def test_the_workers_read_and_the_api_answers(serve: Serve, image: str):
    api = await serve("api", "api")
    first = await serve("worker", "first")
    async with api.client() as client:
        wanted = body(image, env={"PLAIN": SECRET})
        wanted["entrypoint"] = ["sh", "-c", 'echo "PLAIN=$PLAIN"; exec sleep 3600']
        made = (await client.post("/sandboxes", json=wanted, headers={"Prefer": "wait=60"})).json()["id"]
        await reaches(client, made, "Running")
        path = f"/sandboxes/{made}/diagnostics"

        async def is_there() -> bool:
            return "PLAIN=***" in (await client.get(f"{path}/logs")).text

        await until(is_there, "the log is read")
        first.kill()
        second = await serve("worker", "second")
        summary = await client.get(f"{path}/summary")
        assert summary.status_code == 200, "the next worker answers"
        assert "PLAIN=***" in summary.text

        assert (await client.delete(f"/sandboxes/{made}")).status_code == 204
        second.kill()
        await serve("worker", "third")
        await reaches(client, made, "Terminated")
        kept = (await client.get(f"{path}/logs?scope=container")).json()
        assert kept["content"].endswith(" PLAIN=***\n")
        assert "Exit Code:" in (await client.get(f"{path}/inspect")).text
        assert SECRET not in summary.text + kept["content"]
    assert SECRET not in api.log.read_text() + second.log.read_text()
