"""Every refused command of a known caller is on record before it is answered; and no secret is anywhere."""

from __future__ import annotations

import json
import logging
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from litestar import Litestar
from sqlalchemy import select

from app.api.errors import STATUSES
from app.errors import Rejected
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import refusals
from tests.api.conftest import body, client, create

RECORDED = Statement(select(*refusals.c).order_by(refusals.c.id))


async def recorded(database: Database) -> list[dict[str, Any]]:
    return [dict(row) for row in await database.fetch(RECORDED)]


async def test_refused_commands_are_recorded(http: httpx.AsyncClient, database: Database):
    made = await create(http)
    one = f"/v1/sandboxes/{made['id']}"
    renewal = {"expiresAt": "2020-01-01T00:00:00Z"}
    tried = [
        ("POST", "/v1/sandboxes", {"json": {}}, 422, "GENERAL::VALIDATION_ERROR", "POST /sandboxes"),
        ("POST", "/sandboxes", {"content": b"{"}, 415, "GENERAL::UNSUPPORTED_MEDIA_TYPE", "POST /sandboxes"),
        ("POST", "/v1/sandboxes", {"json": body(volumes=[{}])}, 501, "SANDBOX::API_NOT_SUPPORTED", "POST /sandboxes"),
        ("POST", f"{one}/pause", {}, 409, "DOCKER::SANDBOX_NOT_RUNNING", "POST /sandboxes/{id}/pause"),
        ("POST", f"{one}/resume", {}, 409, "DOCKER::SANDBOX_NOT_PAUSED", "POST /sandboxes/{id}/resume"),
        ("DELETE", one, {"headers": {"If-Match": '"7"'}}, 412, "SANDLEDGER::VERSION_MISMATCH", "DELETE /sandboxes/{id}"),
        ("PATCH", f"{one}/metadata", {"json": {"a b": ""}}, 400, "SANDBOX::INVALID_METADATA_LABEL", "PATCH /sandboxes/{id}/metadata"),
        ("POST", f"{one}/renew-expiration", {"json": renewal}, 400, "DOCKER::INVALID_EXPIRATION", "POST /sandboxes/{id}/renew-expiration"),
        ("PUT", f"{one}/networkpolicy", {"json": {}}, 404, "KUBERNETES::POD_IP_NOT_AVAILABLE", "PUT /sandboxes/{id}/networkpolicy"),
        ("POST", f"{one}/snapshots", {}, 409, "SNAPSHOT::INVALID_SOURCE_STATE", "POST /sandboxes/{id}/snapshots"),
    ]  # fmt: skip
    for method, path, sent, status, code, _ in tried:
        answer = await http.request(method, path, **sent)
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    rows = await recorded(database)
    assert [(row["status"], row["code"], row["command"]) for row in rows] == [
        (status, code, command) for *_, status, code, command in tried
    ]
    assert [row["stream_id"] and UUID(str(row["stream_id"])) for row in rows] == [None] * 3 + [UUID(made["id"])] * 7
    assert [row["kind"] for row in rows] == [None] * 3 + ["sandbox"] * 7
    assert {row["tenant"] for row in rows} == {"default"}


async def test_a_record_has_message_and_meta(http: httpx.AsyncClient, database: Database):
    gone = uuid4()
    answer = await http.delete(f"/v1/sandboxes/{gone}", headers={"X-Request-ID": "r1"})
    (row,) = await recorded(database)
    assert row["message"] == answer.json()["message"]
    assert UUID(str(row["stream_id"])) == gone
    meta = json.loads(row["meta"])
    assert meta["actor"]["kind"] == "api_key"
    assert (meta["request_id"], meta["client"]) == ("r1", "192.0.2.7")


async def test_a_reused_key_is_recorded_with_its_sandbox(http: httpx.AsyncClient, database: Database):
    made = await create(http, {"Idempotency-Key": "k"})
    await http.post("/v1/sandboxes", json=body(timeout=700), headers={"Idempotency-Key": "k"})
    (row,) = await recorded(database)
    assert (row["status"], row["code"], row["command"]) == (
        422,
        "SANDLEDGER::IDEMPOTENCY_KEY_REUSED",
        "POST /sandboxes",
    )
    assert (row["kind"], str(row["stream_id"])) == ("sandbox", made["id"])


def test_every_refusal_of_the_core_has_a_status():
    assert set(STATUSES) == set(Rejected.__subclasses__())
    assert not any(each.__subclasses__() for each in STATUSES), "a status is looked up by the exact class"


async def test_what_is_not_recorded(http: httpx.AsyncClient, app: Litestar, database: Database):
    async with client(app) as stranger:
        for method in ("POST", "DELETE"):
            await stranger.request(method, f"/v1/sandboxes/{uuid4()}")
        await stranger.post("/v1/sandboxes", json={}, headers={"OPEN-SANDBOX-API-KEY": "guess"})
    await http.get(f"/v1/sandboxes/{uuid4()}")
    await http.get("/v1/sandboxes?page=0")
    await http.put("/v1/sandboxes")
    await http.post("/nowhere")
    await http.post("/v1/metrics/events", json={})
    assert await recorded(database) == []


# Secrets

CANARY = "canary-7f3a"


async def test_no_error_repeats_a_secret(http: httpx.AsyncClient, database: Database, caplog: pytest.LogCaptureFixture):
    image = {"uri": "private/x", "auth": {"username": CANARY, "password": CANARY}}
    env = {"TOKEN": CANARY}
    bodies: list[Any] = [
        body(env=env, image=image, **change)
        for change in (
            {"timeout": CANARY},
            {"timeout": 1},
            {"entrypoint": CANARY},
            {"entrypoint": []},
            {"entrypoint": [{"x": CANARY}]},
            {"resourceLimits": {"cpu": CANARY}},
            {"resourceLimits": {CANARY: "1"}},
            {"resourceLimits": CANARY},
            {"metadata": {"a": f"{CANARY} !"}},
            {"metadata": {f"{CANARY} !": "a"}},
            {"platform": {"os": CANARY, "arch": CANARY}},
            {"platform": CANARY},
            {"snapshotId": CANARY},
            {"templateId": CANARY},
            {"volumes": [{"ossfs": {"accessKeySecret": CANARY}}]},
            {"lifecycle": {CANARY: CANARY}},
            {"networkPolicy": {"x": CANARY}},
            {"extensions": {"poolRef": CANARY}},
            {"extensions": {"access.renew.extend.seconds": CANARY}},
        )
    ]
    bodies += [
        body(env={"TOKEN": [CANARY]}),
        body(env={f"{CANARY}=": "x"}),
        body(env={"TOKEN": f"{CANARY}\0"}),
        body(image={"uri": "x", "auth": {"username": CANARY}}),
        body(image={"uri": "x", "auth": CANARY}),
        CANARY,
        [CANARY],
    ]
    with caplog.at_level(logging.DEBUG):
        for sent in bodies:
            answer = await http.post("/v1/sandboxes", json=sent, headers={"Idempotency-Key": f"{uuid4()}"})
            assert answer.status_code in (400, 422, 501), sent
            assert CANARY not in answer.text + str(answer.headers), sent
        for raw in (f'{{"env": {{"A": "{CANARY}"', f'{{"env": {{"A": "{CANARY}"}}}} x', f"'{CANARY}'"):
            answer = await http.post("/v1/sandboxes", content=raw, headers={"Content-Type": "application/json"})
            assert answer.status_code == 422
            assert CANARY not in answer.text
        for query in (f"page={CANARY}", f"state={CANARY}", f"metadata={CANARY}", f"cursor={CANARY}", f"limit={CANARY}"):
            assert CANARY not in (await http.get(f"/v1/sandboxes?{query}")).text
        for header in ("Idempotency-Key", "If-Match", "Prefer"):
            answer = await http.post("/v1/sandboxes", json={}, headers={header: f"{CANARY} {CANARY}"})
            assert CANARY not in answer.text
        made = await create(http, env=env, image=image)
        for path in ("", "/events", "?includeTerminal=true"):
            assert CANARY not in (await http.get(f"/v1/sandboxes/{made['id']}{path}")).text
    assert not [line for line in caplog.records if line.name != "httpx" and CANARY in line.getMessage()]
    assert len(await recorded(database)) == len(bodies) + 3 + 3
    for row in await recorded(database):
        assert CANARY not in str(row)
