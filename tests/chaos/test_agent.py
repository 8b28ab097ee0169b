"""The agent end to end: the unmodified SDK's whole life, a worker that dies, and an agent that never answers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import UUID

import aiodocker
import pytest
from opensandbox import Sandbox
from opensandbox.config import ConnectionConfig

from app.agent import AGENT_PORT
from tests.agent.image import ensure_agent_image, ensure_tiny_agent_image
from tests.chaos.harness import ID_LABEL, KEY, ServerProcess, body, events, history, reaches, running, until
from tests.proxy.rig import calling
from tests.proxy.websockets import echo_back, ended, handshake, opened

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
Serve = Callable[..., Awaitable[ServerProcess]]


def config(server: ServerProcess, *, proxied: bool) -> ConnectionConfig:
    return ConnectionConfig(
        use_server_proxy=proxied, api_key=KEY, domain=server.base.removeprefix("http://").removesuffix("/v1")
    )


@pytest.mark.parametrize("proxied", [False, True])
async def test_the_unmodified_sdk_creates_runs_a_command_and_kills(
    serve: Serve, docker: aiodocker.Docker, image: str, proxied: bool
):
    agent = await ensure_agent_image(docker)
    server = await serve(runtime=f'execd_image = "{agent}"')
    sandbox = await Sandbox.create(
        image,
        connection_config=config(server, proxied=proxied),
        timeout=timedelta(minutes=5),
        entrypoint=["sleep", "3600"],
    )
    try:
        result = await sandbox.commands.run("echo hello; id -u")
        assert [line.text.strip() for line in result.logs.stdout] == ["hello", "0"]
        await sandbox.files.write_file("/tmp/note", "kept")
        assert await sandbox.files.read_file("/tmp/note") == "kept"
        endpoint = await sandbox.get_endpoint(AGENT_PORT)
        assert endpoint.headers
        async with server.client() as client:
            events = await history(client, str(sandbox.id))
        assert events.index("sandbox.started") < events.index("sandbox.ready")
    finally:
        await sandbox.kill()
        await sandbox.close()


async def test_an_agent_that_never_answers_costs_no_sandbox(serve: Serve, docker: aiodocker.Docker, image: str):
    """Its only worker is killed while it asks. Another one goes on, and the deadline ends the wait."""
    agent = await ensure_tiny_agent_image(docker)
    tables = {"runtime": f'execd_image = "{agent}"', "more": "[sandledger.agent]\nready_seconds = 6"}
    api = await serve("api", "api", **tables)
    first = await serve("worker", "first", **tables)
    async with api.client() as client:
        made = (await client.post("/sandboxes", json=body(image))).json()["id"]

        async def is_asked() -> bool:
            status = (await client.get(f"/sandboxes/{made}")).json()["status"]
            return status["state"] == "Pending" and status["reason"] == "AGENT_NOT_LISTENING"

        await until(is_asked, "the agent is asked, and clients read why it is not ready")
        first.kill()
        await serve("worker", "second", **tables)
        await reaches(client, made, "Running")
        status = (await client.get(f"/sandboxes/{made}")).json()["status"]
        assert status["reason"] == "AGENT_UNREACHABLE"
        assert "nothing listens on " in status["message"]
        (silent,) = await events(client, made, "sandbox.agent_unreachable")
        assert silent["data"]["reason"] == "AGENT_NOT_LISTENING"
        assert silent["data"]["after_ms"] >= 6000
        assert (await client.delete(f"/sandboxes/{made}")).status_code == 204


PROGRAM = r"""
while IFS= read -r line; do [ -n "${line%?}" ] || break; done
printf 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n'
exec cat
"""
"""Reads a head, accepts, and sends back what comes."""


async def test_websockets_reach_a_program_through_the_agent(serve: Serve, docker: aiodocker.Docker, image: str):
    """Its port is not published. In both forms they outlive a pause, and end with a restart and with the sandbox."""
    agent = await ensure_agent_image(docker)
    server = await serve(runtime=f'execd_image = "{agent}"', more='[proxy]\nwildcard = "*.boxes.test"')
    port = urlsplit(server.base).port
    assert port is not None
    script = 'printf %s "$PROGRAM" > /tmp/p; exec nc -ll -p 3000 -e sh /tmp/p'
    async with server.client() as client:
        made = await running(client, image, entrypoint=["sh", "-c", script], env={"PROGRAM": PROGRAM})
        sandbox = UUID(made)
        by_path = handshake(sandbox, "ws", key=KEY)
        by_host = handshake(sandbox, "ws", key=KEY, host=f"3000-{made}.boxes.test").replace(
            f"/sandboxes/{made}/proxy/3000/ws".encode(), b"/ws"
        )
        async with calling(port) as one, calling(port) as two:
            for caller, sent in ((one, by_path), (two, by_host)):
                await opened(caller, sent)
                await echo_back(caller, b"hello")
            assert (await client.post(f"/sandboxes/{made}/pause")).status_code == 202
            await reaches(client, made, "Paused")
            one.writer.write(b"meanwhile")
            assert (await client.post(f"/sandboxes/{made}/resume")).status_code == 202
            assert await one.reader.readexactly(9) == b"meanwhile"
            await echo_back(two, b"still there")
            (container,) = await docker.containers.list(filters=json.dumps({"label": [f"{ID_LABEL}={made}"]}))
            await container.restart()
            assert await ended(one) == await ended(two) == b""

        async def answers_again() -> bool:
            async with calling(port) as caller:
                caller.writer.write(by_path)
                return b" 101 " in (await caller.head())[0]

        await until(answers_again, "the program listens after the restart")
        async with calling(port) as caller:
            await opened(caller, by_path)
            await echo_back(caller, b"again")
            assert (await client.delete(f"/sandboxes/{made}")).status_code == 204
            assert await ended(caller) == b""

        async def is_removed() -> bool:
            return "sandbox.terminated" in await history(client, made)

        await until(is_removed, "the engine has nothing of it any more")
