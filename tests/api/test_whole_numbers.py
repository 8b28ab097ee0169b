"""A whole number in a query is digits, whichever parameter it is, and whether or not it may be left out."""

from __future__ import annotations

import httpx
import pytest

from tests.api.conftest import create

NONE = ["null", "None", "1.0", "1e0", "0x1", "1_0", "+1", " 1", "1 ", "", "true", "\u0661"]
HISTORY, LIST, SNAPSHOTS = "/v1/sandboxes/{id}/events", "/v1/sandboxes", "/v1/snapshots"
DIAGNOSTICS = "/v1/sandboxes/{id}/diagnostics"
PARAMETERS = [
    (HISTORY, "after"),
    (HISTORY, "limit"),
    (HISTORY, "epoch"),
    (LIST, "page"),
    (LIST, "pageSize"),
    (LIST, "limit"),
    (SNAPSHOTS, "page"),
    (SNAPSHOTS, "pageSize"),
    (f"{DIAGNOSTICS}/events", "limit"),
    (f"{DIAGNOSTICS}/logs", "tail"),
    (f"{DIAGNOSTICS}/summary", "tail"),
    (f"{DIAGNOSTICS}/summary", "event_limit"),
]


@pytest.mark.parametrize(("path", "name"), PARAMETERS)
async def test_what_is_no_digits_is_422(http: httpx.AsyncClient, path: str, name: str):
    asked = path.format(id=(await create(http))["id"])
    assert (await http.get(asked, params={name: "1"})).status_code == 200
    for text in NONE:
        answer = await http.get(asked, params={name: text})
        assert answer.status_code == 422, text
        assert answer.json()["detail"][0] == {
            "loc": ["query", name],
            "msg": "must be a whole number",
            "type": "value_error",
        }


async def test_no_parameter_is_forgotten_here(http: httpx.AsyncClient):
    document = (await http.get("/openapi.json")).json()
    assert {
        (path.replace("{sandboxId}", "{id}"), each["name"])
        for path, methods in document["paths"].items()
        for operation in methods.values()
        for each in operation["parameters"]
        if each["in"] == "query" and each["schema"].get("type") == "integer"
    } == set(PARAMETERS)
