"""Two API processes on one database: both wait for what neither does, and hand out the same token, which is in no log."""

from __future__ import annotations

import asyncio
import re
import tempfile
from pathlib import Path
from uuid import UUID

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Address, Observed, Part, Power
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from tests.chaos.harness import ServerProcess, body, write_config

NONE = "unix:///nonexistent/engine.sock"
WORKER = Meta(Actor(ActorKind.RECONCILER, "w1", "test-worker"), "0")
PORTS = {"44772": "127.0.0.1:32768", "8080": "127.0.0.1:32769"}


async def test_lookups_wait_in_every_process_and_agree(dsn: str, database: Database, signal: Signal, service: Service):
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        servers: list[ServerProcess] = []
        try:
            for name in ("one", "two"):
                config = write_config(home, dsn, NONE, name, runtime='execd_image = "agent:1"')
                servers.append(ServerProcess(config, role="api").start())
            one, two = servers
            async with one.client() as first, two.client() as second:
                made = (await first.post("/sandboxes", json=body("image:1"))).json()["id"]
                path = f"/sandboxes/{made}/endpoints/44772"
                asked = [asyncio.create_task(each.get(path)) for each in (first, second)]
                await asyncio.sleep(0)
                shown = Observed(
                    UUID(made),
                    (Part("main", "rt", f"sandbox-{made}"),),
                    Power.RUNNING,
                    address=Address("bridge", "172.17.0.2", PORTS),
                )
                await service.execute(UUID(made), ANY_TENANT, cmd.RecordSeen(shown), WORKER)
                answers = [(await each).json() for each in asked]
            assert answers[0] == answers[1]
            assert answers[0]["endpoint"] == "127.0.0.1:32768/proxy/44772"
            token = answers[0]["headers"]["X-EXECD-ACCESS-TOKEN"]
            assert re.fullmatch(r"[0-9a-f]{64}", token)
            assert token not in "".join(each.log.read_text() for each in servers)
        finally:
            for each in servers:
                each.kill()
