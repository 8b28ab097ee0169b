"""What a hostile or careless client sent, and what it must not do."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy import func, select

from app.api.app import create_app
from app.api.context import ApiContext
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import sandboxes
from app.store.vault.seal import Sealer
from tests.api.conftest import KEY, MakeContext, body, create
from tests.support.sql import connected

_COUNT = Statement(select(func.count()).select_from(sandboxes))
_FINGERPRINTS = Statement(select(sandboxes.c.fingerprint))
_SECRET = "pass-4711-canary"


async def _rows(database: Database) -> int:
    return (await database.fetch(_COUNT))[0][0]


# Prefer

_PATIENCE_S = 20
"""Not a measurement: with backtracking the first of these takes longer than the universe has."""
_PREFER = """
import sys
from app.api.conditions import preferences
for line in sys.stdin.read().split("\\n"):
    print(preferences(line, 300).wait)
"""
_COSTLY = ["x" + ";a=  " * 60 + "@", "x=" + " " * 60_000 + "@", " " * 60_000 + "@", 'a="' * 20_000, "@," * 30_000]


def test_no_prefer_header_stops_the_server():
    """In a process of its own: a regular expression that runs away cannot be interrupted from within."""
    done = subprocess.run(
        [sys.executable, "-c", _PREFER],
        input="\n".join([*_COSTLY, "x;a=  ;b= , wait=7"]),
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=True,
    )
    assert done.stdout.split() == [*["None"] * len(_COSTLY), "7"]


@pytest.mark.parametrize(
    ("header", "applied"),
    [
        ("wait=0", "wait=0"),
        ('wait="0"', "wait=0"),
        ("wait=0;", "wait=0"),
        ('wait=0; strict ; level="a,b"', "wait=0"),
        ("foo;;bar= ;c =d , wait = 0", "wait=0"),
        ('x="a\\"b, wait=5", wait=0, wait=9', "wait=0"),
        ("bad@, WAIT=0", "wait=0"),
        ("respond-async, wait=0", "respond-async, wait=0"),
        ("wait=-1", None),
        ("wait=1.5", None),
        ('wait="0', None),
        ("wait", None),
        (";;;", None),
        ('=,",', None),
    ],
)
async def test_prefer_is_read_as_its_grammar_says(http: httpx.AsyncClient, header: str, applied: str | None):
    answer = await http.post("/v1/sandboxes", json=body(), headers={"Prefer": header})
    assert (answer.status_code, answer.headers.get("preference-applied")) == (202, applied)


# Images


@pytest.mark.parametrize(
    "uri",
    [
        f"https://user:{_SECRET}@registry.invalid/x",
        f"user:{_SECRET}@registry.invalid/x:1",
        "../../etc/passwd",
        "a/../b",
        "a//b",
        "UPPER",
        "a" * 256,
        "a" * 100_000,
        "x:" + "t" * 129,
        "x@sha256:abc",
        "sha256:" + "a" * 64,
        "0" * 64,
        " busybox:1",
        "busybox:1\n",
        "-x",
        "a?fromSrc=b",
        "é",
        "x:l:l",
        "h-.example/x",
        "@",
        "a-" * 400 + "!",
    ],
)
async def test_what_is_no_image_reference_is_refused_unread(http: httpx.AsyncClient, database: Database, uri: str):
    answer = await http.post("/v1/sandboxes", json=body(image={"uri": uri}))
    assert (answer.status_code, answer.json()["code"]) == (400, "SANDBOX::INVALID_PARAMETER")
    assert "image.uri" in answer.json()["message"]
    assert _SECRET not in answer.text
    assert await _rows(database) == 0


@pytest.mark.parametrize(
    "uri",
    [
        "busybox",
        "busybox:1",
        "localhost:5000/x",
        "127.0.0.1:1/no/such:image",
        "[::1]:5000/x",
        "Registry.example/team/na_me--x.y:1.2-3_X@sha256:" + "0" * 64,
        "registry.example/" + "a" * 255,
    ],
)
async def test_image_references_of_any_shape(http: httpx.AsyncClient, uri: str):
    made = await create(http, image={"uri": uri})
    assert (await http.get(f"/v1/sandboxes/{made['id']}")).json()["image"] == {"uri": uri}


# What Linux cannot execute


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"entrypoint": ["echo", "x" * 131_072]}, "entrypoint"),
        ({"entrypoint": ["é" * 65_536]}, "entrypoint"),
        ({"env": {"A": "x" * 131_070}}, "env"),
        ({"env": {"A" * 131_071: ""}}, "env"),
    ],
)
async def test_strings_that_no_program_can_be_given(
    http: httpx.AsyncClient, database: Database, changes: dict[str, Any], place: str
):
    answer = await http.post("/v1/sandboxes", json=body(**changes))
    assert (answer.status_code, answer.json()["code"]) == (400, "SANDBOX::INVALID_PARAMETER")
    assert place in answer.json()["message"]
    assert len(answer.text) < 300
    assert await _rows(database) == 0


async def test_the_longest_strings(http: httpx.AsyncClient):
    await create(http, entrypoint=["echo", "x" * 131_071], env={"A": "x" * 131_069, "B": None})


# Lists


async def test_a_list_does_not_pretend_to_be_of_the_past(http: httpx.AsyncClient):
    answer = await http.get("/v1/sandboxes?asOf=2026-01-01T00:00:00Z")
    assert (answer.status_code, answer.json()["code"]) == (501, "SANDBOX::API_NOT_SUPPORTED")
    assert "asOf" in answer.json()["message"]


# Idempotency


async def test_the_same_request_in_other_words(http: httpx.AsyncClient):
    key = {"Idempotency-Key": "one"}
    sent = body(env={"A": "1", "B": "2"}, metadata={"x": "1", "y": "2"})
    first = await http.post("/v1/sandboxes", json=sent, headers=key)
    limits = sent.pop("resourceLimits")
    for words in (
        msgspec.json.format(msgspec.json.encode(sent | {"resourceLimits": limits}), indent=4),
        msgspec.json.encode(dict(reversed((sent | {"resource_limits": limits}).items()))),
        msgspec.json.encode(sent | {"resourceLimits": limits, "snapshotId": None, "unknown": 1}),
        msgspec.json.encode(sent | {"resourceLimits": limits, "env": {"B": "2", "A": "1"}}),
    ):
        again = await http.post("/v1/sandboxes", content=words, headers=key | {"Content-Type": "application/json"})
        assert (again.status_code, again.content) == (202, first.content)
        assert again.headers["idempotency-replayed"] == "true"


async def test_a_fingerprint_knows_only_what_was_sent(http: httpx.AsyncClient, database: Database, sealer: Sealer):
    """So that a version which knows more fields still recognises a request that this one took."""
    sent = body()
    await create(http)
    (row,) = await database.fetch(_FINGERPRINTS)
    assert row["fingerprint"] == sealer.digest(msgspec.json.encode(sent, order="sorted"), "request")


# Waiting


async def test_waiters_hold_no_connection(http: httpx.AsyncClient):
    """Many more than the pool has."""
    waiting = [
        asyncio.create_task(http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=60"})) for _ in range(60)
    ]
    try:
        async with asyncio.timeout(30):
            while (await http.get("/v1/sandboxes")).json()["pagination"]["totalItems"] < len(waiting):
                pass
            made = [each["id"] for each in (await http.get("/v1/sandboxes?pageSize=200")).json()["items"]]
            assert not any(task.done() for task in waiting)
            gone = await asyncio.gather(*[http.delete(f"/v1/sandboxes/{each}") for each in made])
            assert {answer.status_code for answer in gone} == {204}
            answers = await asyncio.gather(*waiting)  # each is told that there is nothing to wait for any more
    finally:
        for task in waiting:
            task.cancel()
    assert {answer.status_code for answer in answers} == {202}


async def test_a_database_that_hangs_does_not_prolong_a_wait(http: httpx.AsyncClient, database: Database, dsn: str):
    waiting = asyncio.create_task(http.post("/v1/sandboxes", json=body(), headers={"Prefer": "wait=3"}))
    try:
        async with asyncio.timeout(12):  # a statement by itself is given longer
            while not await _rows(database):
                pass
            async with connected(dsn, owner=True) as holder, holder.transaction():
                await holder.execute("LOCK TABLE sandboxes IN ACCESS EXCLUSIVE MODE")
                answer = await waiting
    finally:
        waiting.cancel()
    assert (answer.status_code, answer.json()["status"]["state"]) == (202, "Pending")


async def _times_out(context: ApiContext, receive: Callable[[], Awaitable[Any]]) -> None:
    """A create whose body comes from `receive` is answered 408, and its connection is closed."""
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"open-sandbox-api-key", KEY.encode()), (b"content-type", b"application/json")]
    scope: Any = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/v1/sandboxes", "raw_path": b"/v1/sandboxes", "query_string": b"", "root_path": "",
        "headers": headers, "client": ("192.0.2.7", 4711), "server": ("api.test", 80), "state": {},
    }  # fmt: skip
    # In-process transports collect a body before they send it, so the application is asked directly.
    async with asyncio.timeout(20):
        await create_app(context)(scope, receive, send)
    assert said[0]["status"] == 408
    assert (b"connection", b"close") in said[0]["headers"]
    assert msgspec.json.decode(said[1]["body"])["code"] == "GENERAL::REQUEST_TIMEOUT"


async def test_a_body_that_stops_coming(make_context: MakeContext, database: Database):
    async def stalling() -> AsyncIterator[bytes]:
        yield b'{"image":'
        await asyncio.Event().wait()

    pieces = stalling()

    async def receive() -> Any:
        return {"type": "http.request", "body": await anext(pieces), "more_body": True}

    await _times_out(make_context(body_idle_seconds=0.2), receive)
    assert await _rows(database) == 0


async def test_a_body_that_comes_drop_by_drop_has_an_end(make_context: MakeContext, database: Database):
    async def receive() -> Any:
        await asyncio.sleep(0.01)  # a slow client
        return {"type": "http.request", "body": b" ", "more_body": True}

    await _times_out(make_context(body_total_seconds=0.3), receive)
    assert await _rows(database) == 0
