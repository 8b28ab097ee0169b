"""Nothing stays in a transitional phase without an end: an engine that refuses for good, and what each phase becomes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID

import pytest

from tests.chaos.harness import Engine, ServerProcess, body, command, events, history, reaches, running, until
from tests.drivers.proxy import EngineProxy, Refusal
from tests.drivers.registry import Registry
from tests.drivers.registry import serve as serve_registry

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]
WORKER = "lease_seconds = 2\nmissing_grace_seconds = 1\nbackoff_base_seconds = 0.2\nbackoff_max_seconds = 0.5"
LONG = "pending_seconds = 600\npausing_seconds = 600\nresuming_seconds = 600\nstopping_seconds = 600"


def limits(**seconds: float) -> str:
    """These are short, so that every other phase has all the time that the test may take."""
    lines = [line for line in LONG.splitlines() if line.split("_")[0] not in seconds]
    return "\n".join([*lines, *(f"{phase}_seconds = {value}" for phase, value in seconds.items())])


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    async with serve_registry() as running:
        yield running


async def test_a_pause_that_is_refused_for_good_comes_back_to_running(
    serve: Serve, proxy: EngineProxy, engine: Engine, image: str, installation: UUID
) -> None:
    proxy.refusals["pause"] = Refusal(500, "the freezer is broken")
    server = await serve(host=proxy.address, worker=WORKER, deadlines=limits(pausing=2))
    async with server.client() as client:
        sandbox = await running(client, image)
        assert (await client.post(f"/sandboxes/{sandbox}/pause")).status_code == 202

        async def given_up() -> bool:
            return "sandbox.pause_failed" in await history(client, sandbox)

        await until(given_up, "the pause is given up")
        answer = (await client.get(f"/sandboxes/{sandbox}")).json()
        assert answer["status"]["state"] == "Running"
        (failed,) = await events(client, sandbox, "sandbox.pause_failed")
        assert failed["data"]["reason"] == "PAUSE_TIMEOUT"
        assert "the freezer is broken" in failed["data"]["message"]
        assert failed["actor"]["kind"] == "timer"
        tried = proxy.calls["pause"]
        assert tried > 1, "it was tried again before it was given up"
        (container,) = await engine.containers(sandbox=sandbox)
        assert container["State"] == "running"
        # Given up for good: what the engine refused is not asked again, until a client asks again.
        other = await running(client, image)
        assert proxy.calls["pause"] == tried
        proxy.refusals.clear()
        assert (await client.post(f"/sandboxes/{sandbox}/pause")).status_code == 202
        await reaches(client, sandbox, "Paused")
        await reaches(client, other, "Running")


async def test_a_resume_that_is_refused_for_good_stays_paused(
    serve: Serve, proxy: EngineProxy, engine: Engine, image: str, installation: UUID
) -> None:
    proxy.refusals["unpause"] = Refusal(500, "the freezer is broken")
    server = await serve(host=proxy.address, worker=WORKER, deadlines=limits(resuming=2))
    async with server.client() as client:
        sandbox = await running(client, image)
        await client.post(f"/sandboxes/{sandbox}/pause")
        await reaches(client, sandbox, "Paused")
        assert (await client.post(f"/sandboxes/{sandbox}/resume")).status_code == 202

        async def given_up() -> bool:
            return "sandbox.resume_failed" in await history(client, sandbox)

        await until(given_up, "the resume is given up")
        await reaches(client, sandbox, "Paused")
        (failed,) = await events(client, sandbox, "sandbox.resume_failed")
        assert failed["data"]["reason"] == "RESUME_TIMEOUT"
        assert "the freezer is broken" in failed["data"]["message"]
        (container,) = await engine.containers(sandbox=sandbox)
        assert container["State"] == "paused"
        proxy.refusals.clear()
        assert (await client.post(f"/sandboxes/{sandbox}/resume")).status_code == 202
        await reaches(client, sandbox, "Running")


async def test_a_create_that_always_answers_500_fails_in_time_and_says_why(
    serve: Serve, proxy: EngineProxy, engine: Engine, image: str, installation: UUID
) -> None:
    proxy.refusals["create"] = Refusal(500, "no space left on device")
    server = await serve(host=proxy.address, worker=WORKER, deadlines=limits(pending=4))
    async with server.client() as client:
        sandbox = (await client.post("/sandboxes", json=body(image))).json()["id"]
        told: list[str] = []

        async def says_why() -> bool:
            status = (await client.get(f"/sandboxes/{sandbox}")).json()["status"]
            told.append(f"{status['state']} {status['reason']} {status['message']}")
            assert status["state"] == "Pending", f"it has ended and never told of the engine's answer: {set(told)}"
            return "no space left on device" in status["message"]

        await until(says_why, "the status of the Pending sandbox tells of the engine's answer")
        await reaches(client, sandbox, "Failed")
        status = (await client.get(f"/sandboxes/{sandbox}")).json()["status"]
        assert status["reason"] == "PROVISIONING_TIMEOUT"
        assert "no space left on device" in status["message"]
        assert "within 4 s" in status["message"]
        kinds = await history(client, sandbox)
        assert kinds.count("sandbox.failed") == 1
        assert "sandbox.reconcile_failed" in kinds
        assert (await client.delete(f"/sandboxes/{sandbox}")).status_code == 204
        await reaches(client, sandbox, "Terminated")
    assert await engine.containers(installation=installation) == []


async def test_a_pull_that_never_ends_fails_in_time_and_costs_nobody_else_anything(
    serve: Serve, proxy: EngineProxy, registry: Registry, engine: Engine, image: str, installation: UUID
) -> None:
    registry.blob_gate = asyncio.Event()
    reference = registry.add()
    server = await serve(host=proxy.address, worker=f"{WORKER}\nconcurrency = 1", deadlines=limits(pending=5))
    async with server.client() as client:
        sandbox = (await client.post("/sandboxes", json=body(reference))).json()["id"]
        await registry.blob_started.wait()
        # One slot, and it is free: the pull holds none.
        other = await running(client, image)
        assert (await client.delete(f"/sandboxes/{other}")).status_code == 204
        await reaches(client, other, "Terminated")

        async def is_pulling() -> bool:
            status = (await client.get(f"/sandboxes/{sandbox}")).json()["status"]
            return (status["state"], status["reason"]) == ("Pending", "IMAGE_PULLING")

        await until(is_pulling, "the status says that the image is being pulled")
        await reaches(client, sandbox, "Failed")
        status = (await client.get(f"/sandboxes/{sandbox}")).json()["status"]
        assert status["reason"] == "PROVISIONING_TIMEOUT"
        assert "IMAGE_PULLING" in status["message"]
        assert await engine.containers(sandbox=sandbox) == []
        # The image comes too late: nothing is made of it.
        registry.blob_gate.set()
        assert (await client.delete(f"/sandboxes/{sandbox}")).status_code == 204
        await reaches(client, sandbox, "Terminated")
    assert await engine.containers(installation=installation) == []


@pytest.mark.proof
async def test_a_remove_that_never_works_is_reported_again_and_again_and_never_given_up(
    serve: Serve, proxy: EngineProxy, engine: Engine, image: str, installation: UUID
) -> None:
    server = await serve(host=proxy.address, worker=WORKER, deadlines=limits(stopping=1))
    async with server.client() as client:
        sandbox = await running(client, image)
        proxy.refusals["remove"] = Refusal(500, "device or resource busy")
        assert (await client.delete(f"/sandboxes/{sandbox}")).status_code == 204

        async def reported_twice() -> bool:
            return len(await events(client, sandbox, "sandbox.overdue")) >= 2

        await until(reported_twice, "it is reported overdue twice")
        reports = [event["data"] for event in await events(client, sandbox, "sandbox.overdue")]
        assert [report.get("times", 1) for report in reports] == list(range(1, len(reports) + 1))
        assert {report["phase"] for report in reports} == {"Stopping"}
        assert len({report["since"] for report in reports}) == 1
        assert (await client.get(f"/sandboxes/{sandbox}")).status_code == 404, "it has ended for clients"
        code, overview = await command(server, "status", "--json")
        assert code == 1
        assert [line["id"] for line in overview["stuck"]] == [sandbox], overview
        proxy.refusals.clear()
        await reaches(client, sandbox, "Terminated")
        assert (await history(client, sandbox))[-2:] == ["sandbox.runtime_removed", "sandbox.terminated"]
        code, overview = await command(server, "status", "--json")
        assert (code, overview["problems"]) == (0, [])
    assert await engine.containers(installation=installation) == []
