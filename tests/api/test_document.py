"""The served OpenAPI document, and a fuzzer that holds the server to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from app.api.app import BOTH_MOUNTS, ROOT_ONLY, V1_ONLY
from tests.api.conftest import KEY, body
from tests.api.live import Live, serving

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    checks.allow_header_conformance,
]
EXAMPLES = 30


@pytest.fixture
def live(dsn: str) -> Iterator[Live]:
    with serving(dsn, api_key=KEY, power_wait_seconds=0.1, wait_seconds_max=0) as server:
        yield server


BOTH = [
    ("/sandboxes", "POST"),
    ("/sandboxes", "GET"),
    ("/sandboxes/{sandboxId}", "GET"),
    ("/sandboxes/{sandboxId}", "DELETE"),
    ("/sandboxes/{sandboxId}/metadata", "PATCH"),
    ("/sandboxes/{sandboxId}/pause", "POST"),
    ("/sandboxes/{sandboxId}/resume", "POST"),
    ("/sandboxes/{sandboxId}/renew-expiration", "POST"),
    ("/sandboxes/{sandboxId}/endpoints/{port}", "GET"),
    ("/sandboxes/{sandboxId}/endpoints/{port}/links", "POST"),
    ("/sandboxes/{sandboxId}/links", "DELETE"),
    ("/sandboxes/{sandboxId}/diagnostics/logs", "GET"),
    ("/sandboxes/{sandboxId}/diagnostics/events", "GET"),
    ("/sandboxes/{sandboxId}/diagnostics/inspect", "GET"),
    ("/sandboxes/{sandboxId}/diagnostics/summary", "GET"),
    ("/sandboxes/{sandboxId}/networkpolicy", "GET"),
    ("/sandboxes/{sandboxId}/networkpolicy", "PUT"),
    ("/sandboxes/{sandboxId}/networkpolicy", "PATCH"),
    ("/sandboxes/{sandboxId}/networkpolicy", "DELETE"),
    ("/sandboxes/{sandboxId}/events", "GET"),
    ("/sandboxes/{sandboxId}/snapshots", "POST"),
    ("/snapshots", "GET"),
    ("/snapshots/{snapshotId}", "GET"),
    ("/snapshots/{snapshotId}", "DELETE"),
]
V1 = [("/metrics/events", "POST")]
ROOT = [("/health", "GET"), ("/ready", "GET"), ("/version", "GET")]


def operations() -> list[str]:
    """Every handler that is documented."""
    handlers = [each for kind in (*BOTH_MOUNTS, *V1_ONLY, *ROOT_ONLY) for each in vars(kind).values()]
    return [each.operation_id for each in handlers if isinstance(each, HTTPRouteHandler) and each.operation_id]


@pytest.mark.parametrize("name", operations())
def test_the_server_keeps_its_word(live: Live, name: str):
    """No input leads to a fault, and every answer is as documented. Same inputs in every run."""
    headers = {"OPEN-SANDBOX-API-KEY": KEY}
    with httpx.Client(base_url=live.base, headers=headers) as http:
        known = [http.post("/v1/sandboxes", json=body()).json()["id"] for _ in range(3)]
    schema = schemathesis.openapi.from_url(f"{live.base}/openapi.json")
    operation = schema.find_operation_by_id(name)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: Any) -> None:
        mode = data.draw(st.sampled_from(list(GenerationMode)))
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if "sandboxId" in (case.path_parameters or {}) and data.draw(st.booleans()):
            case.path_parameters["sandboxId"] = data.draw(st.sampled_from(known))
        response = case.call(headers=headers)
        assume(response.content != b"Invalid HTTP request received.")  # uvicorn's parser; it never came to us
        assert response.status_code < 500 or response.status_code == 501, (response.status_code, response.text)
        case.validate_response(response, checks=CHECKS)

    fuzz()


async def test_every_documented_path_is_served_and_the_other_way_round(http: httpx.AsyncClient, app: Litestar):
    document = (await http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    assert described == {(f"/v1{path}", method) for path, method in BOTH + V1} | set(ROOT)
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert sorted(ids) == sorted(operations())
    served = {
        (route.path.replace(":str}", "}"), method) for route in app.routes for method in getattr(route, "methods", ())
    }
    assert described <= served
    assert set(BOTH) <= served


async def test_shapes_say_what_is_checked(http: httpx.AsyncClient):
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]
    assert set(schemas["SandboxBody"]["required"]) == {"id", "status", "entrypoint", "createdAt"}
    assert "null" not in str(schemas["SandboxBody"])
    assert schemas["ErrorBody"]["required"] == ["code", "message"]
    assert schemas["CreateSandbox"]["properties"]["timeout"]["minimum"] == 60


async def test_the_examples_are_true(http: httpx.AsyncClient):
    document = (await http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    made = await http.post("/v1/sandboxes", json=schemas["CreateSandbox"]["examples"][0])
    assert made.status_code == 202, made.text
    renewal = schemas["RenewExpiration"]["examples"][0]
    path = f"/v1/sandboxes/{made.json()['id']}"
    assert (await http.post(f"{path}/renew-expiration", json=renewal)).json() == renewal
    assert (await http.post("/v1/metrics/events", json=schemas["MetricsEvent"]["examples"][0])).status_code == 204
    read = (await http.get(path)).json()
    assert read.keys() == schemas["SandboxBody"]["examples"][0].keys()
    assert (await http.get(f"{path}/events")).json()["items"][1].keys() == schemas["EventBody"]["examples"][0].keys()
    assert all(schema["description"] for schema in schemas.values())


async def test_every_operation_names_its_codes_and_says_what_it_does(http: httpx.AsyncClient):
    document = (await http.get("/openapi.json")).json()
    for methods in document["paths"].values():
        for operation in methods.values():
            assert operation["summary"]
            assert operation["description"]
            for status, response in operation["responses"].items():
                content = response.get("content", {}).get("application/json", {})
                if int(status) >= 400 and content["schema"] == {"$ref": "#/components/schemas/ErrorBody"}:
                    codes = [example["value"]["code"] for example in content["examples"].values()]
                    assert codes == list(content["examples"])
                    assert codes
    pause = document["paths"]["/v1/sandboxes/{sandboxId}/pause"]["post"]["responses"]
    assert "DOCKER::SANDBOX_NOT_RUNNING" in pause["409"]["content"]["application/json"]["examples"]
    assert "content" not in pause["202"]
    assert document["paths"]["/health"]["get"]["security"] == []
    read = document["paths"]["/v1/sandboxes/{sandboxId}"]["get"]
    assert read["responses"]["200"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/SandboxBody"
    }
    assert {each["name"]: each["in"] for each in read["parameters"]} == {
        "sandboxId": "path", "includeTerminal": "query", "asOf": "query", "If-None-Match": "header",
        "X-Request-ID": "header",
    }  # fmt: skip
    assert "null" not in str(read["parameters"])
