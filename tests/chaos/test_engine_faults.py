"""An engine that is down, answers 500, or answers an empty list, says nothing about any sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID

import httpx
import pytest
from aiohttp import web

from tests.chaos.harness import Engine, ServerProcess, body, history, reaches, until
from tests.drivers.proxy import CALLS, EngineProxy, call_name

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]
QUICK = "lease_seconds = 2\nmissing_grace_seconds = 1\nsweep_seconds = 0.5\norphan_grace_seconds = 0"


class LyingProxy(EngineProxy):
    """Can claim that there are no containers at all."""

    empty = False

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.empty and call_name(request.method, request.path) == "list":
            self.calls["list"] += 1
            return web.json_response([])
        return await super()._handle(request)


@pytest.fixture
async def proxy(docker_host: str) -> AsyncIterator[LyingProxy]:
    made = LyingProxy(docker_host)
    await made.up()
    yield made
    await made.close()


async def some(client: httpx.AsyncClient, image: str, count: int) -> list[str]:
    ids = []
    for _ in range(count):
        answer = await client.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"})
        assert answer.json()["status"]["state"] == "Running", answer.text
        ids.append(answer.json()["id"])
    return ids


async def unharmed(client: httpx.AsyncClient, ids: list[str], engine: Engine) -> None:
    for sandbox in ids:
        answer = await client.get(f"/sandboxes/{sandbox}")
        assert answer.json()["status"]["state"] == "Running", answer.text
        events = await history(client, sandbox)
        assert not {"sandbox.failed", "sandbox.runtime_lost", "sandbox.terminated"} & set(events), events
        (container,) = await engine.containers(sandbox=sandbox)
        assert container["State"] == "running"


async def several(proxy: LyingProxy, call: str, more: int) -> None:
    """Wait until the engine has been asked this so many times more: the fault was met, not slept through."""
    begin = proxy.calls[call]

    async def asked() -> bool:
        return proxy.calls[call] >= begin + more

    await until(asked, f"{more} more {call} calls", 60)


async def test_an_empty_listing_is_no_absence(
    serve: Serve, proxy: LyingProxy, engine: Engine, image: str, installation: UUID
) -> None:
    server = await serve("all", "empty", host=proxy.address, worker=QUICK)
    async with server.client() as client:
        ids = await some(client, image, 3)
        proxy.empty = True
        await several(proxy, "list", 4)
        await unharmed(client, ids, engine)
        proxy.empty = False
        await several(proxy, "list", 2)
        await unharmed(client, ids, engine)


async def test_an_engine_answering_500_fails_nothing(
    serve: Serve, proxy: LyingProxy, engine: Engine, image: str, installation: UUID
) -> None:
    server = await serve("all", "broken", host=proxy.address, worker=QUICK)
    async with server.client() as client:
        ids = await some(client, image, 2)
        proxy.refusals = {name: 500 for _, _, name in CALLS}
        late = (await client.post("/sandboxes", json=body(image))).json()["id"]
        doomed = ids.pop()
        assert (await client.delete(f"/sandboxes/{doomed}")).status_code == 204
        await several(proxy, "version", 2)
        assert (await client.get(f"/sandboxes/{late}")).json()["status"]["state"] == "Pending"
        assert (await client.get(f"{server.base}/ready")).status_code == 503
        await unharmed(client, ids, engine)
        proxy.refusals = {}
        await reaches(client, late, "Running")
        await reaches(client, doomed, "Terminated")
        await unharmed(client, [*ids, late], engine)


async def test_an_engine_that_is_down_fails_nothing(
    serve: Serve, proxy: LyingProxy, engine: Engine, image: str, installation: UUID
) -> None:
    server = await serve("all", "down", host=proxy.address, worker=QUICK)
    async with server.client() as client:
        ids = await some(client, image, 2)
        await proxy.down()
        late = (await client.post("/sandboxes", json=body(image))).json()["id"]

        async def not_ready() -> bool:
            return (await client.get(f"{server.base}/ready")).status_code == 503

        await until(not_ready, "/ready says that the engine is away")

        async def says_so() -> bool:
            status = (await client.get(f"/sandboxes/{late}")).json()["status"]
            return (status["state"], status["reason"]) == ("Pending", "RUNTIME_UNAVAILABLE")

        await until(says_so, "the Pending sandbox says that it waits for the engine")
        assert (await client.get(f"/sandboxes/{late}")).json()["status"]["state"] == "Pending"
        await unharmed(client, ids, engine)
        await proxy.up()
        await reaches(client, late, "Running", 60)
        await unharmed(client, [*ids, late], engine)


async def test_a_container_removed_behind_our_back_is_lost_and_said_so(
    serve: Serve, proxy: LyingProxy, engine: Engine, image: str, installation: UUID
) -> None:
    """The counterpart: what is really gone is noticed, after a second look."""
    proxy.refusals = {"events": 500}  # no hint: else the dying container may be seen, exited, before it is gone
    server = await serve("all", "lost", host=proxy.address, worker=QUICK)
    async with server.client() as client:
        (sandbox,) = await some(client, image, 1)
        await engine.clear(installation)
        await reaches(client, sandbox, "Failed")
        answer = (await client.get(f"/sandboxes/{sandbox}")).json()
        assert answer["status"]["reason"] == "RUNTIME_LOST"
        assert "sandbox.runtime_lost" in await history(client, sandbox)
