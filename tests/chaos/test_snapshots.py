"""SIGKILL of the server between any two engine calls of a snapshot, and of its delete."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from uuid import UUID

import httpx
import pytest

from tests.chaos.harness import Engine, ServerProcess, body, history, reaches, running, until

pytestmark = [pytest.mark.engine, pytest.mark.proof, pytest.mark.timeout(240)]

Serve = Callable[..., Awaitable[ServerProcess]]
CANARY = "canary-52d0b6e3aa"
WRITER = ["sh", "-c", "i=0; while true; do i=$((i+1)); echo $i >> /lines; done"]


async def is_snapshot(client: httpx.AsyncClient, snapshot: str, state: str) -> None:
    async def there() -> bool:
        return (await client.get(f"/snapshots/{snapshot}")).json()["status"]["state"] == state

    await until(there, f"snapshot {snapshot} is {state}", 60)


async def restored(client: httpx.AsyncClient, snapshot: str) -> str:
    asked = {name: value for name, value in body("").items() if name != "image"} | {"snapshotId": snapshot}
    answer = await client.post("/sandboxes", json=asked, headers={"Prefer": "wait=60"})
    assert answer.json()["status"]["state"] == "Running", answer.text
    return answer.json()["id"]


async def assert_whole(client: httpx.AsyncClient, engine: Engine, source: str, snapshot: str, ours: UUID) -> None:
    """The source goes on, one clean image is there, and its files are a prefix of what the source wrote."""
    (image,) = await engine.images(ours)
    assert image["RepoTags"] == [f"sandledger-snapshots:{snapshot}"]
    assert CANARY.encode() not in await engine.saved(image["Id"])

    async def goes_on() -> bool:
        return not await engine.is_paused(source) and "sandbox.thawed" in await history(client, source)

    await until(goes_on, "the source goes on")
    copy = await restored(client, snapshot)
    lines = (await engine.said(copy, "cat", "/lines")).split("\n")
    whole = [int(line) for line in lines[:-1]]
    assert whole == list(range(1, len(whole) + 1)), "a gap, or a line that was torn"
    assert CANARY not in await engine.said(copy, "env")
    assert (await client.delete(f"/sandboxes/{copy}")).status_code == 204
    await reaches(client, copy, "Terminated")


AFTER = (1, 3, 4, 5, 7, 9, 11, 13, 15, 17, 19, 20, 21)
"""Calls since the pause after which the answer is lost with the server."""
BEFORE = (2, 6, 7, 10, 14, 19)
"""Calls whose consequence is recorded; the next one is never sent."""


@pytest.mark.parametrize("phase", [*(f"snapshot:{n}" for n in AFTER), *(f"snapshot+:{n}" for n in BEFORE)])
async def test_a_snapshot_survives_a_kill_at_each_call(
    serve: Serve, engine: Engine, image: str, installation: UUID, phase: str
) -> None:
    doomed = await serve("all", "doomed", environ={"DIE_AT": phase})
    async with doomed.client() as client:
        source = await running(client, image, entrypoint=WRITER, env={"TOKEN": CANARY})
        snapshot = (await client.post(f"/sandboxes/{source}/snapshots", json={"name": phase})).json()["id"]
    assert await asyncio.to_thread(doomed.wait) == -9, "it was to be killed in the middle"

    heir = await serve("all", "heir")
    async with heir.client() as client:
        await is_snapshot(client, snapshot, "Ready")
        await assert_whole(client, engine, source, snapshot, installation)
        assert (await client.delete(f"/snapshots/{snapshot}")).status_code == 204

        async def gone() -> bool:
            return (await client.get(f"/snapshots/{snapshot}")).status_code == 404

        await until(gone, "the snapshot is gone")
        assert await engine.images(installation) == []


@pytest.mark.parametrize("call", [0, 1, 2])
async def test_a_delete_survives_a_kill_at_each_call(
    serve: Serve, engine: Engine, image: str, installation: UUID, call: int
) -> None:
    maker = await serve("all", "maker")
    async with maker.client() as client:
        source = await running(client, image)
        snapshot = (await client.post(f"/sandboxes/{source}/snapshots")).json()["id"]
        await is_snapshot(client, snapshot, "Ready")
    maker.kill()
    doomed = await serve("all", "doomed", environ={"DIE_AT": f"drop:{call}"})
    async with doomed.client() as client:
        with suppress(httpx.TransportError):  # it dies while the client waits
            await client.delete(f"/snapshots/{snapshot}")
    assert await asyncio.to_thread(doomed.wait) == -9, "it was to be killed in the middle"
    heir = await serve("all", "heir")
    async with heir.client() as client:

        async def gone() -> bool:
            return (await client.get(f"/snapshots/{snapshot}")).status_code == 404

        await until(gone, "the snapshot is gone")
        assert await engine.images(installation) == []
        assert (await client.get("/snapshots")).json()["items"] == []
