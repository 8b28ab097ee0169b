"""Snapshots over HTTP, without an engine: what a worker would find is recorded by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from msgspec.structs import replace

from app.api.app import create_app
from app.api.auth import Principal
from app.domain.engine.decide import RecordSighting, RecordSilence
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Power
from app.domain.snapshot.decide import (
    MAX_CREATING,
    Command,
    RecordArtifact,
    RecordCommitted,
    RecordFailed,
    RecordReady,
    RecordRemoved,
)
from app.domain.stream import Actor, ActorKind
from app.domain.tenants import ANY_TENANT
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from tests.api.conftest import KEY, WORKER, MakeContext, body, client, create, observe, remove
from tests.api.test_refusals import recorded
from tests.conftest import INSTALLATION, SIGHTING
from tests.support.sql import connected

IMAGE_ID = f"sha256:{'c' * 64}"
Json = dict[str, Any]


@pytest.fixture
def context(make_context: MakeContext) -> Any:
    return make_context(power_wait_seconds=0.05)


async def running(http: httpx.AsyncClient, service: Service, **changes: Any) -> str:
    made = (await create(http, **changes))["id"]
    await observe(service, made)
    return made


async def told(service: Service, snapshot_id: str, *commands: Command) -> None:
    for command in commands:
        await service.snapshots.execute(UUID(snapshot_id), ANY_TENANT, command, WORKER)


async def taken(http: httpx.AsyncClient, sandbox_id: str, **sent: Any) -> Json:
    answer = await http.post(f"/v1/sandboxes/{sandbox_id}/snapshots", json=sent)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def ready(http: httpx.AsyncClient, service: Service, image_id: str = IMAGE_ID, **sent: Any) -> str:
    snapshot = await taken(http, await running(http, service), **sent)
    await told(service, snapshot["id"], RecordCommitted("sha256:raw", "sha256:l", 12), RecordReady(image_id, 4096))
    return snapshot["id"]


def restored(snapshot_id: str, **changes: Any) -> Json:
    return body(image=None, entrypoint=None, snapshotId=snapshot_id, **changes)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


async def test_a_snapshot_is_accepted_and_shown(http: httpx.AsyncClient, service: Service):
    sandbox_id = await running(http, service)
    answer = await http.post(f"/v1/sandboxes/{sandbox_id}/snapshots", json={"name": "one"})
    made = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/snapshots/{made['id']}"
    assert (await http.post(f"/sandboxes/{sandbox_id}/snapshots")).headers["location"].startswith("/v1/snapshots/")
    assert made == {
        "id": made["id"],
        "sandboxId": sandbox_id,
        "name": "one",
        "status": {
            "state": "Creating",
            "reason": "snapshot_accepted",
            "message": "Snapshot creation accepted.",
            "lastTransitionAt": made["createdAt"],
        },
        "createdAt": made["createdAt"],
    }
    assert (await http.get(f"/v1/snapshots/{made['id']}")).json() == made
    await told(service, made["id"], RecordCommitted("sha256:raw", "sha256:l"), RecordReady(IMAGE_ID, 1))
    shown = (await http.get(f"/snapshots/{made['id']}")).json()
    assert (shown["status"]["state"], shown["status"]["reason"]) == ("Ready", "snapshot_runtime_ready")
    assert shown["status"]["lastTransitionAt"] > made["createdAt"]


@pytest.mark.parametrize("sent", [{}, {"content": b""}, {"json": None}, {"json": {}}, {"json": {"name": None}}])
async def test_a_body_may_be_left_out(http: httpx.AsyncClient, service: Service, sent: Any):
    answer = await http.post(f"/v1/sandboxes/{await running(http, service)}/snapshots", **sent)
    assert answer.status_code == 202, answer.text
    assert "name" not in answer.json()


@pytest.mark.parametrize("name", ["", 5, ["x"], "x" * 1025, "a\0b"])
async def test_a_wrong_name_is_refused(http: httpx.AsyncClient, service: Service, name: Any):
    answer = await http.post(f"/v1/sandboxes/{await running(http, service)}/snapshots", json={"name": name})
    assert code(answer) == (422, "GENERAL::VALIDATION_ERROR")


async def test_only_running_sandboxes_have_snapshots(http: httpx.AsyncClient, service: Service):
    pending = (await create(http))["id"]
    assert code(await http.post(f"/v1/sandboxes/{pending}/snapshots")) == (409, "SNAPSHOT::INVALID_SOURCE_STATE")
    paused = await running(http, service)
    await service.execute(UUID(paused), ANY_TENANT, cmd.Pause(), WORKER)
    assert code(await http.post(f"/v1/sandboxes/{paused}/snapshots")) == (409, "SNAPSHOT::INVALID_SOURCE_STATE")
    await observe(service, paused, Power.PAUSED)
    assert code(await http.post(f"/v1/sandboxes/{paused}/snapshots")) == (409, "SNAPSHOT::INVALID_SOURCE_STATE")
    await http.delete(f"/v1/sandboxes/{paused}")
    for gone in (paused, uuid4(), "no-id"):
        assert code(await http.post(f"/v1/sandboxes/{gone}/snapshots")) == (404, "DOCKER::SANDBOX_NOT_FOUND")


async def test_lists_filter_and_page(http: httpx.AsyncClient, service: Service):
    one, two = await running(http, service), await running(http, service)
    ids = [(await taken(http, sandbox, name=name))["id"] for sandbox, name in ((one, "a"), (one, "b"), (two, "a"))]
    await told(service, ids[1], RecordFailed("snapshot_runtime_failed", "no"))

    async def found(**query: Any) -> list[str]:
        answer = await http.get("/v1/snapshots", params=query)
        assert answer.status_code == 200, answer.text
        return [item["id"] for item in answer.json()["items"]]

    assert await found() == ids[::-1]
    assert await found(sandboxId=one) == [ids[1], ids[0]]
    assert await found(name="a") == [ids[2], ids[0]]
    assert await found(name="A") == []
    assert await found(state="Failed") == [ids[1]]
    assert await found(state="failed") == []
    assert await found(state=["Failed", "Creating", "Removed"]) == ids[::-1]
    assert await found(state="Removed") == []
    assert await found(sandboxId="no-id") == []
    assert await found(sandboxId=one, name="a", state="Creating") == [ids[0]]
    first = (await http.get("/v1/snapshots", params={"pageSize": 2})).json()
    assert [item["id"] for item in first["items"]] == [ids[2], ids[1]]
    assert first["pagination"] == {
        "page": 1, "pageSize": 2, "totalItems": 3, "totalPages": 2, "hasNextPage": True,
    }  # fmt: skip
    assert await found(pageSize=2, page=2) == [ids[0]]
    assert await found(pageSize=2, page=2**53) == []
    assert (await http.get("/v1/snapshots", params={"pageSize": 0})).status_code == 422
    assert (await http.get("/v1/snapshots", params={"name": "x", "state": "nonsense"})).json()["pagination"] == {
        "page": 1, "pageSize": 20, "totalItems": 0, "totalPages": 0, "hasNextPage": False,
    }  # fmt: skip


async def test_a_delete_is_refused_while_it_is_made_and_shown_until_it_is_done(
    http: httpx.AsyncClient, service: Service
):
    made = (await taken(http, await running(http, service)))["id"]
    assert code(await http.delete(f"/v1/snapshots/{made}")) == (409, "SNAPSHOT::INVALID_STATE")
    await told(service, made, RecordFailed("snapshot_source_removed", "gone"))
    assert (await http.delete(f"/v1/snapshots/{made}")).status_code == 204  # no worker: it is still Deleting
    status = (await http.get(f"/v1/snapshots/{made}")).json()["status"]
    assert (status["state"], status["reason"]) == ("Deleting", "snapshot_delete_requested")
    assert (await http.delete(f"/v1/snapshots/{made}")).status_code == 204
    await told(service, made, RecordRemoved())
    for gone in (made, uuid4(), "no-id"):
        assert code(await http.get(f"/v1/snapshots/{gone}")) == (404, "SNAPSHOT::NOT_FOUND")
        assert code(await http.delete(f"/v1/snapshots/{gone}")) == (404, "SNAPSHOT::NOT_FOUND")
    assert (await http.get("/v1/snapshots")).json()["items"] == []


async def test_a_sandbox_is_made_from_a_snapshot(http: httpx.AsyncClient, service: Service):
    made = await ready(http, service)
    answer = await http.post("/v1/sandboxes", json=restored(made))
    assert answer.status_code == 202, answer.text
    assert answer.json()["entrypoint"] == ["tail", "-f", "/dev/null"]
    shown = (await http.get(f"/v1/sandboxes/{answer.json()['id']}")).json()
    assert shown["snapshotId"] == made
    assert "image" not in shown
    loaded = await service.view.load(UUID(answer.json()["id"]), ANY_TENANT)
    assert loaded is not None
    assert (loaded[0].engine, loaded[0].spec.image) == (SIGHTING.name, "")
    own = await http.post("/v1/sandboxes", json=restored(made) | {"entrypoint": ["sleep", "1"]})
    assert own.json()["entrypoint"] == ["sleep", "1"]
    assert code(await http.post("/v1/sandboxes", json=body(snapshotId=made))) == (422, "GENERAL::VALIDATION_ERROR")


async def test_what_cannot_be_restored_is_refused(http: httpx.AsyncClient, service: Service):
    for unknown in (str(uuid4()), "no-id"):
        answer = await http.post("/v1/sandboxes", json=restored(unknown))
        assert code(answer) == (404, "SNAPSHOT::NOT_FOUND")
        assert unknown not in answer.text or unknown != "no-id"
    creating = (await taken(http, await running(http, service)))["id"]
    assert code(await http.post("/v1/sandboxes", json=restored(creating))) == (409, "SNAPSHOT::NOT_READY")
    made = await ready(http, service)
    await told(service, made, RecordArtifact(present=False))
    status = (await http.get(f"/v1/snapshots/{made}")).json()["status"]
    assert (status["state"], status["reason"]) == ("Ready", "snapshot_runtime_missing_image")
    refused = await http.post("/v1/sandboxes", json=restored(made))
    assert code(refused) == (409, "SNAPSHOT::INVALID_RESTORE_CONFIG")
    await told(service, made, RecordArtifact(present=True))
    assert (await http.post("/v1/sandboxes", json=restored(made))).status_code == 202


async def test_an_engine_that_is_away_cannot_restore(
    http: httpx.AsyncClient, service: Service, database: Database, signal: Signal
):
    made = await ready(http, service)
    engines = Engines(database, signal, INSTALLATION, service.engines)
    (standing,) = await service.engines.standings()
    await engines.execute(SIGHTING.name, RecordSilence(standing.now, "away"), WORKER)
    service.engines.forget()
    answer = await http.post("/v1/sandboxes", json=restored(made))
    assert code(answer) == (409, "SNAPSHOT::ENGINE_UNAVAILABLE")


async def test_a_snapshot_in_use_is_not_deleted(http: httpx.AsyncClient, service: Service):
    made = await ready(http, service)
    user = (await http.post("/v1/sandboxes", json=restored(made))).json()["id"]
    await observe(service, user)
    answer = await http.delete(f"/v1/snapshots/{made}")
    assert code(answer) == (409, "SNAPSHOT::DELETE_CONFLICT")
    assert user in answer.json()["message"]
    await http.delete(f"/v1/sandboxes/{user}")  # its container is still there
    assert code(await http.delete(f"/v1/snapshots/{made}")) == (409, "SNAPSHOT::DELETE_CONFLICT")
    await remove(service, user)
    assert (await http.delete(f"/v1/snapshots/{made}")).status_code == 204
    assert code(await http.post("/v1/sandboxes", json=restored(made))) == (409, "SNAPSHOT::NOT_READY")


async def test_a_delete_and_a_restore_exclude_each_other(http: httpx.AsyncClient, service: Service):
    for _ in range(12):
        made = await ready(http, service)
        create_answer, delete_answer = await asyncio.gather(
            http.post("/v1/sandboxes", json=restored(made)), http.delete(f"/v1/snapshots/{made}")
        )
        assert (create_answer.status_code, delete_answer.status_code) in ((202, 409), (409, 204))


async def test_a_repeated_restore_is_answered_whatever_became_of_the_snapshot(
    http: httpx.AsyncClient, service: Service
):
    made, key = await ready(http, service), {"Idempotency-Key": "k1"}
    first = await http.post("/v1/sandboxes", json=restored(made), headers=key)
    sandbox_id = first.json()["id"]
    await observe(service, sandbox_id)
    await http.delete(f"/v1/sandboxes/{sandbox_id}")
    await remove(service, sandbox_id)
    assert (await http.delete(f"/v1/snapshots/{made}")).status_code == 204
    again = await http.post("/v1/sandboxes", json=restored(made), headers=key)
    assert (again.status_code, again.json(), again.headers["idempotency-replayed"]) == (202, first.json(), "true")
    other = await http.post("/v1/sandboxes", json=restored(made), headers={"Idempotency-Key": "k2"})
    assert code(other) == (409, "SNAPSHOT::NOT_READY")


@pytest.mark.parametrize(
    "uri",
    [
        "sandledger-snapshots:0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5c",
        "sandledger-snapshots",
        "docker.io/library/sandledger-snapshots:x",
        "localhost:5000/sandledger-snapshot-other/x:1",
        IMAGE_ID,
        "c" * 64,
        "sha256:cccc",
    ],
)
async def test_images_of_snapshots_cannot_be_run_by_name_or_id(http: httpx.AsyncClient, uri: str):
    assert code(await http.post("/v1/sandboxes", json=body(image={"uri": uri}))) == (400, "SANDBOX::INVALID_PARAMETER")


async def test_a_refusal_is_recorded_about_the_snapshot(http: httpx.AsyncClient, service: Service, database: Database):
    made = (await taken(http, await running(http, service)))["id"]
    await http.delete(f"/v1/snapshots/{made}")
    row = (await recorded(database))[-1]
    assert (row["kind"], str(row["stream_id"]), row["command"], row["code"]) == (
        "snapshot",
        made,
        "DELETE /snapshots/{id}",
        "SNAPSHOT::INVALID_STATE",
    )


@pytest.fixture
async def stranger(make_context: MakeContext) -> AsyncIterator[httpx.AsyncClient]:
    """A caller of another tenant."""
    other = Principal("tenant-b", Actor(ActorKind.API_KEY, "id-b", "name-b"))
    app = create_app(make_context(authenticate=lambda _: other, power_wait_seconds=0.05))
    async with client(app, **{"OPEN-SANDBOX-API-KEY": KEY}) as made:
        yield made


async def test_a_snapshot_of_another_tenant_does_not_exist(
    http: httpx.AsyncClient, stranger: httpx.AsyncClient, service: Service
):
    sandbox_id = await running(http, service)
    made = await ready(http, service)
    assert code(await stranger.get(f"/v1/snapshots/{made}")) == (404, "SNAPSHOT::NOT_FOUND")
    assert code(await stranger.delete(f"/v1/snapshots/{made}")) == (404, "SNAPSHOT::NOT_FOUND")
    assert code(await stranger.post("/v1/sandboxes", json=restored(made))) == (404, "SNAPSHOT::NOT_FOUND")
    assert code(await stranger.post(f"/v1/sandboxes/{sandbox_id}/snapshots")) == (404, "DOCKER::SANDBOX_NOT_FOUND")
    assert (await stranger.get("/v1/snapshots")).json()["items"] == []
    assert (await stranger.get("/v1/snapshots", params={"sandboxId": sandbox_id})).json()["items"] == []
    keyed = {"Idempotency-Key": "k9"}
    assert code(await stranger.post("/v1/sandboxes", json=restored(made), headers=keyed)) == (
        404,
        "SNAPSHOT::NOT_FOUND",
    )


async def test_an_engine_that_cannot_make_snapshots_is_named(
    http: httpx.AsyncClient, service: Service, database: Database, signal: Signal
):
    sandbox_id = await running(http, service)
    engines = Engines(database, signal, INSTALLATION, service.engines)
    sighting = replace(SIGHTING, capabilities=replace(SIGHTING.capabilities, snapshots="none"))
    await engines.execute(SIGHTING.name, RecordSighting(sighting), WORKER)
    service.engines.forget()
    assert code(await http.post(f"/v1/sandboxes/{sandbox_id}/snapshots")) == (501, "SNAPSHOT::NOT_IMPLEMENTED")


async def test_the_message_says_why_the_last_attempt_failed(http: httpx.AsyncClient, service: Service, dsn: str):
    made = (await taken(http, await running(http, service)))["id"]
    async with connected(dsn) as connection:
        error = "no space left\x1b on device"
        await connection.execute("UPDATE reconcile_queue SET last_error = $1 WHERE stream_id = $2", error, UUID(made))
    message = (await http.get(f"/v1/snapshots/{made}")).json()["status"]["message"]
    assert message == "Snapshot creation accepted. The last attempt failed: no space left\\x1b on device"
    await told(service, made, RecordCommitted("sha256:raw", "sha256:l"), RecordReady(IMAGE_ID, 1))
    assert (await http.get(f"/v1/snapshots/{made}")).json()["status"]["message"] == "Snapshot is ready."


async def test_of_one_sandbox_only_some_are_made_at_once(http: httpx.AsyncClient, service: Service):
    """All come at once: who counted first and inserted then would take them all."""
    sandbox_id, other = await running(http, service), await running(http, service)
    answers = await asyncio.gather(*(http.post(f"/v1/sandboxes/{sandbox_id}/snapshots") for _ in range(20)))
    assert [answer.status_code for answer in answers].count(202) == MAX_CREATING
    assert {code(answer) for answer in answers if answer.status_code != 202} == {(409, "SNAPSHOT::TOO_MANY")}
    await taken(http, other)
    made = next(answer.json()["id"] for answer in answers if answer.status_code == 202)
    await told(service, made, RecordFailed("snapshot_runtime_failed", ""))
    await taken(http, sandbox_id)
