"""SIGKILL of the server between every two engine calls of create and of delete."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID

import httpx
import pytest

from tests.chaos.harness import ID_LABEL, Engine, ServerProcess, body, events, history, reaches, until
from tests.drivers.registry import serve as serve_registry

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

Serve = Callable[..., Awaitable[ServerProcess]]


@pytest.mark.parametrize("call", [0, 1, 2, 3])
async def test_create_survives_a_kill_at_each_call(
    serve: Serve, engine: Engine, image: str, installation: UUID, call: int
) -> None:
    """0: before create is sent; 1: create done, unreported; 2: started, unreported; 3: inspected, not recorded."""
    doomed = await serve("all", "doomed", environ={"DIE_AT": f"create:{call}"})
    async with doomed.client() as client:
        answer = await client.post("/sandboxes", json=body(image))
        assert answer.status_code == 202, answer.text
        sandbox = answer.json()["id"]
    assert await asyncio.to_thread(doomed.wait) == -9, "it was to be killed in the middle"
    left = await engine.containers(sandbox=sandbox)
    # The kill is real: what the dead process left differs from what must be there in the end, or is unrecorded.
    assert len(left) == (0 if call == 0 else 1)

    heir = await serve("all", "heir")
    async with heir.client() as client:
        await reaches(client, sandbox, "Running")
        (container,) = await engine.containers(sandbox=sandbox)
        assert container["State"] == "running"
        if left:
            assert container["Id"] == left[0]["Id"], "the first container is adopted, not replaced"
        events = await history(client, sandbox)
        assert events.count("sandbox.started") == 1
        assert len([e for e in events if e in ("sandbox.runtime_created", "sandbox.runtime_adopted")]) == 1
        assert (await client.delete(f"/sandboxes/{sandbox}")).status_code == 204
        await reaches(client, sandbox, "Terminated")
    assert await engine.containers(installation=installation) == []


@pytest.mark.parametrize("call", [0, 1])
async def test_delete_survives_a_kill_at_each_call(
    serve: Serve, engine: Engine, image: str, installation: UUID, call: int
) -> None:
    doomed = await serve("all", "doomed", environ={"DIE_AT": f"delete:{call}"})
    async with doomed.client() as client:
        answer = await client.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"})
        assert answer.json()["status"]["state"] == "Running", answer.text
        sandbox = answer.json()["id"]
        assert (await client.delete(f"/sandboxes/{sandbox}")).status_code == 204
    assert await asyncio.to_thread(doomed.wait) == -9
    heir = await serve("all", "heir")
    async with heir.client() as client:
        await reaches(client, sandbox, "Terminated")
        events = await history(client, sandbox)
    assert events[-2:] == ["sandbox.runtime_removed", "sandbox.terminated"]
    assert events.count("sandbox.terminated") == 1
    assert await engine.containers(installation=installation) == []


async def test_a_worker_dies_among_many(serve: Serve, engine: Engine, image: str, installation: UUID) -> None:
    """Two workers, twenty sandboxes, one worker killed in the middle: each comes up once."""
    api = await serve("api", "api")
    await serve("worker", "one")
    two = await serve("worker", "two", environ={"DIE_AT": "create:5"})
    async with api.client() as client:
        answers = await asyncio.gather(*[client.post("/sandboxes", json=body(image)) for _ in range(20)])
        ids = [answer.json()["id"] for answer in answers]
        assert await asyncio.to_thread(two.wait) == -9
        for sandbox in ids:
            await reaches(client, sandbox, "Running", 90)
        found = await engine.containers(installation=installation)
        assert sorted(c["Labels"][ID_LABEL] for c in found) == sorted(ids)
        await asyncio.gather(*[client.delete(f"/sandboxes/{sandbox}") for sandbox in ids])

        async def gone() -> bool:
            return await engine.containers(installation=installation) == []

        await until(gone, "all containers are removed", 90)


async def test_create_survives_a_kill_inside_a_pull(
    serve: Serve, engine: Engine, image: str, installation: UUID
) -> None:
    async with serve_registry() as registry:
        registry.blob_gate = asyncio.Event()
        doomed = await serve("all", "doomed")
        async with doomed.client() as client:
            sandbox = (await client.post("/sandboxes", json=body(registry.add()))).json()["id"]
            await registry.blob_started.wait()
        doomed.kill()
        assert await engine.containers(sandbox=sandbox) == []
        heir = await serve("all", "heir")
        async with heir.client() as client:

            async def pulls_again() -> bool:
                return (await client.get(f"/sandboxes/{sandbox}")).json()["status"]["reason"] == "IMAGE_PULLING"

            await until(pulls_again, "the next server waits for the image")
            registry.blob_gate.set()
            await _comes_up_once(client, engine, sandbox)
    assert await engine.containers(installation=installation) == []


async def test_create_survives_a_kill_between_pull_and_create(
    serve: Serve, engine: Engine, image: str, installation: UUID
) -> None:
    """The image is there and recorded, the container is not made."""
    async with serve_registry() as registry:
        doomed = await serve("all", "doomed", environ={"DIE_AT": "fetched:0"})
        async with doomed.client() as client:
            sandbox = (await client.post("/sandboxes", json=body(registry.add()))).json()["id"]
        assert await asyncio.to_thread(doomed.wait) == -9
        assert await engine.containers(sandbox=sandbox) == []
        pulls = registry.counts["blob"]
        assert pulls, "the doomed server has pulled"
        heir = await serve("all", "heir")
        async with heir.client() as client:
            assert await history(client, sandbox) == [
                "sandbox.requested",
                "sandbox.placed",
                "sandbox.waiting",
                "sandbox.fetched",
            ]
            await _comes_up_once(client, engine, sandbox)
        assert registry.counts["blob"] == pulls, "the image was not pulled twice"
    assert await engine.containers(installation=installation) == []


async def _comes_up_once(client: httpx.AsyncClient, engine: Engine, sandbox: str) -> None:
    await reaches(client, sandbox, "Running")
    (container,) = await engine.containers(sandbox=sandbox)
    assert container["State"] == "running"
    for kind in ("fetched", "runtime_created", "started", "ready"):
        assert len(await events(client, sandbox, f"sandbox.{kind}")) == 1, kind
    assert (await client.delete(f"/sandboxes/{sandbox}")).status_code == 204
    await reaches(client, sandbox, "Terminated")
