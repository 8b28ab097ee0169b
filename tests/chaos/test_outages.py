"""Engines that are away for long, or come back with their containers ended: nothing is lost, and the log says why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import aiodocker
import pytest
from aiohttp import web

from app.cli.local_image import ensure_busybox_image
from tests.chaos.conftest import IMAGE
from tests.chaos.harness import Engine, ServerProcess, body, events, history, reaches, running, state, until
from tests.drivers.proxy import EngineProxy, call_name
from tests.engine.own import OwnEngine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
Serve = Callable[..., Awaitable[ServerProcess]]
OUTAGE_S = 40
ENDS = {"sandbox.failed", "sandbox.runtime_lost", "sandbox.runtime_exited", "sandbox.terminated"}


class OrderedProxy(EngineProxy):
    """Remembers in which order calls came."""

    def __init__(self, engine: str) -> None:
        super().__init__(engine)
        self.order: list[str] = []

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.order.append(call_name(request.method, request.path))
        return await super()._handle(request)


@pytest.fixture
async def proxy(docker_host: str) -> AsyncIterator[OrderedProxy]:
    made = OrderedProxy(docker_host)
    await made.up()
    yield made
    await made.close()


@pytest.mark.proof
async def test_an_engine_that_was_away_for_long_loses_nothing_and_work_resumes_with_the_first_contact(
    serve: Serve, proxy: OrderedProxy, engine: Engine, image: str, installation: UUID
) -> None:
    server = await serve(host=proxy.address, worker="lease_seconds = 2\nmissing_grace_seconds = 1\nsweep_seconds = 1")
    async with server.client() as client:
        kept, paused, deleted, expired = [await running(client, image) for _ in range(4)]
        before = await history(client, kept)
        await proxy.down()
        over = datetime.now(UTC) + timedelta(seconds=OUTAGE_S)
        late = [(await client.post("/sandboxes", json=body(image))).json()["id"] for _ in range(3)]
        assert (await client.post(f"/sandboxes/{paused}/pause")).status_code == 202
        assert (await client.delete(f"/sandboxes/{deleted}")).status_code == 204
        soon = (datetime.now(UTC) + timedelta(seconds=2)).isoformat()
        renewed = await client.post(f"/sandboxes/{expired}/renew-expiration", json={"expiresAt": soon})
        assert renewed.status_code == 200, renewed.text

        async def passed() -> bool:
            return datetime.now(UTC) > over

        await until(passed, "the outage lasts", OUTAGE_S + 20)
        status = (await client.get(f"/sandboxes/{late[0]}")).json()["status"]
        assert (status["state"], status["reason"]) == ("Pending", "RUNTIME_UNAVAILABLE"), status
        assert (await client.get(f"/sandboxes/{expired}")).status_code == 404, "deadlines need no engine"
        proxy.order.clear()
        await proxy.up()
        for sandbox in late:
            await reaches(client, sandbox, "Running")
        await reaches(client, paused, "Paused")
        for sandbox in (deleted, expired):
            await reaches(client, sandbox, "Terminated")
        # The engine is asked who it is once a second, so this is an order, not a duration: the contact that finds it
        # makes everything due. A breaker with a timer of its own would come after many more.
        contacts = proxy.order[: proxy.order.index("create")].count("mark")
        assert contacts <= 3, proxy.order
        assert await history(client, kept) == before
        assert await state(client, kept) == "Running"
        for sandbox in late:
            kinds = await history(client, sandbox)
            assert kinds.count("sandbox.started") == 1
            assert not ENDS & set(kinds)
    alive = {c["Labels"]["sandledger.io/object"] for c in await engine.containers(installation=installation)}
    assert alive == {kept, paused, *late}


@pytest.mark.parametrize("restarts", [False, True], ids=["the server stays", "the server restarts too"])
@pytest.mark.proof
async def test_an_exit_that_was_learned_after_an_outage_says_so(serve: Serve, own: OwnEngine, restarts: bool) -> None:
    """An engine without live-restore is killed: exit code 137, and nobody has killed the sandbox."""
    script = own.script.read_text()
    assert script.count("live_restore true\n") == 1
    own.script.write_text(script.replace("live_restore true\n", "live_restore false\n"))
    await asyncio.to_thread(own.start)
    async with aiodocker.Docker(url=own.address) as docker:
        await ensure_busybox_image(docker, IMAGE)
    server = await serve("all", "first", host=own.address)
    async with server.client() as client:
        sandbox = await running(client, IMAGE)
        own.kill_dockerd()
        if restarts:
            server.kill()
            server = await serve("all", "second", host=own.address)
    async with server.client() as client:
        assert await state(client, sandbox) == "Running", "a dark engine says nothing about any sandbox"
        await asyncio.to_thread(own.start)
        await reaches(client, sandbox, "Failed")
        (exited,) = await events(client, sandbox, "sandbox.runtime_exited")
        assert (exited["data"]["reason"], exited["data"]["exit_code"]) == ("ENGINE_STOPPED", 137)
        status = (await client.get(f"/sandboxes/{sandbox}")).json()["status"]
        assert status["reason"] == "CONTAINER_EXITED_ERROR"
        assert "while its engine was stopped or restarting" in status["message"]
        # An engine that is well: the same code then tells of the sandbox.
        made = await client.post("/sandboxes", json=body(IMAGE, entrypoint=["sh", "-c", "exit 137"]))
        other = made.json()["id"]
        await reaches(client, other, "Failed")
        (exited,) = await events(client, other, "sandbox.runtime_exited")
        assert "reason" not in exited["data"], exited
        for each in (sandbox, other):
            assert (await client.delete(f"/sandboxes/{each}")).status_code == 204
            await reaches(client, each, "Terminated")


async def test_with_live_restore_a_killed_engine_ends_nothing(serve: Serve, own: OwnEngine) -> None:
    await asyncio.to_thread(own.start)
    async with aiodocker.Docker(url=own.address) as docker:
        await ensure_busybox_image(docker, IMAGE)
    server = await serve(host=own.address)
    async with server.client() as client:
        sandbox = await running(client, IMAGE)
        before = await history(client, sandbox)
        own.kill_dockerd()
        late = (await client.post("/sandboxes", json=body(IMAGE))).json()["id"]
        await asyncio.to_thread(own.start)
        await reaches(client, late, "Running")
        assert await history(client, sandbox) == before
        for each in (sandbox, late):
            assert (await client.delete(f"/sandboxes/{each}")).status_code == 204
            await reaches(client, each, "Terminated")
