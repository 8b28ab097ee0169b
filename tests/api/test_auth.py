"""Who calls: tenants by key, and what a server without keys still refuses."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute

from app.api.app import create_app
from app.api.auth import Principal
from app.domain.stream import Actor, ActorKind
from app.store.database.pool import Database
from tests.api.conftest import KEY, MakeContext, body, client, create
from tests.api.test_create import written
from tests.api.test_refusals import recorded

OWNERS = {
    name: Principal(f"tenant-{name}", Actor(ActorKind.API_KEY, f"id-{name}", f"name-{name}")) for name in ("a", "b")
}
RENEWAL = {"expiresAt": "2040-01-01T00:00:00Z"}


async def test_a_tenant_sees_only_its_own(make_context: MakeContext, database: Database):
    app = create_app(make_context(authenticate=OWNERS.get))
    async with client(app, **{"open-sandbox-api-key": "a"}) as a, client(app, **{"open-sandbox-api-key": "b"}) as b:
        mine, theirs = await create(a, {"Idempotency-Key": "k"}), await create(b, {"Idempotency-Key": "k"})
        assert mine["id"] != theirs["id"]
        for http, own in ((a, mine), (b, theirs)):
            listed = (await http.get("/v1/sandboxes?includeTerminal=true")).json()
            assert [each["id"] for each in listed["items"]] == [own["id"]]
            assert listed["pagination"]["totalItems"] == 1
        path = f"/v1/sandboxes/{theirs['id']}"
        for method, suffix, sent in (
            ("GET", "", None),
            ("GET", "?includeTerminal=true", None),
            ("GET", "?asOf=2100-01-01T00:00:00Z", None),
            ("GET", "/events", None),
            ("DELETE", "", None),
            ("PATCH", "/metadata", {"x": "y"}),
            ("POST", "/pause", None),
            ("POST", "/resume", None),
            ("POST", "/renew-expiration", RENEWAL),
        ):
            for match in ({}, {"If-Match": '"1", "2"'}):
                answer = await a.request(method, f"{path}{suffix}", json=sent, headers=match)
                assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND"), (
                    method,
                    suffix,
                )
        assert (await b.get(path)).headers["etag"] == '"2"'
        first = (await b.get(f"{path}/events")).json()["items"][0]
        assert first["actor"] == {"kind": "api_key", "id": "id-b", "name": "name-b"}
        rows = await recorded(database)
        assert len(rows) == 10
        assert {(row["tenant"], json.loads(row["meta"])["actor"]["id"]) for row in rows} == {("tenant-a", "id-a")}
        assert (await a.get("/v1/sandboxes", headers={"OPEN-SANDBOX-API-KEY": "c"})).status_code == 401


BODIES = {"/metadata": {"x": "y"}, "/renew-expiration": RENEWAL}


async def test_no_route_shows_or_changes_what_is_anothers(make_context: MakeContext, database: Database):
    """The routes are those that the application has, so that a new one is tried too."""
    app = create_app(make_context(authenticate=OWNERS.get))
    async with client(app, **{"open-sandbox-api-key": "a"}) as a, client(app, **{"open-sandbox-api-key": "b"}) as b:
        theirs = await create(b, metadata={"secret": "canary-of-b"})
        before = (await b.get(f"/v1/sandboxes/{theirs['id']}")).content
        events = await written(database)
        tried: set[str] = set()
        for route in app.routes:
            if not isinstance(route, HTTPRoute) or "{sandboxId" not in route.path:
                continue
            for method in set(route.methods) - {"OPTIONS"}:
                path = route.path_format.replace("{sandboxId}", theirs["id"]).replace("{port}", "80")
                suffix = path.partition(theirs["id"])[2]
                path = path.replace("{rest}", "x").replace("{kind}", "logs")
                answer = await a.request(method, path, json=BODIES.get(suffix))
                unserved = answer.status_code == 501
                code = answer.json()["code"] if answer.content else ""
                assert unserved or code == "DOCKER::SANDBOX_NOT_FOUND" or method == "HEAD", f"{method} {path}: {code}"
                assert unserved or answer.status_code == 404
                assert "canary" not in answer.text
                tried |= {f"{method} {suffix}"} - ({f"{method} {suffix}"} if unserved else set())
        assert {"GET ", "GET /events", "DELETE ", "PATCH /metadata", "POST /pause", "POST /resume"} <= tried
        assert "POST /renew-expiration" in tried
        for query in ("", "?includeTerminal=true", "?metadata=secret%3Dcanary-of-b", "?state=pending"):
            for mount in ("/v1", ""):
                page = (await a.get(f"{mount}/sandboxes{query}")).json()
                assert (page["items"], page["pagination"]["totalItems"]) == ([], 0)
        assert await written(database) == events
        assert (await b.get(f"/v1/sandboxes/{theirs['id']}")).content == before


async def test_an_idempotency_key_is_its_tenants_own(make_context: MakeContext, database: Database):
    app = create_app(make_context(authenticate=OWNERS.get))
    keyed = {"Idempotency-Key": "order-66"}
    async with client(app, **{"open-sandbox-api-key": "a"}) as a, client(app, **{"open-sandbox-api-key": "b"}) as b:
        mine, theirs = await create(a, keyed), await create(b, keyed)
        assert mine["id"] != theirs["id"]
        for http, own in ((a, mine), (b, theirs)):
            again = await http.post("/v1/sandboxes", json=body(), headers=keyed)
            assert (again.json()["id"], again.headers["idempotency-replayed"]) == (own["id"], "true")
        only_b = {"Idempotency-Key": "order-67"}
        await create(b, only_b)
        other = await a.post("/v1/sandboxes", json=body(timeout=700), headers=only_b)
        assert other.status_code == 202, "a key of another tenant is free here, whatever body it came with there"
        assert "idempotency-replayed" not in other.headers
        assert await recorded(database) == []


# Without a key

LOOPBACK = ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.1.2.3:1", "[::1]", "[::1]:8080"]
ELSEWHERE = [
    "evil.example",
    "evil.example:8080",
    "localhost.evil.example",
    "10.0.0.1",
    "0.0.0.0",
    "[::2]",
    "127.0.0.1.nip.io",
]


@pytest.fixture
def keyless(make_context: MakeContext) -> Litestar:
    return create_app(make_context(api_key=None))


@pytest.mark.parametrize("host", ELSEWHERE)
async def test_a_rebound_name_reaches_nothing(keyless: Litestar, database: Database, host: str):
    async with client(keyless, Host=host) as http:
        for method, path in (("GET", "/v1/sandboxes"), ("POST", "/v1/sandboxes"), ("GET", "/ready"), ("GET", "/no")):
            answer = await http.request(method, path, json=body() if method == "POST" else None)
            assert (answer.status_code, answer.json()["code"]) == (403, "SANDLEDGER::HOST_NOT_ALLOWED")
            assert "localhost" in answer.json()["message"]
            assert "x-request-id" in answer.headers
    assert await written(database) == 0


@pytest.mark.parametrize("host", LOOPBACK)
async def test_the_loopback_by_any_name(keyless: Litestar, host: str):
    async with client(keyless, Host=host) as http:
        await create(http)


async def test_a_host_must_not_be_repeated(keyless: Litestar):
    async with client(keyless) as http:
        answer = await http.get("/health", headers=[("Host", "localhost"), ("Host", "evil.example")])
        assert (answer.status_code, answer.json()["code"]) == (400, "GENERAL::INVALID_HEADER")


async def test_an_operator_may_open_a_server_to_every_name(make_context: MakeContext):
    async with client(create_app(make_context(api_key=None, loopback_only=False))) as http:
        await create(http)


ACTS: list[tuple[str, str, Any]] = [
    ("POST", "", body()),
    ("DELETE", "/{id}", None),
    ("PATCH", "/{id}/metadata", {"a": "b"}),
    ("POST", "/{id}/pause", None),
    ("POST", "/{id}/renew-expiration", RENEWAL),
]


@pytest.mark.parametrize(
    "foreign",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:3000"},
        {"Origin": "http://localhost:80.evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
    ids=lambda headers: next(iter(headers.values())),
)
async def test_a_page_of_another_origin_changes_nothing(keyless: Litestar, database: Database, foreign: dict[str, str]):
    async with client(keyless, base_url="http://localhost:8080") as http:
        made = await create(http)
        for method, path, sent in ACTS:
            url = f"/v1/sandboxes{path.format(id=made['id'])}"
            answer = await http.request(method, url, json=sent, headers=foreign)
            assert (answer.status_code, answer.json()["code"]) == (403, "SANDLEDGER::ORIGIN_NOT_ALLOWED"), method
        read = await http.get("/v1/sandboxes", headers=foreign)
        assert not [name for name in read.headers if name.startswith("access-control")], "it may not read the answer"
    assert await written(database) == 2


async def test_the_servers_own_page_and_programs_may_act(keyless: Litestar):
    async with client(keyless, base_url="http://localhost:8080") as http:
        await create(http, {"Origin": "http://localhost:8080", "Sec-Fetch-Site": "same-origin"})
        await create(http, {"Sec-Fetch-Site": "none"})
        await create(http)


async def test_with_a_key_pages_of_any_origin_may_call(http: httpx.AsyncClient):
    foreign = {"Origin": "https://ui.example", "Sec-Fetch-Site": "cross-site"}
    answer = await http.post("/v1/sandboxes", json=body(), headers=foreign)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (202, "*")


async def test_a_401_is_readable_by_the_page(app: Litestar):
    async with client(app, Origin="https://ui.example") as http:
        answer = await http.get("/v1/sandboxes")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "*")


# WebSockets


async def _handshake(app: Any, path: str, **headers: str) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {
        "type": "websocket", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "ws", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": sent, "subprotocols": [],
        "client": ("192.0.2.7", 4711), "server": ("api.test", 80), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    return said


@pytest.mark.parametrize("path", ["/health", "/v1/sandboxes", "/v1/sandboxes/x/proxy/80", "/no"])
async def test_a_websocket_needs_the_key(app: Litestar, path: str):
    refused = {"type": "websocket.close", "code": 1008}
    assert await _handshake(app, path) == [refused | {"reason": "MISSING_API_KEY"}]
    assert await _handshake(app, path, open_sandbox_api_key="x") == [refused | {"reason": "INVALID_API_KEY"}]
    (let_in,) = await _handshake(app, path, open_sandbox_api_key=KEY)
    assert let_in["code"] != 1008, "it came to the router, which has no WebSockets"


async def test_a_page_of_another_origin_opens_no_websocket(keyless: Litestar):
    (refused,) = await _handshake(keyless, "/v1/x", host="localhost", origin="https://evil.example")
    assert (refused["code"], refused["reason"]) == (1008, "SANDLEDGER::ORIGIN_NOT_ALLOWED")
    (refused,) = await _handshake(keyless, "/v1/x", host="evil.example")
    assert (refused["code"], refused["reason"]) == (1008, "SANDLEDGER::HOST_NOT_ALLOWED")
