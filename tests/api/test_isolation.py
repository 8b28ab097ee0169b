"""Two tenants on one server: neither learns or changes anything of the other, and an id of the other is no id at all.

The requests are made from the routes and from the OpenAPI document, so a new route or parameter is tried too. One that
this file has no value for fails here with a `KeyError`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import httpx
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute
from msgspec.structs import replace

from app.api.app import create_app
from app.api.auth import Principal
from app.domain.sandbox import commands as cmd
from app.domain.stream import Actor, ActorKind
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.pool import Database
from tests.api.conftest import ADDRESS, WORKER, MakeContext, body, client, create, remove, seen
from tests.api.test_create import written
from tests.api.test_refusals import recorded

PRINCIPALS = {
    name: Principal(f"tenant-{name}", Actor(ActorKind.API_KEY, f"id-{name}", f"name-{name}"))
    for name in ("owner", "stranger")
}
"""Injected: key -> whose it is."""
SECRET = "canary"
NOT_FOUND = "DOCKER::SANDBOX_NOT_FOUND"
PATH_PARTS = {"port": "80"}
VALUES = {
    "includeTerminal": ["true"],
    "asOf": ["2100-01-01T00:00:00Z"],
    "after": ["1"],
    "epoch": ["1", "7"],
    "limit": ["1"],
    "state": ["Pending", "Failed"],
    "metadata": [f"secret={SECRET}"],
    "page": ["1", "2"],
    "pageSize": ["1"],
    "use_server_proxy": ["true"],
    "expires": ["1900000000"],
    "If-Match": ["*", '"2"', '"1", "2"'],
    "If-None-Match": ["*", '"2"'],
    "Prefer": ["respond-async", "wait=1"],
    "X-Request-ID": ["r1"],
    "scope": ["all"],
    "tail": ["1"],
    "since": ["1h"],
    "container": ["sandbox"],
    "event_limit": ["1"],
}
"""Of each parameter in the document, what to send."""
BODIES = {
    "patchSandboxMetadata": {"x": "y"},
    "patchNetworkPolicy": [{"action": "allow", "target": "a.test"}],
    "deleteNetworkPolicyRules": ["a.test"],
}
"""Where the document has no example."""
STATES = ("pending", "running", "failed", "deleted", "removed")


class Asked(NamedTuple):
    """A request; `{id}` stands for the sandbox."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    sent: Any
    served: bool

    async def by(self, http: httpx.AsyncClient, sandbox_id: object) -> httpx.Response:
        return await http.request(
            self.method,
            self.path.replace("{id}", str(sandbox_id)),
            params=self.query,
            headers={"X-Request-ID": "same"} | self.headers,
            json=self.sent,
        )


def variants(operation: dict[str, Any]) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Query and headers: none, then each parameter alone."""
    yield {}, {}
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            continue
        assert not parameter.get("required"), "add it to every request"
        for value in VALUES[parameter["name"]]:
            pair = {parameter["name"]: value}
            yield ({}, pair) if parameter["in"] == "header" else (pair, {})


def body_of(operation: dict[str, Any], document: dict[str, Any]) -> Any:
    if "requestBody" not in operation:
        return None
    if (name := operation["operationId"]) in BODIES:
        return BODIES[name]
    reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return document["components"]["schemas"][reference.rpartition("/")[2]]["examples"][0]


def on_one_sandbox(app: Litestar, document: dict[str, Any]) -> Iterator[Asked]:
    """On both mounts, by every method, documented or not. The mount at the root has the same handlers: no variants."""
    documented = {
        (path.removeprefix("/v1"), method.upper()): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    for route in app.routes:
        if not isinstance(route, HTTPRoute) or "{sandboxId" not in route.path:
            continue
        path = route.path_format.format(sandboxId="{id}", **PATH_PARTS)
        template = route.path_format.removeprefix("/v1")
        for method in sorted(route.methods | ({"HEAD"} if "GET" in route.methods else set())):
            operation = documented.get((template, "GET" if method == "HEAD" else method))
            sent = None if operation is None or method == "HEAD" else body_of(operation, document)
            varied = operation if operation is not None and path.startswith("/v1") else {}
            for query, headers in variants(varied):
                yield Asked(method, path, query, headers, sent, operation is not None)


def answer_of(answer: httpx.Response, sandbox_id: object) -> tuple[int, str, dict[str, str]]:
    """All that a client can see, but for the id that it sent itself."""
    return answer.status_code, answer.text.replace(str(sandbox_id), "{id}"), dict(answer.headers)


@pytest.fixture
def app(make_context: MakeContext) -> Litestar:
    """With two keys."""
    return create_app(make_context(authenticate=PRINCIPALS.get, power_wait_seconds=0.1))


@pytest.fixture
async def owner(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """Whose the sandboxes are."""
    async with client(app, **{"open-sandbox-api-key": "owner"}) as made:
        yield made


@pytest.fixture
async def stranger(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """Of another tenant."""
    async with client(app, **{"open-sandbox-api-key": "stranger"}) as made:
        yield made


async def in_state(http: httpx.AsyncClient, service: Service, state: str) -> UUID:
    sandbox_id = UUID((await create(http, metadata={"secret": SECRET}, env={"A": "1"}))["id"])
    if state == "running":
        shown = replace(seen(sandbox_id), address=ADDRESS)
        await service.execute(sandbox_id, ANY_TENANT, cmd.RecordSeen(shown), WORKER)
    elif state == "failed":
        failure = cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", SECRET)
        await service.execute(sandbox_id, ANY_TENANT, failure, WORKER)
    elif state != "pending":
        assert (await http.delete(f"/v1/sandboxes/{sandbox_id}")).status_code == 204
    if state == "removed":
        await remove(service, sandbox_id)
    return sandbox_id


@pytest.mark.parametrize("state", STATES)
async def test_an_id_of_another_tenant_is_answered_as_one_that_does_not_exist(
    app: Litestar,
    owner: httpx.AsyncClient,
    stranger: httpx.AsyncClient,
    service: Service,
    database: Database,
    state: str,
):
    theirs, nobodys = await in_state(owner, service, state), uuid4()
    document = (await owner.get("/openapi.json")).json()
    path = f"/v1/sandboxes/{theirs}?includeTerminal=true"
    before, events = (await owner.get(path)).content, await written(database)
    tried: set[tuple[str, str]] = set()
    for asked in on_one_sandbox(app, document):
        answers = [answer_of(await asked.by(stranger, each), each) for each in (theirs, nobodys)]
        assert answers[0] == answers[1], asked
        status, text, _ = answers[0]
        if asked.method == "OPTIONS":
            assert (status, text) == (204, ""), asked
        else:
            assert status == (404 if asked.served else 501), asked
            assert asked.method == "HEAD" or not asked.served or json.loads(text)["code"] == NOT_FOUND, asked
        tried.add((asked.path.replace("{id}", "{sandboxId}"), asked.method))
    documented = {
        (path.replace("{port}", PATH_PARTS["port"]), method.upper())
        for path, methods in document["paths"].items()
        for method in methods
    }
    assert {each for each in documented if "{sandboxId}" in each[0]} <= tried
    assert ("/sandboxes/{sandboxId}/snapshots", "POST") in tried, "undocumented ones too"
    assert await written(database) == events
    assert (await owner.get(path)).content == before
    rows = await recorded(database)
    assert {(row["tenant"], json.loads(row["meta"])["actor"]["id"]) for row in rows} == {
        ("tenant-stranger", "id-stranger")
    }


async def test_the_owner_is_answered_otherwise(app: Litestar, owner: httpx.AsyncClient, service: Service):
    """Otherwise the test above could pass with requests that nobody can make."""
    document = (await owner.get("/openapi.json")).json()
    tried: set[str] = set()
    for asked in on_one_sandbox(app, document):
        if asked.served:
            state = "running" if "/endpoints/" in asked.path or "/networkpolicy" in asked.path else "pending"
            answer = await asked.by(owner, await in_state(owner, service, state))
            # 400: no endpoint is signed. 409: a Pending sandbox can be neither paused nor
            # resumed. 410: epoch 7 is another one. 412: a Running one is beyond version 2. 502: no sandbox has a sidecar.
            assert answer.status_code in (200, 201, 202, 204, 304, 400, 409, 410, 412, 502), (asked, answer.text)
            tried.add(asked.method)
    assert tried == {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}


async def test_no_list_and_no_total_shows_what_is_anothers(
    owner: httpx.AsyncClient, stranger: httpx.AsyncClient, service: Service
):
    """Every documented read that names no sandbox, with each of its parameters, live sandboxes only and all."""
    for http in (owner, stranger):  # from here on totals are counted on from what this found
        assert (await http.get("/v1/sandboxes?includeTerminal=true")).json()["pagination"]["totalItems"] == 0
    theirs = [str(await in_state(owner, service, state)) for state in STATES]
    document = (await owner.get("/openapi.json")).json()
    cursor = (await owner.get("/v1/sandboxes?limit=1&includeTerminal=true")).json()["nextCursor"]
    reads = {
        path: methods["get"] for path, methods in document["paths"].items() if "{" not in path and "get" in methods
    }
    assert set(reads) == {"/v1/sandboxes", "/v1/snapshots", "/health", "/ready", "/version"}, (
        "say here what the new one shows"
    )
    queries = [{"cursor": cursor}]
    listing = reads["/v1/sandboxes"]
    listing["parameters"] = [each for each in listing["parameters"] if each["name"] != "cursor"]
    queries += [query for query, _ in variants(listing)]
    for extra in ({}, {"includeTerminal": "true"}):
        for query in queries:
            shown = [(await http.get("/v1/sandboxes", params=query | extra)) for http in (owner, stranger)]
            assert [each.status_code for each in shown] == [200, 200], (query, shown[0].text)
            page = shown[1].json()
            assert page["items"] == []
            assert (page["pagination"]["totalItems"], page["pagination"]["totalPages"]) == (0, 0)
            assert "nextCursor" not in page
            assert shown[0].json()["pagination"]["totalItems"] > 0, f"{query} would show nothing to anybody"
    mine = (await create(stranger))["id"]
    for path in reads:
        for query in ("", "?includeTerminal=true", "?state=pending"):
            text = (await stranger.get(path + query)).text
            assert not [word for word in (*theirs, SECRET, "id-owner", "name-owner") if word in text]
            if path == "/v1/sandboxes":
                page = json.loads(text)
                assert [each["id"] for each in page["items"]] == [mine]
                assert page["pagination"]["totalItems"] == 1


async def test_each_reads_its_own_history(owner: httpx.AsyncClient, stranger: httpx.AsyncClient, database: Database):
    for http, name in ((owner, "owner"), (stranger, "stranger")):
        made = await create(http)
        first = (await http.get(f"/v1/sandboxes/{made['id']}/events")).json()["items"][0]
        assert first["actor"] == {"kind": "api_key", "id": f"id-{name}", "name": f"name-{name}"}
    assert await recorded(database) == []


async def test_a_key_of_nobody_is_refused(stranger: httpx.AsyncClient):
    answer = await stranger.get("/v1/sandboxes", headers={"OPEN-SANDBOX-API-KEY": "nobody"})
    assert answer.status_code == 401


async def test_an_idempotency_key_is_its_tenants_own(
    owner: httpx.AsyncClient, stranger: httpx.AsyncClient, database: Database
):
    keyed = {"Idempotency-Key": "order-66"}
    first, second = await create(owner, keyed), await create(stranger, keyed)
    assert first["id"] != second["id"]
    for http, own in ((owner, first), (stranger, second)):
        again = await http.post("/v1/sandboxes", json=body(), headers=keyed)
        assert (again.json()["id"], again.headers["idempotency-replayed"]) == (own["id"], "true")
    only_owners = {"Idempotency-Key": "order-67"}
    await create(owner, only_owners)
    other = await stranger.post("/v1/sandboxes", json=body(timeout=700), headers=only_owners)
    assert other.status_code == 202, "a key of another tenant is free here, whatever body it came with there"
    assert "idempotency-replayed" not in other.headers
    assert await recorded(database) == []
