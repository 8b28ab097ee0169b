"""Who may call: what a server without keys still refuses. Tenants: `test_isolation.py`."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from litestar import Litestar

from app.api.app import create_app
from app.store.database.pool import Database
from tests.api.conftest import KEY, MakeContext, body, client, create
from tests.api.test_create import written

RENEWAL = {"expiresAt": "2040-01-01T00:00:00Z"}

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
        {"Sec-Fetch-Site": "same-site"},
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
