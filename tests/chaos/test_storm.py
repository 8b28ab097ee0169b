"""Two API servers and two workers on one database, killed at odd moments while clients go on: nothing is lost, doubled,
stuck or left behind. The seed is printed, so a bad run can be repeated as far as processes allow.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from tests.chaos.harness import KEY, Engine, ServerProcess, body, command, history, reaches, until

pytestmark = [pytest.mark.engine, pytest.mark.proof, pytest.mark.timeout(900)]
Serve = Callable[..., Awaitable[ServerProcess]]
KILLS = int(os.environ.get("KILLS", "40"))
CLIENTS = 6
WORKER = "lease_seconds = 2\nmissing_grace_seconds = 1\nsweep_seconds = 2\norphan_grace_seconds = 1"


class Clients:
    """Clients that repeat what was not answered, as honest clients do. Creates carry an Idempotency-Key."""

    def __init__(self, apis: list[ServerProcess], image: str) -> None:
        self.apis = apis
        self.image = image
        self.kept: dict[str, str] = {}
        """Sandboxes that stay, and the state that was asked for."""
        self.deleted: list[str] = []
        self.over = asyncio.Event()

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Until a server answers."""
        while True:
            server = random.choice(self.apis)
            try:
                async with httpx.AsyncClient(base_url=f"{server.base}/v1", timeout=20) as client:
                    headers = {"OPEN-SANDBOX-API-KEY": KEY, **more.pop("headers", {})}
                    answer = await client.request(method, path, headers=headers, **more)
            except httpx.TransportError:
                more.setdefault("headers", headers)
                await asyncio.sleep(0.1)  # the server is dead at the moment; the next one may not be
                continue
            if answer.status_code != 503:
                return answer
            more.setdefault("headers", headers)

    async def live(self) -> None:
        """One life after the other, until the kills are over."""
        while not self.over.is_set():
            key = {"Idempotency-Key": uuid4().hex}
            answer = await self.ask("POST", "/sandboxes", json=body(self.image), headers=key)
            assert answer.status_code == 202, answer.text
            sandbox = answer.json()["id"]
            wanted = random.choice(["Running", "Paused", *["Terminated"] * 8, *["at once"] * 4])
            if wanted != "at once":
                await self.wait(sandbox, "Running")
            if wanted == "Paused":
                answer = await self.ask("POST", f"/sandboxes/{sandbox}/pause")
                assert answer.status_code in (202, 409), answer.text  # 409: the answer to the first one was lost
            if wanted in ("Terminated", "at once"):
                answer = await self.ask("DELETE", f"/sandboxes/{sandbox}")
                assert answer.status_code in (204, 404), answer.text
                self.deleted.append(sandbox)
            else:
                self.kept[sandbox] = wanted

    async def wait(self, sandbox: str, wanted: str) -> None:
        async def there() -> bool:
            return (await self.ask("GET", f"/sandboxes/{sandbox}")).json()["status"]["state"] == wanted

        await until(there, f"{sandbox} is {wanted}", 120)


async def test_kills_at_odd_moments(serve: Serve, engine: Engine, image: str, installation: UUID) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    apis = [await serve("api", f"api{number}") for number in range(2)]
    workers = [await serve("worker", f"worker{number}", worker=WORKER) for number in range(2)]
    clients = Clients(apis, image)
    lives = [asyncio.create_task(clients.live()) for _ in range(CLIENTS)]

    async def kill(*servers: ServerProcess) -> None:
        for server in servers:
            server.kill()
        for server in servers:
            await asyncio.to_thread(server.start)

    for number in range(KILLS):
        await asyncio.sleep(chance.uniform(0.05, 1.5))  # the odd moment
        together = number % 10 == 9
        await kill(*([*apis, *workers] if together else [chance.choice([*apis, *workers])]))
        for task in lives:
            if task.done():
                await task
    clients.over.set()
    await asyncio.gather(*lives)

    async with apis[0].client() as client:
        for sandbox, wanted in clients.kept.items():
            await reaches(client, sandbox, wanted, 90)
            kinds = await history(client, sandbox)
            made = [kind for kind in kinds if kind in ("sandbox.runtime_created", "sandbox.runtime_adopted")]
            assert (len(made), kinds.count("sandbox.started")) == (1, 1), kinds
        for sandbox in clients.deleted:
            await reaches(client, sandbox, "Terminated", 90)
            assert (await history(client, sandbox)).count("sandbox.terminated") == 1

    async def only_the_kept() -> bool:
        found = await engine.containers(installation=installation)
        return sorted(c["Labels"]["sandledger.io/object"] for c in found) == sorted(clients.kept)

    await until(only_the_kept, "the engine has what was kept and nothing else", 60)

    async def nothing_is_wrong() -> bool:
        code, overview = await command(workers[0], "status", "--json")
        return code == 0 and overview["problems"] == [] and overview["queue"] == []

    await until(nothing_is_wrong, "status finds nothing wrong", 60)
    print(f"{KILLS} kills, {len(clients.kept)} kept, {len(clients.deleted)} deleted")
