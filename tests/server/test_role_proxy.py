"""A process with the role `proxy`: requests to sandboxes and its own health, and nothing else. And how it is taken out
of service.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from app.service.sandboxes import Service
from tests.chaos.harness import KEY, ServerProcess, until, write_config
from tests.proxy.rig import Agent, Rig, agent, request, say

NONE = "unix:///nonexistent/engine.sock"


@contextmanager
def serving(dsn: str, proxy: str = "") -> Iterator[tuple[ServerProcess, int]]:
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        server = ServerProcess(write_config(home, dsn, NONE, more=f"[proxy]\n{proxy}"), role="proxy").start()
        try:
            port = urlsplit(server.base).port
            assert port is not None
            yield server, port
        finally:
            server.kill()
        assert "Traceback" not in server.log.read_text()


async def carries(port: int, theirs: Agent, service: Service) -> None:
    """A new sandbox is reached."""
    sandbox = await Rig(port, None, service).running(theirs)
    theirs.token = ""  # the key of this installation is the server's
    assert (await say(port, request(f"/v1/sandboxes/{sandbox}/proxy/3000/a", key=KEY))).status == 200
    assert (await say(port, request(f"/v1/sandboxes/{sandbox}/proxy/3000/a"))).code == "MISSING_API_KEY"


async def test_it_carries_requests_and_has_no_lifecycle(dsn: str, service: Service) -> None:
    with serving(dsn) as (server, port):
        said = server.log.read_text()
        assert "engine    none needed here" in said
        assert "no lifecycle API" in said
        async with httpx.AsyncClient(base_url=server.base, timeout=30) as anonymous:
            assert (await anonymous.get("/health")).status_code == 200
            ready = (await anonymous.get("/ready")).json()
            assert ready == {"status": "ready", "checks": {"database": "ok", "migrations": "ok"}}
            assert (await anonymous.get("/v1/sandboxes")).status_code == 401, "a stranger learns nothing"
        async with httpx.AsyncClient(base_url=server.base, timeout=30, headers={"OPEN-SANDBOX-API-KEY": KEY}) as client:
            for method, path in (
                ("GET", "/v1/sandboxes"),
                ("POST", "/v1/sandboxes"),
                ("GET", "/sandboxes/x/endpoints/80"),
                ("DELETE", "/sandboxes/x"),
                ("GET", "/v1/pools"),
                ("GET", "/openapi.json"),
                ("GET", "/docs"),
            ):
                answer = await client.request(method, path)
                assert (answer.status_code, answer.json()["code"]) == (404, "GENERAL::NOT_FOUND"), path
                assert "the role proxy" in answer.json()["message"]
        async with agent() as theirs:
            await carries(port, theirs, service)
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait, 30) == 0


async def test_a_stop_is_announced_while_everything_is_served(dsn: str, service: Service) -> None:
    """Without the announcement the listener would be closed by the time the load balancer asks."""
    with serving(dsn, "drain_announce_seconds = 600") as (server, port):
        async with agent() as theirs, httpx.AsyncClient(base_url=server.base, timeout=30) as anonymous:
            assert (await anonymous.get("/ready")).status_code == 200
            server.send(signal.SIGTERM)

            async def is_announced() -> bool:
                return (await anonymous.get("/ready")).status_code == 503

            await until(is_announced, "/ready says 503")
            assert (await anonymous.get("/ready")).json()["checks"]["process"] == "failed"
            assert (await anonymous.get("/health")).status_code == 200
            await carries(port, theirs, service)
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait, 30) == 128 + signal.SIGTERM, "a second signal does not wait"


async def test_after_the_announcement_it_stops(dsn: str) -> None:
    with serving(dsn, "drain_announce_seconds = 0.5") as (server, port):
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait, 30) == 0
        with pytest.raises(OSError):
            await say(port, request("/health"))
