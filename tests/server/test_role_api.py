"""An API process needs no engine: it starts without one, is ready, and accepts what a worker will do later."""

from __future__ import annotations

import tempfile
from pathlib import Path

import httpx

from tests.chaos.harness import ServerProcess, body, write_config

NONE = "unix:///nonexistent/engine.sock"


async def test_it_serves_where_there_is_no_engine(dsn: str) -> None:
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        server = ServerProcess(write_config(home, dsn, NONE), role="api").start()
        try:
            said = server.log.read_text()
            assert "engine    none needed here" in said
            assert "NOT REACHABLE" not in said
            async with httpx.AsyncClient(base_url=server.base, timeout=30) as anonymous:
                assert (await anonymous.get("/ready")).json()["status"] == "ready"
            async with server.client() as client:
                created = await client.post("/sandboxes", json=body("image:1"))
            assert created.status_code == 202
        finally:
            server.kill()
