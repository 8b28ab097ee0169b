"""The routes of network policies, as the public server answers them for a sandbox without a sidecar."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.domain.sandbox.observed import Exit, Power
from app.service.sandboxes import Service
from tests.api.conftest import create, observe

CALLS = {
    "GET": None,
    "PUT": {"defaultAction": "deny", "egress": [{"action": "allow", "target": "pypi.org"}]},
    "PATCH": [{"action": "allow", "target": "pypi.org"}],
    "DELETE": ["pypi.org"],
}


async def call(http: httpx.AsyncClient, sandbox_id: object, method: str, sent: Any, mount: str = "/v1"):
    path = f"{mount}/sandboxes/{sandbox_id}/networkpolicy"
    return await http.request(method, path, **({} if sent is None else {"json": sent}))


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("mount", ["", "/v1"])
async def test_without_a_sidecar(http: httpx.AsyncClient, service: Service, method: str, mount: str):
    made = await create(http)
    early = await call(http, made["id"], method, CALLS[method], mount)
    assert (early.status_code, early.json()["code"]) == (404, "KUBERNETES::POD_IP_NOT_AVAILABLE")
    await observe(service, made["id"])
    answer = await call(http, made["id"], method, CALLS[method], mount)
    assert (answer.status_code, answer.json()["code"]) == (502, "BACKEND_CONNECTION_FAILED")
    await observe(service, made["id"], Power.EXITED, Exit(0))
    late = await call(http, made["id"], method, CALLS[method], mount)
    assert (late.status_code, late.json()["code"]) == (409, "DOCKER::SANDBOX_NOT_RUNNING")
    await http.delete(f"/v1/sandboxes/{made['id']}")
    gone = await call(http, made["id"], method, CALLS[method], mount)
    assert (gone.status_code, gone.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")


@pytest.mark.parametrize("method", CALLS)
async def test_what_is_not_there(http: httpx.AsyncClient, method: str):
    for sandbox_id in (uuid4(), "fsb-0197a1b2", "x"):
        answer = await call(http, sandbox_id, method, CALLS[method])
        assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "sent"),
    [
        ("PUT", []),
        ("PUT", {"egress": [{"action": "allow"}]}),
        ("PUT", {"egress": [{"action": "allow", "target": ""}]}),
        ("PUT", {"defaultAction": 1}),
        ("PATCH", {"action": "allow", "target": "a"}),
        ("PATCH", [{"target": "a"}]),
        ("PATCH", ["a"]),
        ("DELETE", "a"),
        ("DELETE", [1]),
        ("DELETE", None),
    ],
)
async def test_the_shape_is_checked_first(http: httpx.AsyncClient, service: Service, method: str, sent: Any):
    made = await create(http)
    await observe(service, made["id"])
    answer = await call(http, made["id"], method, sent)
    assert answer.status_code == (415 if sent is None else 422), answer.text


async def test_snake_case_and_nothing_to_add(http: httpx.AsyncClient, service: Service):
    made = await create(http)
    await observe(service, made["id"])
    for sent in ({}, {"default_action": "deny", "unknown": 1}, {"defaultAction": None}):
        assert (await call(http, made["id"], "PUT", sent)).status_code == 502
