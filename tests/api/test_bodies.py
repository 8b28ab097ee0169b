"""Bodies that no honest client sends: always a clear 4xx, nothing half-written, no input repeated."""

from __future__ import annotations

import gzip
import json
from typing import Any
from uuid import uuid4

import httpx
import pytest
from litestar import Litestar

from app.store.database.pool import Database
from tests.api.conftest import KEY, body
from tests.api.test_create import written

JSON = {"Content-Type": "application/json"}
DEEP = b"[" * 200_000

MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "no json": b"hello canary",
    "cut off": b'{"image": {"uri": "canary',
    "trailing": b"{} canary",
    "byte order mark": b"\xef\xbb\xbf{}",
    "not an object": b"[]",
    "null": b"null",
    "deep": DEEP,
    "deep in a field": b'{"image":' + DEEP,
    "deep in an unknown field": b'{"x":' + DEEP,
    "deep objects": b'{"a":' * 100_000,
    "nul escape": json.dumps(body(env={"A": "canary\0"})).encode(),
    "nul in a key": json.dumps(body(env={"canary\0": "1"})).encode(),
    "nul in an unknown field": json.dumps(body(x=["\0"])).encode(),
    "raw nul": json.dumps(body(env={"A": "X"})).encode().replace(b"X", b"\x00"),
    "lone surrogate": json.dumps(body(env={"A": "\ud800"})).encode(),
    "lone surrogate in a key": json.dumps(body(metadata={"\udfff": "x"})).encode(),
    "encoded surrogate": json.dumps(body(env={"A": "X"})).encode().replace(b"X", b"\xed\xa0\x80"),
    "no utf-8": json.dumps(body(env={"A": "X"})).encode().replace(b"X", b"\xff"),
    "no utf-8 in an unknown field": json.dumps(body(x="X")).encode().replace(b'"X"', b'"\xff"'),
    "not a number": b'{"timeout": NaN}',
    "infinite": b'{"timeout": 1e400}',
    "million digits": b'{"timeout": ' + b"9" * 1_000_000 + b"}",
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_bodies(http: httpx.AsyncClient, database: Database, raw: bytes):
    sandbox = f"/v1/sandboxes/{uuid4()}"
    for method, path in (
        ("POST", "/v1/sandboxes"),
        ("PATCH", f"{sandbox}/metadata"),
        ("POST", f"{sandbox}/renew-expiration"),
        ("POST", "/v1/metrics/events"),
    ):
        answer = await http.request(method, path, content=raw, headers=JSON)
        assert answer.status_code == 422, (path, answer.text)
        assert answer.json()["code"] == "GENERAL::VALIDATION_ERROR"
        assert answer.json()["detail"][0]["loc"][0] == "body"
        assert "canary" not in answer.text
    assert await written(database) == 0


async def test_an_escaped_backslash_is_no_nul(http: httpx.AsyncClient):
    assert (await http.post("/v1/sandboxes", json=body(entrypoint=["echo", r"\u0000"]))).status_code == 202


async def test_any_other_text_is_kept(http: httpx.AsyncClient):
    words = ["echo", "\U0001f600 \x7f \x01 \ufffe", "é" * 1000]
    made = (await http.post("/v1/sandboxes", json=body(entrypoint=words))).json()
    assert made["entrypoint"] == words
    assert (await http.get(f"/v1/sandboxes/{made['id']}")).json()["entrypoint"] == words


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "json", "multipart/form-data"]
)
async def test_the_content_type_is_json(http: httpx.AsyncClient, kind: str | None):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = await http.post("/v1/sandboxes", content=json.dumps(body()).encode(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "GENERAL::UNSUPPORTED_MEDIA_TYPE")


async def test_json_by_other_names(http: httpx.AsyncClient):
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"):
        answer = await http.post("/v1/sandboxes", content=json.dumps(body()).encode(), headers={"Content-Type": kind})
        assert answer.status_code == 202


# Size


def padded(size: int) -> bytes:
    bare = json.dumps(body()).encode()
    return bare[:-1] + b', "x": "' + b"y" * (size - len(bare) - 9) + b'"}'


async def test_the_largest_body(http: httpx.AsyncClient, database: Database):
    limit = 1024 * 1024
    assert (await http.post("/v1/sandboxes", content=padded(limit), headers=JSON)).status_code == 202
    before = await written(database)

    async def chunks(size: int):
        raw = padded(size)
        for at in range(0, size, 50_000):
            yield raw[at : at + 50_000]

    assert (await http.post("/v1/sandboxes", content=chunks(limit), headers=JSON)).status_code == 202
    for content in (padded(limit + 1), chunks(limit + 1)):
        answer = await http.post("/v1/sandboxes", content=content, headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (413, "GENERAL::BODY_TOO_LARGE")
        assert str(limit) in answer.json()["message"]
    for path in (f"/v1/sandboxes/{uuid4()}/pause", "/v1/pools"):
        assert (await http.post(path, content=padded(limit + 1))).status_code == 413
    assert await written(database) == before + 2


async def test_what_is_too_large_is_not_read_to_its_end(app: Litestar):
    """A body without end is thrown away for a while, so that the client can hear the answer; then it is cut off."""
    sent = 0
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal sent
        sent += 65536
        return {"type": "http.request", "body": b"x" * 65536, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    await call(app, receive, send)
    assert answers[0]["status"] == 413
    assert (b"connection", b"close") in answers[0]["headers"]
    assert sent <= 10 * 1024 * 1024


async def test_a_client_that_leaves_amid_its_body(app: Litestar, database: Database):
    messages = [{"type": "http.request", "body": b'{"image":', "more_body": True}, {"type": "http.disconnect"}]
    answers: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    await call(app, receive, send)
    assert answers[0]["status"] == 400
    assert await written(database) == 0


async def call(app: Any, receive: Any, send: Any, *more: tuple[bytes, bytes]) -> None:
    """POST /v1/sandboxes on bare ASGI."""
    headers = [(b"content-type", b"application/json"), (b"open-sandbox-api-key", KEY.encode()), *more]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/sandboxes",
        "raw_path": b"/v1/sandboxes",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": ("x", 80),
    }
    await app(scope, receive, send)


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ("gzip", "gzip"),
        ("BR", "br"),
        ("identity, zstd", "zstd"),
        ("gzip, deflate", "gzip, deflate"),
        ("canary", "unknown"),
    ],
)
async def test_a_compressed_body_is_refused_before_it_is_read(http: httpx.AsyncClient, encoding: str, named: str):
    sandbox = f"/v1/sandboxes/{uuid4()}"
    for method, path in (("POST", "/v1/sandboxes"), ("PATCH", f"{sandbox}/metadata"), ("POST", "/v1/metrics/events")):
        raw = gzip.compress(json.dumps(body()).encode())
        answer = await http.request(method, path, content=raw, headers=JSON | {"Content-Encoding": encoding})
        assert (answer.status_code, answer.json()["code"]) == (415, "GENERAL::UNSUPPORTED_CONTENT_ENCODING")
        assert answer.headers["accept-encoding"] == "identity"
        assert named in answer.json()["message"]
        assert "uncompressed" in answer.json()["message"]
        assert "canary" not in answer.text


@pytest.mark.parametrize("encoding", ["identity", "Identity", "", " , "])
async def test_a_body_that_says_that_it_is_not_compressed_is_taken(http: httpx.AsyncClient, encoding: str):
    answer = await http.post("/v1/sandboxes", json=body(), headers={"Content-Encoding": encoding})
    assert answer.status_code == 202, answer.text
