"""A server that is asked to stop waits for its database, and not for bodies of requests."""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest

from tests.chaos.harness import KEY, ServerProcess, body, until, write_config
from tests.support.hold import held

NONE = "unix:///nonexistent/engine.sock"
HEAD = (
    f"POST /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\nOPEN-SANDBOX-API-KEY: {KEY}\r\n"
    "Content-Type: application/json\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
).encode()
WAITS = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What the server says when it begins to wait for the body."""


@pytest.fixture
async def server(dsn: str, request: pytest.FixtureRequest) -> AsyncIterator[ServerProcess]:
    """It has as many seconds to stop as the test's parameter says."""
    seconds = getattr(request, "param", 20)
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        made = ServerProcess(write_config(home, dsn, NONE, server=f"timeout_graceful_shutdown = {seconds}"), role="api")
        try:
            yield await asyncio.to_thread(made.start)
        finally:
            made.kill()


async def begun(server: ServerProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A create whose body has one byte of a thousand."""
    address = urlsplit(server.base)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(HEAD)
    assert await reader.readexactly(len(WAITS)) == WAITS
    writer.write(b"{")
    return reader, writer


async def test_bodies_are_not_waited_for_and_work_on_the_database_is(server: ServerProcess, dsn: str):
    async with server.client() as client:
        made = (await client.post("/sandboxes", json=body("image:1"))).json()["id"]
        async with held(dsn, UUID(made)) as hold:
            deleting = asyncio.create_task(client.delete(f"/sandboxes/{made}"))
            await until(hold.keeps_waiting(1), "the delete waits for its row")
            half = [await begun(server) for _ in range(30)]
            server.send(signal.SIGTERM)
            async with asyncio.timeout(10):
                answers = [await reader.read() for reader, _ in half]
            await hold.let_go()
        assert (await deleting).status_code == 204
    for answer, (_, writer) in zip(answers, half, strict=True):
        writer.close()
        head, _, said = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nconnection: close" in head.lower()
        assert json.loads(said)["code"] == "GENERAL::SERVER_STOPPING"
        assert json.loads(said).keys() == {"code", "message"}
    assert await asyncio.to_thread(server.wait, 10) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("server", [1], indirect=True)
async def test_work_that_takes_too_long_is_broken_off_with_a_reason(server: ServerProcess, dsn: str):
    async with server.client() as client:
        made = (await client.post("/sandboxes", json=body("image:1"))).json()["id"]
        async with held(dsn, UUID(made)) as hold:
            deleting = asyncio.create_task(client.delete(f"/sandboxes/{made}"))
            await until(hold.keeps_waiting(1), "the delete waits for its row")
            server.send(signal.SIGTERM)
            answer = await deleting
    assert (answer.status_code, answer.json()["code"]) == (503, "GENERAL::SERVER_STOPPING")
    assert "not known" in answer.json()["message"]
    assert await asyncio.to_thread(server.wait, 10) == 0
    assert "Traceback" not in server.log.read_text()


async def test_the_document_has_the_code(server: ServerProcess):
    async with httpx.AsyncClient(base_url=server.base) as anonymous:
        document = (await anonymous.get("/openapi.json")).json()
    refused = document["paths"]["/v1/sandboxes"]["post"]["responses"]["503"]
    assert "GENERAL::SERVER_STOPPING" in json.dumps(refused)
