"""One sandbox with the agent for all checks of a module.

With SANDLEDGER_AGENT_IMAGE set, the agent is that of the named image, which the engine must have.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from msgspec import Struct
from opensandbox.config import ConnectionConfig
from opensandbox.models.sandboxes import SandboxEndpoint

from app.agent import TOKEN_HEADER
from app.runtime.workload import AGENT_PORT, Agent
from tests.agent.image import ensure_agent_image
from tests.drivers.conftest import engine, eventually  # noqa: F401 - fixtures
from tests.drivers.rigs import DockerRig

Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]
TOKEN = "t0ken-of-a-sandbox"
PROGRAM = r"""
head=
while IFS= read -r line; do
    line=${line%?}
    [ -n "$line" ] || break
    head="$head$line
"
done
case $head in
    */stream*) printf 'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 1\n\n'; read go < /tmp/go
        printf 'data: 2\n\n' ;;
    *"Upgrade: websocket"*) printf 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n'
        printf 'Sec-WebSocket-Protocol: chat\r\n\r\n'; exec cat ;;
    *) printf 'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n%s' "$head" ;;
esac
"""
"""What listens on port 3000: answers with the head that it got, streams two events, or switches to an echo."""


class Sandbox(Struct, frozen=True):
    """A running sandbox with an agent."""

    object_id: UUID
    agent: str
    """Where the agent is published."""


@pytest.fixture(scope="module")
def sandbox(engine: str) -> Iterator[Sandbox]:  # noqa: F811
    with asyncio.Runner() as runner:
        rig = runner.run(DockerRig.start(engine))
        try:
            yield runner.run(_start(rig))
        finally:
            runner.run(rig.close())


async def _start(rig: DockerRig) -> Sandbox:
    image = os.environ.get("SANDLEDGER_AGENT_IMAGE") or await ensure_agent_image(rig.direct)
    agent = Agent((await rig.driver.install_agent(image)).volume, TOKEN)
    script = 'mkfifo /tmp/go; printf %s "$PROGRAM" > /tmp/p; exec nc -ll -p 3000 -e sh /tmp/p'
    work = rig.work(agent=agent, entrypoint=("sh", "-c", script), env={"PROGRAM": PROGRAM})
    seen = await rig.driver.ensure(work)
    assert seen.address is not None
    return Sandbox(work.ref.object_id, seen.address.ports[AGENT_PORT])


@pytest.fixture
async def session(  # the fixture of the same name is imported
    sandbox: Sandbox,
    eventually: Eventually,  # noqa: F811
) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://{sandbox.agent}", headers={TOKEN_HEADER: TOKEN}) as session:

        async def answers() -> bool:
            try:
                async with session.get("/ping") as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        await eventually(answers)
        yield session


@pytest.fixture
def endpoint(session: aiohttp.ClientSession, sandbox: Sandbox) -> tuple[ConnectionConfig, SandboxEndpoint]:
    """As the SDK gets it from the server."""
    config = ConnectionConfig(request_timeout=timedelta(seconds=30))
    return config, SandboxEndpoint(endpoint=sandbox.agent, headers={TOKEN_HEADER: TOKEN})
