"""Diagnostics end to end: the API process has no engine, and the worker that has one dies."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from opensandbox import SandboxManager
from opensandbox.config import ConnectionConfig
from opensandbox.exceptions import SandboxApiException

from tests.chaos.harness import KEY, ServerProcess, body, reaches, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]
SECRET = "s3cr3t-of-a-client"


@pytest.fixture
async def talking(serve: Serve, image: str) -> tuple[ServerProcess, str]:
    """A server, and a sandbox that has printed its secret."""
    server = await serve()
    async with server.client() as client:
        wanted = body(image, env={"PLAIN": SECRET})
        wanted["entrypoint"] = ["sh", "-c", 'echo "PLAIN=$PLAIN"; exec sleep 3600']
        made = (await client.post("/sandboxes", json=wanted, headers={"Prefer": "wait=60"})).json()["id"]

        async def is_there() -> bool:
            return "PLAIN=***" in (await client.get(f"/sandboxes/{made}/diagnostics/logs")).text

        await until(is_there, "the log is read")
    return server, made


@pytest.mark.proof
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


COMMANDS = {
    ("diagnostics", "logs", "{id}", "--scope", "container", "-o", "raw"): "PLAIN=***",
    ("diagnostics", "events", "{id}", "--scope", "all", "-o", "raw"): " started by reconciler ",
    ("devops", "logs", "{id}", "--tail", "5"): "PLAIN=***",
    ("devops", "events", "{id}"): " started by reconciler ",
    ("devops", "inspect", "{id}"): "Name:           sandbox-{id}",
    ("devops", "summary", "{id}"): "LOGS (last 50 lines)",
}
"""Of the public command line: what to call, and what it shows."""


@pytest.mark.proof
async def test_the_public_clients(talking: tuple[ServerProcess, str]):
    server, sandbox_id = talking
    domain = server.base.removeprefix("http://").removesuffix("/v1")
    environ = os.environ | {"OPEN_SANDBOX_DOMAIN": domain, "OPEN_SANDBOX_API_KEY": KEY}
    osb = str(Path(sys.executable).with_name("osb"))
    for words, expected in COMMANDS.items():
        command = [osb, *(word.format(id=sandbox_id) for word in words)]
        done = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, env=environ, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
        assert expected.format(id=sandbox_id) in done.stdout
        assert SECRET not in done.stdout

    manager = await SandboxManager.create(ConnectionConfig(api_key=KEY, domain=domain))
    try:
        logs = await manager.get_diagnostic_logs(sandbox_id, "container")
        events = await manager.get_diagnostic_events(sandbox_id, "all")
        with pytest.raises(SandboxApiException) as caught:
            await manager.get_diagnostic_logs(sandbox_id, "lifecycle")
    finally:
        await manager.close()
    assert (logs.scope, logs.delivery, logs.truncated) == ("container", "inline", False)
    assert (logs.content or "").endswith(" PLAIN=***\n")
    assert events.warnings
    assert caught.value.error.code == "DIAGNOSTICS_SCOPE_UNSUPPORTED"
