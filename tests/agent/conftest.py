"""One sandbox with the agent for all checks of a module.

With SANDLEDGER_AGENT_IMAGE set, the agent is that of the named image, which the engine must have.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from uuid import UUID

import pytest
from msgspec import Struct

from app.runtime.workload import AGENT_PORT, Agent
from tests.agent.image import ensure_agent_image
from tests.drivers.conftest import engine, eventually  # noqa: F401 - fixtures
from tests.drivers.rigs import DockerRig

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
