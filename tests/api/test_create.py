"""POST /sandboxes: the accepted shape, the rules, and what one key makes of many requests."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import func, select

from app.api.app import create_app
from app.domain.sandbox import events as ev
from app.domain.sandbox.spec import Bounds
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import events, sealed_values
from app.store.vault.seal import Sealed, Sealer
from tests.api.conftest import KEY, MakeContext, body, client, create

EVENTS = Statement(select(func.count()).select_from(events).where(events.c.kind == "sandbox"))
SECRETS = Statement(
    select(sealed_values.c.stream_id, sealed_values.c.key_id, sealed_values.c.wrapped_key, sealed_values.c.sealed)
)


async def written(database: Database) -> int:
    return (await database.fetch(EVENTS))[0][0]


async def test_the_shape_of_the_answer(http: httpx.AsyncClient):
    answer = await http.post(
        "/v1/sandboxes",
        json=body(
            metadata={"team": "a"},
            env={"A": "1", "B": None},
            platform={"os": " Linux", "arch": "AMD64"},
            extensions={"opensandbox.extensions.x": "1", "elsewhere": "2"},
            secureAccess=False,
            unknownField={"ignored": True},
        ),
    )
    assert answer.status_code == 202
    made = answer.json()
    assert made.keys() == {
        "id", "status", "entrypoint", "createdAt", "expiresAt", "metadata", "extensions", "platform",
    }  # fmt: skip
    assert made["status"].keys() == {"state", "reason", "message", "lastTransitionAt"}
    assert made["status"]["state"] == "Pending"
    assert made["status"]["lastTransitionAt"] == made["createdAt"]
    assert made["entrypoint"] == ["sleep", "60"]
    assert made["metadata"] == {"team": "a"}
    assert made["extensions"] == {"opensandbox.extensions.x": "1"}
    assert made["platform"] == {"os": "linux", "arch": "amd64"}
    assert made["createdAt"].endswith("Z")
    created, expires = (datetime.fromisoformat(made[name]) for name in ("createdAt", "expiresAt"))
    assert expires - created == timedelta(seconds=600)
    assert UUID(made["id"]).version == 7
    assert answer.headers["location"] == f"/v1/sandboxes/{made['id']}"
    assert answer.headers["etag"] == '"2"'
    assert "preference-applied" not in answer.headers


async def test_absent_is_absent_never_null(http: httpx.AsyncClient):
    answer = await http.post("/sandboxes", json=body() | {"timeout": None, "env": None, "metadata": {}, "volumes": []})
    assert answer.json().keys() == {"id", "status", "entrypoint", "createdAt"}
    assert answer.headers["location"] == f"/sandboxes/{answer.json()['id']}"
    again = await http.get(f"/sandboxes/{answer.json()['id']}")
    assert again.json().keys() == {"id", "image", "status", "entrypoint", "createdAt"}
    assert "null" not in again.text


async def test_names_in_snake_case(http: httpx.AsyncClient):
    sent = body() | {"resource_limits": {"cpu": "1"}, "secure_access": False}
    del sent["resourceLimits"]
    made = (await http.post("/v1/sandboxes", json=sent)).json()
    history = (await http.get(f"/v1/sandboxes/{made['id']}/events")).json()
    assert history["items"][0]["data"]["spec"]["resource_limits"] == {"cpu": "1"}


async def test_secrets_are_sealed_and_the_event_has_digests(
    http: httpx.AsyncClient, database: Database, sealer: Sealer
):
    made = await create(
        http,
        env={"TOKEN": "canary-env", "EMPTY": "", "NOTHING": None},
        image={"uri": "private/x", "auth": {"username": "canary-user", "password": "canary-password"}},
    )
    sandbox_id = UUID(made["id"])
    (row,) = await database.fetch(SECRETS)
    opened = sealer.unseal(sandbox_id, Sealed(row["key_id"], row["wrapped_key"], row["sealed"]))
    assert opened.env == {"TOKEN": "canary-env", "EMPTY": ""}
    assert (opened.registry_username, opened.registry_password) == ("canary-user", "canary-password")
    history = await http.get(f"/v1/sandboxes/{sandbox_id}/events")
    spec = history.json()["items"][0]["data"]["spec"]
    assert spec["env"] == {
        "TOKEN": sealer.digest(b"canary-env", f"env/{sandbox_id}/TOKEN"),
        "EMPTY": sealer.digest(b"", f"env/{sandbox_id}/EMPTY"),
    }
    assert spec["registry_auth"] is True
    assert "canary" not in history.text
    assert "canary" not in (await http.get(f"/v1/sandboxes/{sandbox_id}")).text


async def test_no_secrets_no_row(http: httpx.AsyncClient, database: Database):
    await create(http, env={"A": None})
    assert not await database.fetch(SECRETS)


async def test_the_event_says_who(http: httpx.AsyncClient, service: Service, sealer: Sealer):
    made = await create(http, {"X-Request-ID": "req-1", "Idempotency-Key": "k"})
    event, _ = await service.history(UUID(made["id"]), "default")
    assert event.meta.actor.kind == "api_key"
    assert event.meta.actor.id == sealer.digest(KEY.encode(), "api-key")
    assert event.meta.actor.name == "default"
    assert event.meta.request_id == "req-1"
    assert event.meta.client == "192.0.2.7"
    assert event.meta.idempotency_key is not None
    assert len(event.meta.idempotency_key) == 64


async def test_without_a_key_the_actor_is_anonymous(make_context: MakeContext, service: Service):
    for blank in (None, "  "):
        async with client(create_app(make_context(api_key=blank)), base_url="http://localhost") as open_http:
            made = await create(open_http)
        event, _ = await service.history(UUID(made["id"]), "default")
        assert (event.meta.actor.id, event.meta.actor.name) == ("anonymous", "anonymous")


SHAPE: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "image"),
    ({"image": {"uri": "  "}}, "image"),
    ({"image": {}}, "image.uri"),
    ({"image": {"uri": "x", "auth": {"username": "u"}}}, "image.auth.password"),
    ({"snapshotId": "s"}, "image"),
    ({"entrypoint": None}, "entrypoint"),
    ({"entrypoint": []}, "entrypoint"),
    ({"entrypoint": "sleep 1"}, "entrypoint"),
    ({"entrypoint": ["a", 1]}, "entrypoint.1"),
    ({"resourceLimits": None}, "resourceLimits"),
    ({"resourceLimits": {"cpu": 1}}, "resourceLimits.*"),
    ({"timeout": 59}, "timeout"),
    ({"timeout": -(10**30)}, "timeout"),
    ({"timeout": "600"}, "timeout"),
    ({"timeout": 600.5}, "timeout"),
    ({"timeout": True}, "timeout"),
    ({"env": {"OPENSANDBOX_LIFECYCLE": "x"}}, "env"),
    ({"env": {"": "x"}}, "env"),
    ({"env": {"A=B": "x"}}, "env"),
    ({"env": {"A": 1}}, "env.*"),
    ({"env": ["A"]}, "env"),
    ({"metadata": {"a": None}}, "metadata.*"),
    ({"platform": {"os": "linux"}}, "platform.arch"),
    ({"templateId": ""}, "templateId"),
    ({"templateId": "t"}, "image"),
    ({"templateId": "t", "image": None, "entrypoint": None, "resourceLimits": None, "timeout": None}, "timeout"),
    ({"extensions": {"poolRef": "p"}, "lifecycle": {}}, "lifecycle"),
    ({"extensions": {"poolRef": "p"}, "snapshotId": "s"}, "snapshotId"),
    ({"credentialProxy": {"enabled": True}}, "credentialProxy"),
    ({"secureAccess": "yes"}, "secureAccess"),
    ({"volumes": {}}, "volumes"),
    ({"networkPolicy": []}, "networkPolicy"),
]


@pytest.mark.parametrize(("changes", "place"), SHAPE, ids=lambda value: str(value)[:60])
async def test_shape_is_422_and_names_the_place(
    http: httpx.AsyncClient, database: Database, changes: dict[str, Any], place: str
):
    answer = await http.post("/v1/sandboxes", json=body(**changes))
    problem = answer.json()
    assert answer.status_code == 422, problem
    assert problem.keys() == {"code", "message", "detail"}
    assert problem["code"] == "GENERAL::VALIDATION_ERROR"
    places = [".".join(map(str, issue["loc"])) for issue in problem["detail"]]
    assert f"body.{place}" in places
    assert all(issue.keys() == {"loc", "msg", "type"} for issue in problem["detail"])
    assert problem["message"].startswith(places[0])
    assert await written(database) == 0


VALUES: list[tuple[dict[str, Any], str, str]] = [
    ({"metadata": {"opensandbox.io/x": "1"}}, "SANDBOX::INVALID_METADATA_LABEL", "reserved"),
    ({"metadata": {"-bad": "1"}}, "SANDBOX::INVALID_METADATA_LABEL", "key"),
    ({"metadata": {"a": "no spaces"}}, "SANDBOX::INVALID_METADATA_LABEL", "value"),
    ({"metadata": {"n" * 64: "1"}}, "SANDBOX::INVALID_METADATA_LABEL", "63"),
    ({"metadata": {f"k{n}": "v" for n in range(10_000)}}, "SANDBOX::INVALID_PARAMETER", "256"),
    ({"platform": {"os": "plan9", "arch": "amd64"}}, "SANDBOX::INVALID_PARAMETER", "platform.os"),
    ({"platform": {"os": "linux", "arch": "mips"}}, "SANDBOX::INVALID_PARAMETER", "platform.arch"),
    ({"resourceLimits": {"cpu": "fast"}}, "SANDBOX::INVALID_PARAMETER", "resourceLimits.cpu"),
    ({"resourceLimits": {"memory": "1e99"}}, "SANDBOX::INVALID_PARAMETER", "resourceLimits.memory"),
    ({"timeout": 10**12}, "SANDBOX::INVALID_PARAMETER", "timeout"),
    ({"timeout": 10**30}, "SANDBOX::INVALID_PARAMETER", "timeout"),
    ({"timeout": int("9" * 400)}, "SANDBOX::INVALID_PARAMETER", "timeout"),
    ({"entrypoint": [" "]}, "DOCKER::INVALID_ENTRYPOINT", "entrypoint"),
    ({"extensions": {"access.renew.extend.seconds": "299"}}, "SANDBOX::INVALID_PARAMETER", "300"),
    ({"extensions": {"access.renew.extend.seconds": "ten"}}, "SANDBOX::INVALID_PARAMETER", "300"),
]


@pytest.mark.parametrize(("changes", "code", "word"), VALUES, ids=lambda value: str(value)[:60])
async def test_values_are_400_with_the_contracts_code(
    http: httpx.AsyncClient, database: Database, changes: dict[str, Any], code: str, word: str
):
    answer = await http.post("/v1/sandboxes", json=body(**changes))
    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.text
    assert word in answer.json()["message"]
    assert await written(database) == 0


UNSERVED: list[tuple[dict[str, Any], str]] = [
    ({"templateId": "t", "image": None, "entrypoint": None, "resourceLimits": None}, "templateId"),
    ({"extensions": {"poolRef": "p"}}, "extensions.poolRef"),
    ({"extensions": {"access.renew.extend.seconds": "300"}}, "access.renew.extend.seconds"),
    ({"extensions": {"bootstrap.execd.isolation": "enable"}}, "bootstrap.execd.isolation"),
    ({"lifecycle": {}}, "lifecycle"),
    ({"secureAccess": True}, "secureAccess"),
    ({"networkPolicy": {}}, "networkPolicy"),
    ({"networkPolicy": {}, "credentialProxy": {"enabled": True}}, "networkPolicy"),
    ({"volumes": [{"name": "v"}]}, "volumes"),
    ({"platform": {"os": "windows", "arch": "amd64"}}, "platform.os"),
    ({"resourceLimits": {"disk": "1Gi"}}, "resourceLimits"),
]


@pytest.mark.parametrize(("changes", "field"), UNSERVED, ids=lambda value: str(value)[:60])
async def test_what_is_not_served_is_refused_by_name(
    http: httpx.AsyncClient, database: Database, changes: dict[str, Any], field: str
):
    answer = await http.post("/v1/sandboxes", json=body(**changes))
    assert (answer.status_code, answer.json()["code"]) == (501, "SANDBOX::API_NOT_SUPPORTED"), answer.text
    assert field in answer.json()["message"]
    assert await written(database) == 0


async def test_all_broken_rules_are_named_at_once(http: httpx.AsyncClient):
    answer = await http.post("/v1/sandboxes", json={"env": {"": "x"}})
    places = [issue["loc"] for issue in answer.json()["detail"]]
    assert places == [["body", "env"], ["body", "image"], ["body", "resourceLimits"]]


async def test_the_longest_timeout_is_the_operators(make_context: MakeContext):
    async with client(
        create_app(make_context(max_sandbox_timeout_seconds=3600)), **{"open-sandbox-api-key": KEY}
    ) as http:
        await create(http, timeout=3600)
        answer = await http.post("/v1/sandboxes", json=body(timeout=3601))
        assert (answer.status_code, answer.json()["code"]) == (400, "SANDBOX::INVALID_PARAMETER")
        assert "3600" in answer.json()["message"]


async def test_a_maximum_is_no_default(make_context: MakeContext):
    """As the public server: without a timeout it never expires, whatever the maximum. So the log must not name it."""
    async with client(
        create_app(make_context(max_sandbox_timeout_seconds=3600)), **{"open-sandbox-api-key": KEY}
    ) as http:
        made = await create(http, timeout=None)
        assert "expiresAt" not in made
        first = (await http.get(f"/v1/sandboxes/{made['id']}/events")).json()["items"][0]
        assert first["data"].keys().isdisjoint({"timeout_s", "timeout_from"})


# Idempotency


async def test_many_requests_with_one_key_make_one_sandbox(http: httpx.AsyncClient, database: Database):
    keyed = {"Idempotency-Key": "order-66"}
    naive = await asyncio.gather(*[http.post("/v1/sandboxes", json=body()) for _ in range(5)])
    assert len({answer.json()["id"] for answer in naive}) == 5
    before = await written(database)

    answers = await asyncio.gather(*[http.post("/v1/sandboxes", json=body(), headers=keyed) for _ in range(20)])
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert sorted(answer.headers.get("idempotency-replayed", "") for answer in answers) == ["", *["true"] * 19]
    assert await written(database) == before + 2


async def test_a_replay_answers_as_the_first_time_whatever_happened_since(http: httpx.AsyncClient):
    keyed = {"Idempotency-Key": "k1"}
    first = await http.post("/v1/sandboxes", json=body(), headers=keyed)
    await http.delete(f"/v1/sandboxes/{first.json()['id']}")
    again = await http.post("/sandboxes", json=dict(reversed(body().items())), headers=keyed)
    assert again.content == first.content


async def test_a_key_with_another_body_is_refused(http: httpx.AsyncClient, database: Database):
    keyed = {"Idempotency-Key": "k2"}
    await create(http, keyed, env={"A": "1"})
    answer = await http.post("/v1/sandboxes", json=body(env={"A": "2"}), headers=keyed)
    assert (answer.status_code, answer.json()["code"]) == (422, "SANDLEDGER::IDEMPOTENCY_KEY_REUSED")
    assert await written(database) == 2


@pytest.mark.parametrize("key", ["", " ", "a b", "x" * 256, "é"])
async def test_a_malformed_key_is_400(http: httpx.AsyncClient, key: str):
    answer = await http.post("/v1/sandboxes", json=body(), headers=[("Idempotency-Key", key.encode())])
    assert (answer.status_code, answer.json()["code"]) == (400, "GENERAL::INVALID_HEADER")


BOUNDS = Bounds(default_cpu_nanos=10**9, default_memory_bytes=2**28, max_cpu_nanos=2 * 10**9, max_memory_bytes=2**29)


async def test_the_operators_bounds_hold_before_the_append_and_stand_in_the_log(
    make_context: MakeContext, service: Service
):
    """A limit that only the driver knew would be missing from the log, and from all usage."""
    async with client(create_app(make_context(bounds=BOUNDS)), **{"OPEN-SANDBOX-API-KEY": KEY}) as http:
        for limits, cpu, memory in (
            ({}, 10**9, 2**28),
            ({"cpu": "1500m"}, 1_500_000_000, 2**28),
            ({"cpu": "2", "memory": "512Mi"}, 2 * 10**9, 2**29),
        ):
            made = await create(http, resourceLimits=limits)
            begun = (await service.history(UUID(made["id"]), "default"))[0].event
            assert isinstance(begun, ev.Requested)
            assert (begun.cpu_nanos, begun.memory_bytes) == (cpu, memory)
        for limits in ({"cpu": "2001m"}, {"memory": "513Mi"}):
            answer = await http.post("/v1/sandboxes", json=body(resourceLimits=limits))
            assert (answer.status_code, answer.json()["code"]) == (400, "SANDBOX::INVALID_PARAMETER")
            assert "operator's maximum" in answer.json()["message"]


def test_a_maximum_is_also_the_default():
    assert Bounds(max_cpu_nanos=5).apply({}) == {"cpu": 5}
    assert Bounds(default_cpu_nanos=9, max_cpu_nanos=5).apply({"gpu": 1}) == {"gpu": 1, "cpu": 5}
    assert Bounds().apply({"cpu": 7}) == {"cpu": 7}
