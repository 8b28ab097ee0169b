"""What holds for every answer: request id, key, origins, methods, errors nobody expected."""

from __future__ import annotations

import logging
import re
from typing import Any
from uuid import uuid4

import httpx
import pytest
from litestar import Litestar

from app.api.app import create_app
from app.runtime.fake import FakeDriver, FakeEngine
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.refusals import Refusals
from app.store.log.signal import Signal
from app.views.listing import Listing
from tests.api.conftest import INSTALLATION, KEY, MakeContext, body, client, create
from tests.support.sql import connected

ANYWHERE = [
    ("GET", "/v1/sandboxes", 200),
    ("GET", "/health", 200),
    ("GET", "/v1/sandboxes?page=0", 422),
    ("GET", "/v1/sandboxes/6f1c2a5e-0b7d-4c39-9a57-d1e0c4b8a263", 404),
    ("GET", "/nowhere", 404),
    ("PUT", "/v1/sandboxes", 405),
    ("GET", "/v1/pools", 501),
    ("OPTIONS", "/v1/sandboxes", 204),
    ("HEAD", "/v1/sandboxes", 200),
    ("POST", "/v1/sandboxes", 415),
]


@pytest.mark.parametrize(("method", "path", "status"), ANYWHERE)
async def test_the_request_id_comes_back(http: httpx.AsyncClient, method: str, path: str, status: int):
    answer = await http.request(method, path, headers={"X-Request-ID": "my-id"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "my-id")
    assert (await http.request(method, path)).headers["x-request-id"] != "my-id"


@pytest.mark.parametrize("sent", [b"", b"a b", b"x" * 129, "é".encode(), b"\x07"])
async def test_another_request_id_is_made_when_it_is_no_good(http: httpx.AsyncClient, sent: bytes):
    answer = await http.get("/v1/sandboxes", headers=[("X-Request-ID", sent)])
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_keys(app: Litestar):
    tried = [
        ({}, 401, "MISSING_API_KEY"),
        ({"OPEN-SANDBOX-API-KEY": ""}, 401, "MISSING_API_KEY"),
        ({"OPEN-SANDBOX-API-KEY": "wrong"}, 401, "INVALID_API_KEY"),
        ({"OPEN-SANDBOX-API-KEY": KEY + "x"}, 401, "INVALID_API_KEY"),
        ({"Authorization": f"Bearer {KEY}"}, 401, "MISSING_API_KEY"),
    ]
    async with client(app) as http:
        for headers, status, code in tried:
            for method, path in (
                ("GET", "/v1/sandboxes"),
                ("POST", "/sandboxes"),
                ("GET", "/v1/health"),
                ("GET", "/no"),
            ):
                answer = await http.request(method, path, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (status, code)
                assert "x-request-id" in answer.headers


async def test_open_paths_are_exact(app: Litestar):
    async with client(app) as http:
        for path in ("/health", "/ready", "/version", "/docs", "/redoc", "/openapi.json"):
            assert (await http.get(path)).status_code in (200, 307), path
        for path in ("/healthz", "/health/", "//health", "/health/x", "/docsX", "/v1/health", "/openapi.jsonx"):
            assert (await http.get(path)).status_code == 401, path


async def test_repeated_headers(http: httpx.AsyncClient):
    for name in ("OPEN-SANDBOX-API-KEY", "Idempotency-Key", "X-Request-ID", "Content-Type"):
        twice = [(name, KEY), (name.lower(), KEY)]
        http.headers.pop(name, None)
        answer = await http.post("/v1/sandboxes", content=b"{}", headers=[("open-sandbox-api-key", KEY), *twice][-3:])
        assert (answer.status_code, answer.json()["code"]) == (400, "GENERAL::INVALID_HEADER"), name
        assert name.lower() in answer.json()["message"]


async def test_methods(http: httpx.AsyncClient):
    for method, path, allow in (
        ("PUT", "/v1/sandboxes", "GET, HEAD, OPTIONS, POST"),
        ("POST", f"/v1/sandboxes/{uuid4()}", "DELETE, GET, HEAD, OPTIONS"),
        ("GET", f"/sandboxes/{uuid4()}/pause", "OPTIONS, POST"),
        ("HEAD", f"/sandboxes/{uuid4()}/pause", "OPTIONS, POST"),
        ("DELETE", "/health", "GET, HEAD, OPTIONS"),
        ("TRACE", "/v1/sandboxes", "GET, HEAD, OPTIONS, POST"),
    ):
        answer = await http.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allow)
        if method != "HEAD":
            assert answer.json()["code"] == "GENERAL::METHOD_NOT_ALLOWED"
        assert (await http.options(path)).headers["allow"] == allow


async def test_head_is_get_without_the_body(http: httpx.AsyncClient):
    made = await create(http)
    for path in (f"/v1/sandboxes/{made['id']}", "/v1/sandboxes", f"/v1/sandboxes/{uuid4()}"):
        head, got = await http.head(path), await http.get(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-length"] == got.headers["content-length"]


async def test_other_origins(app: Litestar, make_context: MakeContext):
    asked = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST"}
    async with client(app) as http:
        preflight = await http.options("/v1/sandboxes", headers=asked)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, "*")
        refused = await http.get("/v1/sandboxes", headers={"Origin": "https://ui.example"})
        assert refused.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in refused.headers
        exposed = set(refused.headers["access-control-expose-headers"].lower().split(", "))
        assert exposed >= await _documented_headers(http), "a page may read what the document promises"
        assert "access-control-allow-origin" not in (await http.get("/health")).headers
    async with client(create_app(make_context(api_key=None)), base_url="http://localhost") as http:
        for answer in (await http.options("/v1/sandboxes", headers=asked), await http.get("/health", headers=asked)):
            assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_fault_of_ours_says_nothing_and_is_logged(
    http: httpx.AsyncClient, dsn: str, caplog: pytest.LogCaptureFixture
):
    await create(http)
    async with connected(dsn, owner=True) as owner:
        await owner.execute("ALTER TABLE sandboxes RENAME COLUMN spec TO elsewhere")
    with caplog.at_level(logging.ERROR):
        answer = await http.get("/v1/sandboxes", headers={"X-Request-ID": "broken-1"})
    assert answer.status_code == 500
    assert answer.json() == {
        "code": "GENERAL::INTERNAL_ERROR",
        "message": "Something went wrong here; the log has it under request broken-1.",
    }
    assert answer.headers["x-request-id"] == "broken-1"
    assert "broken-1" in caplog.text
    async with connected(dsn, owner=True) as owner:
        await owner.execute("ALTER TABLE sandboxes RENAME COLUMN elsewhere TO spec")


async def test_without_a_database(make_context: MakeContext):
    away = Database("postgresql://nobody@127.0.0.1:1/none", connect_timeout=1, pool_timeout=1)
    service = Service(away, Signal(away))
    parts: dict[str, Any] = {"service": service, "listing": Listing(away), "refusals": Refusals(away), "database": away}
    async with client(create_app(make_context(**parts)), **{"open-sandbox-api-key": KEY}) as http:
        for method, path in (("GET", ""), ("POST", ""), ("GET", f"/{uuid4()}"), ("DELETE", f"/{uuid4()}")):
            answer = await http.request(method, f"/v1/sandboxes{path}", json=body() if method == "POST" else None)
            assert (answer.status_code, answer.json()["code"]) == (503, "GENERAL::STORE_UNAVAILABLE")
            assert answer.headers["retry-after"].isdecimal()
        # A refusal needs no database, and comes although it cannot be recorded.
        assert (await http.post("/v1/sandboxes", json={})).status_code == 422
        assert (await http.get("/health")).status_code == 200
        ready = await http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "unready")
        assert "not reachable" in ready.json()["checks"]["database"]
    await away.close()


# The server's own paths


async def test_readiness(make_context: MakeContext):
    engine = FakeEngine()
    alive = True
    context = make_context(driver=FakeDriver(engine, INSTALLATION), worker_alive=lambda: alive, ready_cache_seconds=0)
    async with client(create_app(context), **{"open-sandbox-api-key": KEY}) as http:
        ready = await http.get("/ready")
        checks = {"database": "ok", "migrations": "ok", "engine": "ok", "worker": "ok"}
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "checks": checks})
        engine.down, alive = True, False
        unready = (await http.get("/ready")).json()["checks"]
        assert unready["database"] == "ok"
        assert "down" in unready["engine"]
        assert "worker" in unready["worker"]


async def test_an_api_without_worker_needs_no_engine(make_context: MakeContext):
    engine = FakeEngine()
    engine.down = True
    async with client(create_app(make_context(driver=FakeDriver(engine, INSTALLATION)))) as http:
        assert (await http.get("/ready")).json() == {
            "status": "ready",
            "checks": {"database": "ok", "migrations": "ok"},
        }


async def test_the_page_works_without_internet(app: Litestar, http: httpx.AsyncClient):
    """It loads its own server's files and nothing else, and a policy keeps it to that. No key is needed for any."""
    page = await http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    policy = dict(rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert not re.search("https?:", page.headers["content-security-policy"])
    markup = re.sub(r'<script type="application/json".*?</script>', "", page.text, flags=re.DOTALL)
    loaded = re.findall(r'(?:src|href)="([^"]*)"', markup)
    assert loaded == ["/docs/swagger-ui.css", "/docs/swagger-ui-bundle.js", "/docs/start.js"]
    assert not re.search(r"<script>|@import|url\(", markup)
    async with client(app) as stranger:
        for path in loaded:
            file = await stranger.get(path)
            assert file.status_code == 200
            assert file.headers["content-type"].startswith("text/")
            assert b"SwaggerUIBundle" in file.content or path.endswith(".css")
    for operation in ("renew-expiration", "Idempotency-Key", "CreateSandbox"):
        assert operation in page.text


async def test_the_contracts_other_routes(http: httpx.AsyncClient):
    for method, path, code in (
        ("GET", "/pools/x", "KUBERNETES::POOL_NOT_SUPPORTED"),
        ("POST", "/templates", "FSB::API_NOT_SUPPORTED"),
    ):
        for mount in ("", "/v1"):
            answer = await http.request(method, f"{mount}{path}")
            assert (answer.status_code, answer.json()["code"]) == (501, code)


async def test_metrics(http: httpx.AsyncClient):
    event = {"eventType": "sandbox.create", "createDurationMs": 12, "success": True, "sandboxId": "x", "image": None}
    assert (await http.post("/v1/metrics/events", json=event)).status_code == 204
    assert (await http.post("/metrics/events", json=event)).status_code == 404
    for change in ({"eventType": "canary"}, {"createDurationMs": -1}, {"success": "yes"}):
        answer = await http.post("/v1/metrics/events", json=event | change)
        assert answer.status_code == 422
        assert "canary" not in answer.text


async def test_a_busy_server_is_not_called_a_database_that_is_away(make_context: MakeContext, dsn: str):
    busy = Database(dsn, max_size=1, pool_timeout=0.05)
    parts: dict[str, Any] = {"service": Service(busy, Signal(busy)), "listing": Listing(busy), "database": busy}
    async with client(create_app(make_context(**parts)), **{"open-sandbox-api-key": KEY}) as http, busy.connection():
        answer = await http.get("/v1/sandboxes")
    await busy.close()
    assert (answer.status_code, answer.json()["code"]) == (503, "GENERAL::STORE_UNAVAILABLE")
    assert "busy" in answer.json()["message"]


async def _documented_headers(http: httpx.AsyncClient) -> set[str]:
    paths = (await http.get("/openapi.json")).json()["paths"]
    answers = [
        answer for methods in paths.values() for each in methods.values() for answer in each["responses"].values()
    ]
    return {name.lower() for answer in answers for name in answer.get("headers", {})}
