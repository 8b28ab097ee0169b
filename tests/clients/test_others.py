"""Public clients that are not the Python SDK: JavaScript, MCP, LangChain. Unmodified, through whole lives."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.harness import KEY
from tests.clients.conftest import Fleet, once_all_are_there
from tests.clients.programs import javascript, mcp, node, plain
from tests.support.environments import fetched

pytestmark = [pytest.mark.engine, pytest.mark.proof, pytest.mark.timeout(300)]
HERE = Path(__file__).parent


async def play(words: list[str | Path], between: Callable[[], Awaitable[None]]) -> None:
    """Run a life that says `act` after each act, and `end`."""
    process = await asyncio.create_subprocess_exec(
        *map(str, words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=plain()
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    try:
        acts = 0
        while (said := (await process.stdout.readline()).decode().strip()) == "act":
            acts += 1
            if acts == 1:
                await between()
            process.stdin.write(b"\n")
        assert (await process.wait(), said) == (0, "end"), (await errors).decode()[-3000:]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await errors


async def test_whole_lives_while_servers_die(fleet: Fleet, image: str):
    """All at once, each direct and through the server."""
    sdk, environment = await asyncio.gather(asyncio.to_thread(javascript), asyncio.to_thread(fetched, "clients"))
    between = once_all_are_there(6, fleet.kill_one_of_each)
    domain, lives = fleet.front.domain, list[Awaitable[None]]()
    for proxied in (False, True):
        given: dict[str, Any] = {"domain": domain, "apiKey": KEY, "image": image, "useServerProxy": proxied}
        lives.append(play([node(), HERE / "javascript" / "life.mjs", sdk, json.dumps(given)], between))
        given = fleet.connection(use_server_proxy=proxied, image=image)
        lives.append(play([environment / "bin" / "python", HERE / "langchain_life.py", json.dumps(given)], between))
        lives.append(mcp_life(environment, domain, image, between, proxied=proxied))
    await asyncio.gather(*lives)


async def mcp_life(
    environment: Path, domain: str, image: str, between: Callable[[], Awaitable[None]], *, proxied: bool
):
    async with mcp(environment, domain, KEY, proxied=proxied) as server:
        tools = {tool["name"] for tool in (await server.ask("tools/list"))["tools"]}
        limits = {"cpu": "250m", "memory": "128Mi"}
        made = await server.call("sandbox_create", image=image, entrypoint=["sleep", "3600"], resource=limits)
        one: Any = {"sandbox_id": made["sandbox_id"]}
        ran = await server.call("command_run", **one, command="echo from a tool")
        assert [line["text"] for line in ran["logs"]["stdout"]] == ["from a tool"]
        begun = await server.call("command_run", **one, command="sleep 3600", background=True)
        await server.call("command_interrupt", **one, execution_id=begun["id"])
        await between()
        await server.call("file_create_directories", **one, entries=[{"path": "/tmp/m"}])
        await server.call("file_write", **one, path="/tmp/m/a.txt", content="alpha")
        await server.call("file_replace_contents", **one, entries=[_replace("/tmp/m/a.txt", "alpha", "beta")])
        await server.call("file_move", **one, entries=[{"source": "/tmp/m/a.txt", "destination": "/tmp/m/b.txt"}])
        assert "beta" in str(await server.call("file_read", **one, path="/tmp/m/b.txt"))
        assert "/tmp/m/b.txt" in str(await server.call("file_search", **one, path="/tmp/m", pattern="*.txt"))
        await server.call("file_delete", **one, paths=["/tmp/m/b.txt"])
        await server.call("file_delete_directories", **one, paths=["/tmp/m"])
        assert (await server.call("sandbox_healthcheck", **one))["healthy"]
        assert "memory" in str(await server.call("sandbox_get_metrics", **one))
        assert ":" in str(await server.call("sandbox_get_endpoint", **one, port=3000))
        await server.call("sandbox_renew", **one, timeout_seconds=3600)
        assert (await server.call("sandbox_get_info", **one))["status"]["state"] == "Running"
        assert made["sandbox_id"] in str(await server.call("sandbox_list"))
        await server.call("sandbox_connect", **one)
        await server.call("sandbox_kill", **one)
        assert tools == server.called


def _replace(path: str, old: str, new: str) -> dict[str, str]:
    return {"path": path, "old_content": old, "new_content": new}
