"""Cursors and the epoch of the log: what was given out before a restore is refused, and a fresh read works."""

from __future__ import annotations

import httpx
import pytest

from app.service.sandboxes import Service
from tests.api.conftest import create, observe
from tests.support.sql import connected

EXPIRED = (410, "SANDLEDGER::CURSOR_EXPIRED")


async def raise_epoch(dsn: str) -> None:
    """As the end of a restore does it."""
    async with connected(dsn, owner=True) as owner:
        await owner.execute("UPDATE installation SET epoch = epoch + 1")


@pytest.mark.parametrize(
    "query", ["", "includeTerminal=true", "state=pending", "metadata=team%3Da", "state=unheard-of"]
)
async def test_a_cursor_of_another_epoch_is_410(http: httpx.AsyncClient, dsn: str, query: str):
    made = [(await create(http, metadata={"team": "a"}))["id"] for _ in range(3)]
    asked = f"/v1/sandboxes?limit=1&{query}"
    old = (await http.get("/v1/sandboxes?limit=1")).json()["nextCursor"]
    assert (await http.get(asked, params={"cursor": old})).status_code == 200, "it is good in its own epoch"
    await raise_epoch(dsn)

    answer = await http.get(asked, params={"cursor": old})
    assert (answer.status_code, answer.json()["code"]) == EXPIRED
    assert answer.json().keys() == {"code", "message"}
    assert "first page" in answer.json()["message"], "it says what to do"

    fresh = (await http.get("/v1/sandboxes?limit=1")).json()
    rest = (await http.get("/v1/sandboxes?limit=2", params={"cursor": fresh["nextCursor"]})).json()
    assert [item["id"] for item in fresh["items"] + rest["items"]] == made[::-1]


async def test_a_page_of_history_carries_the_epoch(http: httpx.AsyncClient, service: Service, dsn: str):
    path = f"/v1/sandboxes/{(made := await create(http))['id']}/events"
    await observe(service, made["id"])
    first = await http.get(f"{path}?limit=2")
    page = first.json()
    assert (page["epoch"], first.headers["sandledger-epoch"]) == (1, "1")
    following = {"after": page["next"], "epoch": page["epoch"]}
    assert [item["version"] for item in (await http.get(path, params=following)).json()["items"]] == [3, 4, 5]
    await raise_epoch(dsn)

    answer = await http.get(path, params=following)
    assert (answer.status_code, answer.json()["code"]) == EXPIRED
    fresh = (await http.get(path, params={"epoch": 2})).json()
    assert (fresh["epoch"], len(fresh["items"])) == (2, 5)
    assert len((await http.get(path, params={"after": 2})).json()["items"]) == 3, (
        "a version of the client's own has none"
    )


@pytest.mark.parametrize("epoch", ["0", "-1", "x", str(2**31), "null", "1.0", "1e0", "", " 1", "+1"])
async def test_an_epoch_that_is_none(http: httpx.AsyncClient, epoch: str):
    made = await create(http)
    answer = await http.get(f"/v1/sandboxes/{made['id']}/events", params={"epoch": epoch})
    assert (answer.status_code, answer.json()["detail"][0]["loc"]) == (422, ["query", "epoch"])
