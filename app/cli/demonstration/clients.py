"""A user's program with the public SDK, run as a process of its own: in a sandbox directly, and through the server.

It needs an image with the agent that the engine has, which the caller names, and the package `opensandbox` beside us,
which is no dependency of ours.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.util import find_spec
from typing import Any, cast

from app.cli.demonstration.server import environment

SDK = "opensandbox"
PROGRAM = """\
import os
from opensandbox import SandboxSync
from opensandbox.config.connection_sync import ConnectionConfigSync

image, proxy = os.environ["IMAGE"], ConnectionConfigSync(use_server_proxy=True)
sandbox = SandboxSync.create(image, entrypoint=["sleep", "3600"], resource={"cpu": "250m", "memory": "64Mi"})
print(sandbox.id)
print(sandbox.commands.run("echo $(hostname) answers directly").logs.stdout[0].text)
sandbox.files.write_file("/tmp/note", "kept in the sandbox")
with SandboxSync.connect(sandbox.id, connection_config=proxy) as proxied:
    print(proxied.commands.run("echo through the server: $(cat /tmp/note)").logs.stdout[0].text)
sandbox.kill()
"""
ANSWERS = ("answers directly", "through the server: kept in the sandbox")


def has_sdk() -> bool:
    """Whether this Python has the public SDK."""
    return find_spec(SDK) is not None


async def run_program(base: str, image: str) -> tuple[str, list[str]]:
    """The sandbox's id and the two lines that its commands printed. Raises ValueError with what it said instead."""
    given = {"OPEN_SANDBOX_DOMAIN": base.removeprefix("http://"), "IMAGE": image}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment() | given,
    )
    printed, _ = await process.communicate()
    lines = printed.decode(errors="replace").splitlines()
    if process.returncode != 0 or len(lines) != 1 + len(ANSWERS):
        raise ValueError("\n".join(lines[-20:]))
    return lines[0], lines[1:]


async def remove_agent(docker: Any, label: str, installation: str) -> None:
    """The agent's files, which an engine keeps for the next sandbox: this installation has none any more."""
    filters = json.dumps({"label": [f"{label}={installation}", "sandledger.io/role=agent"]})
    for container in await docker.containers.list(all=True, filters=filters):
        await container.delete(force=True)
    listed = await docker.volumes.list(filters={"label": [f"{label}={installation}", "sandledger.io/role=agent"]})
    for volume in cast("list[dict[str, Any]]", listed["Volumes"] or []):
        await (await docker.volumes.get(volume["Name"])).delete()
