"""`Prefer: wait`: ends when it is there, when the time is over, when the client goes, when the server stops."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from litestar import Litestar

from app.api.app import create_app
from app.api.conditions import preferences
from app.api.context import ApiContext
from app.domain.sandbox.observed import Exit, Power
from app.service.sandboxes import Service
from app.store.log.signal import Signal
from tests.api.conftest import KEY, MakeContext, body, client, create, observe
from tests.api.test_bodies import call as bare_call


async def newest(http: httpx.AsyncClient) -> str:
    """Id of the one sandbox, as soon as there is one."""
    async with asyncio.timeout(10):
        while True:
            if items := (await http.get("/v1/sandboxes")).json()["items"]:
                return items[0]["id"]
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("power", "end", "state"),
    [
        (Power.RUNNING, None, "Running"),
        (Power.EXITED, Exit(0), "Terminated"),
        (Power.EXITED, Exit(1), "Failed"),
    ],
)
async def test_a_create_that_waits(http: httpx.AsyncClient, service: Service, power: Power, end: Exit, state: str):
    asked = asyncio.create_task(http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=60"}))
    await observe(service, await newest(http), power, end)
    answer = await asked
    assert (answer.status_code, answer.json()["status"]["state"]) == (202, state)
    assert answer.headers["preference-applied"] == "wait=60"
    assert "image" not in answer.json()
    assert answer.headers["etag"] == (await http.get(answer.headers["location"])).headers["etag"]


async def test_a_wait_ends_with_its_sandbox(http: httpx.AsyncClient):
    asked = asyncio.create_task(http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=60"}))
    await http.delete(f"/v1/sandboxes/{await newest(http)}")
    assert (await asked).json()["status"]["state"] == "Stopping"


async def test_a_wait_ends_in_time(http: httpx.AsyncClient):
    answer = await http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=1"})
    assert (answer.status_code, answer.json()["status"]["state"]) == (202, "Pending")
    assert answer.headers["preference-applied"] == "wait=1"


async def test_a_wait_needs_no_signal(make_context: MakeContext, service: Service, signal: Signal):
    """It looks by itself, for the case that every notification is lost."""
    deaf = Signal(make_context().database)
    async with client(create_app(make_context(signal=deaf)), **{"open-sandbox-api-key": KEY}) as http:
        asked = asyncio.create_task(http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=60"}))
        await observe(service, await newest(http))
        assert (await asked).json()["status"]["state"] == "Running"


async def test_a_replay_may_wait(http: httpx.AsyncClient, service: Service):
    made = await create(http, {"Idempotency-Key": "k"})
    await observe(service, made["id"])
    answer = await http.post("/v1/sandboxes", json=body(), headers={"Idempotency-Key": "k", "Prefer": "wait=9"})
    assert answer.json()["status"]["state"] == "Running"


async def test_a_wait_is_cut_to_the_longest(make_context: MakeContext, service: Service):
    app = create_app(make_context(wait_seconds_max=1))
    async with client(app, **{"open-sandbox-api-key": KEY}) as http:
        answer = await http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=100000000000000"})
        assert answer.headers["preference-applied"] == "wait=1"


async def test_a_stop_of_the_server_ends_waits(http: httpx.AsyncClient, context: ApiContext):
    asked = asyncio.create_task(http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=60"}))
    await newest(http)
    context.stopping.set()
    assert (await asked).json()["status"]["state"] == "Pending"
    answer = await http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=60"})
    assert answer.status_code == 202


async def test_a_client_that_goes_ends_its_wait(app: Litestar, http: httpx.AsyncClient, context: ApiContext):
    gone = asyncio.Event()
    read = False
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": httpx.Request("POST", "http://x", json=body()).read()}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    asked = asyncio.create_task(bare_call(app, receive, send, (b"prefer", b"wait=300")))
    await newest(http)
    assert not asked.done()
    gone.set()
    await asyncio.wait_for(asked, 30)
    assert answers[0]["status"] == 202
    assert not context.signal._by_id, "the subscription is gone too"


@pytest.mark.parametrize(
    ("header", "respond_async", "wait"),
    [
        ("", False, None),
        ("wait=10", False, 10),
        ("WAIT=10", False, 10),
        ("respond-async, wait=10", True, 10),
        ('wait="7"', False, 7),
        ("wait = 8", False, 8),
        ("wait=301", False, 300),
        ("wait=0", False, 0),
        ("wait=1, wait=2", False, 1),
        ("wait", False, None),
        ("wait=", False, None),
        ("wait=-1", False, None),
        ("wait=1.5", False, None),
        ("wait=soon", False, None),
        ("handling=lenient; strict=no, wait=3", False, 3),
        ('foo="a, wait=4", wait=5', False, 5),
        ('foo; bar="x;y, wait=4", wait=6', False, 6),
        ("return=minimal,,respond-async", True, None),
        ("@@@, wait=4", False, 4),
        ("x" * 8000, False, None),
        (", " * 4000, False, None),
    ],
)
def test_the_grammar_of_prefer(header: str, respond_async: bool, wait: int | None):
    found = preferences(header, 300)
    assert (found.respond_async, found.wait) == (respond_async, wait)
