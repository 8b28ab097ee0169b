"""One Idempotency-Key, two server processes, 200 requests at once, and a crash."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from tests.chaos.harness import Engine, ServerProcess, body, reaches

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]


async def test_200_creates_with_one_key_over_two_servers(
    serve: Serve, engine: Engine, image: str, installation: UUID, dsn: str
) -> None:
    servers = [await serve("all", "a"), await serve("all", "b")]
    async with servers[0].client() as one, servers[1].client() as two:
        clients: list[httpx.AsyncClient] = [one, two]

        async def create(number: int, key: str | None) -> httpx.Response:
            headers = {} if key is None else {"Idempotency-Key": key}
            return await clients[number % 2].post("/sandboxes", json=body(image), headers=headers)

        # The naive client, without a key, makes as many sandboxes as it sends requests: the test can tell.
        naive = await asyncio.gather(*[create(n, None) for n in range(4)])
        assert len({answer.json()["id"] for answer in naive}) == 4

        key = uuid4().hex
        answers = await asyncio.gather(*[create(n, key) for n in range(200)])
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.text for answer in answers}) == 1, "every answer is the same"
        sandbox = answers[0].json()["id"]
        await reaches(one, sandbox, "Running")
        assert len(await engine.containers(sandbox=sandbox)) == 1

        other = await two.post("/sandboxes", json=body(image, timeout=700), headers={"Idempotency-Key": key})
        assert other.status_code == 422
        assert other.json()["code"] == "SANDLEDGER::IDEMPOTENCY_KEY_REUSED"

        servers[0].kill()
        again = await two.post("/sandboxes", json=body(image), headers={"Idempotency-Key": key})
        assert again.text == answers[0].text, "the same answer, also after the crash of a replica"
        for item in {*[a.json()["id"] for a in naive], sandbox}:
            assert (await two.delete(f"/sandboxes/{item}")).status_code == 204
    connection = await asyncpg.connect(dsn)
    count = await connection.fetchval("SELECT count(*) FROM sandledger.events WHERE type = 'sandbox.requested'")
    await connection.close()
    assert count == 5
