"""GET one, its history, and the past."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID, uuid4

import httpx
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Exit, Power
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from tests.api.conftest import WORKER, create, observe, remove
from tests.support.sql import connected, insert_patch


async def test_one_sandbox(http: httpx.AsyncClient, service: Service):
    made = await create(http, metadata={"a": "b"})
    await observe(service, made["id"])
    answer = await http.get(f"/v1/sandboxes/{made['id']}")
    seen = answer.json()
    assert seen["image"] == {"uri": "busybox:1"}
    assert seen["status"]["state"] == "Running"
    assert seen["status"]["reason"] == "CONTAINER_RUNNING"
    assert {name: seen[name] for name in ("id", "createdAt", "expiresAt", "metadata", "entrypoint")} == {
        name: made[name] for name in ("id", "createdAt", "expiresAt", "metadata", "entrypoint")
    }
    assert answer.headers["etag"] == '"5"'
    assert answer.headers["content-type"] == "application/json"
    assert (await http.get(f"/sandboxes/{made['id'].upper()}")).content == answer.content


async def test_what_an_engine_says_cannot_drive_a_terminal(http: httpx.AsyncClient, service: Service):
    made = await create(http)
    failure = cmd.RecordFailure("ensure", "START_REJECTED", "no such device \x1b]0;owned\x07\x9b31m\u202e")
    await service.execute(UUID(made["id"]), ANY_TENANT, failure, WORKER)
    path = f"/v1/sandboxes/{made['id']}"
    told = [
        (await http.get(path)).json()["status"]["message"],
        (await http.get("/v1/sandboxes")).json()["items"][0]["status"]["message"],
        (await http.get(f"{path}/events")).json()["items"][-1]["data"]["message"],
    ]
    for message in told:
        assert "no such device \\x1b]0;owned\\x07\\x9b31m\\u202e" in message


async def test_a_workload_that_ended_stays_visible(http: httpx.AsyncClient, service: Service):
    made = await create(http)
    await observe(service, made["id"], Power.EXITED, Exit(3))
    status = (await http.get(f"/v1/sandboxes/{made['id']}")).json()["status"]
    assert (status["state"], status["reason"]) == ("Failed", "CONTAINER_EXITED_ERROR")
    assert "code 3" in status["message"]


@pytest.mark.parametrize("path", ["", "/events", "?asOf=2030-01-01T00:00:00Z", "?includeTerminal=true"])
async def test_an_unknown_id_is_404(http: httpx.AsyncClient, path: str):
    for text in (str(uuid4()), "nonsense", "%00", "a" * 3000, str(uuid4()).replace("-", ""), "{" + str(uuid4()) + "}"):
        answer = await http.get(f"/v1/sandboxes/{text}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND"), text


async def test_after_the_end(http: httpx.AsyncClient, service: Service):
    made = await create(http)
    path = f"/v1/sandboxes/{made['id']}"
    await observe(service, made["id"])
    await http.delete(path)
    gone = await http.get(path)
    assert gone.status_code == 404
    told = gone.json()["message"]
    assert "deleted by api_key default at 20" in told
    assert told.endswith("Its events can still be read.")
    assert "/" not in told, "the core knows no paths"
    shown = (await http.get(path, params={"includeTerminal": "true"})).json()
    assert (shown["status"]["state"], shown["status"]["reason"]) == ("Stopping", "USER_DELETE")
    await remove(service, made["id"])
    shown = (await http.get(path, params={"includeTerminal": "1"})).json()
    assert shown["status"]["state"] == "Terminated"
    types = [item["type"] for item in (await http.get(f"{path}/events")).json()["items"]]
    assert types[-1] == "sandbox.terminated"


async def test_as_it_was(http: httpx.AsyncClient, service: Service):
    made = await create(http)
    path = f"/v1/sandboxes/{made['id']}"
    await observe(service, made["id"])
    running_since = (await http.get(path)).json()["status"]["lastTransitionAt"]
    await http.delete(path)
    at_creation = await http.get(path, params={"asOf": made["createdAt"]})
    assert at_creation.json()["status"]["state"] == "Pending"
    assert at_creation.headers["etag"] == '"2"'
    assert (await http.get(path, params={"asOf": running_since})).json()["status"]["state"] == "Running"
    with_offset = datetime.fromisoformat(running_since).astimezone().isoformat()
    assert (await http.get(path, params={"asOf": with_offset})).json()["status"]["state"] == "Running"
    before = (datetime.fromisoformat(made["createdAt"]) - timedelta(microseconds=1)).isoformat()
    assert (await http.get(path, params={"asOf": before})).status_code == 404
    after = await http.get(path, params={"asOf": "9000-01-01T00:00:00Z"})
    assert after.status_code == 404
    assert "deleted by" in after.json()["message"]
    later = await http.get(path, params={"asOf": "9000-01-01T00:00:00Z", "includeTerminal": "true"})
    assert later.json()["status"]["state"] == "Stopping"


async def test_the_past_ends_at_the_first_later_event(http: httpx.AsyncClient, service: Service, dsn: str):
    """The clock of the database stepped back: version 3 bears a later time than version 4, which came after it."""
    made = await create(http)
    sandbox_id, path = UUID(made["id"]), f"/v1/sandboxes/{made['id']}"
    ahead = datetime.fromisoformat(made["createdAt"]) + timedelta(hours=1)
    async with connected(dsn) as connection:
        position = await insert_patch(connection, sandbox_id, 3, '{"set": {"first": "1"}}', ahead)
        await connection.execute(
            """UPDATE sandboxes SET version = 3, position = $2, metadata = '{"first": "1"}' WHERE id = $1""",
            sandbox_id,
            position,
        )
    await http.patch(f"{path}/metadata", json={"second": "2"})
    between = ahead - timedelta(minutes=30)
    history = await service.history(sandbox_id, "default")
    assert [event.version for event in history if event.at <= between] == [1, 2, 4], "a filter by time leaves a hole"
    then = await http.get(path, params={"asOf": between.isoformat()})
    assert (then.status_code, then.headers["etag"]) == (200, '"2"')
    assert "metadata" not in then.json()
    later = await http.get(path, params={"asOf": ahead.isoformat()})
    assert later.headers["etag"] == '"4"'
    assert later.json()["metadata"] == {"first": "1", "second": "2"}


@pytest.mark.parametrize("text", ["", "yesterday", "2030-01-01", "2030-13-01T00:00:00Z", "0001-01-01T00:00:00+10:00"])
async def test_a_malformed_instant_is_422(http: httpx.AsyncClient, text: str):
    made = await create(http)
    answer = await http.get(f"/v1/sandboxes/{made['id']}", params={"asOf": text})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "asOf"]


async def test_not_modified(http: httpx.AsyncClient, service: Service):
    made = await create(http)
    path = f"/v1/sandboxes/{made['id']}"
    for tag in ('"2"', 'W/"2"', '"9", "2"', "*"):
        answer = await http.get(path, headers={"If-None-Match": tag})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", '"2"')
    await observe(service, made["id"])
    assert (await http.get(path, headers={"If-None-Match": '"2"'})).status_code == 200
    assert (await http.get(path, headers={"If-None-Match": "2"})).status_code == 400


# History


async def test_the_history_in_pages(http: httpx.AsyncClient, service: Service):
    made = await create(http, {"X-Request-ID": "req-1"})
    path = f"/v1/sandboxes/{made['id']}"
    await observe(service, made["id"])
    await http.patch(f"{path}/metadata", json={"a": "b"}, headers={"X-Request-ID": "req-2"})
    await http.delete(path)

    whole = (await http.get(f"{path}/events")).json()
    assert "next" not in whole
    items = whole["items"]
    assert [item["type"] for item in items] == [
        "sandbox.requested",
        "sandbox.placed",
        "sandbox.runtime_created",
        "sandbox.started",
        "sandbox.ready",
        "sandbox.metadata_patched",
        "sandbox.termination_requested",
    ]
    assert [item["version"] for item in items] == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(item["position"] for item in items) == [item["position"] for item in items]
    assert items[0]["actor"]["kind"] == "api_key"
    assert items[0]["requestId"] == "req-1"
    assert items[1]["actor"] == items[0]["actor"], "it was placed by the same request"
    assert items[1]["requestId"] == "req-1"
    assert items[3]["actor"] == {"kind": "reconciler", "id": "w1", "name": "test-worker"}
    assert items[3]["occurredAt"] <= items[3]["recordedAt"]
    assert "occurredAt" not in items[0]
    assert items[5]["data"] == {"set": {"a": "b"}}
    assert "requestId" not in items[2]

    paged, after = [], 0
    while True:
        page = (await http.get(f"{path}/events", params={"after": after, "limit": 2})).json()
        paged += page["items"]
        if "next" not in page:
            break
        after = page["next"]
    assert paged == items
    assert (await http.get(f"{path}/events?after=7")).json() == {"items": [], "epoch": 1}


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=x",
        "limit=1&limit=2",
        "after=-1",
        f"after={2**31}",
        "after=" + "9" * 5000,
        "after=",
    ],
)
async def test_bounds_of_a_history_page(http: httpx.AsyncClient, query: str):
    made = await create(http)
    answer = await http.get(f"/v1/sandboxes/{made['id']}/events?{query}")
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", query.partition("=")[0]]
