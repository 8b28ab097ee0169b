"""Sixteen clients write to one sandbox through two servers: nobody is refused, and every write is in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
import pytest

from tests.chaos.harness import Engine, ServerProcess, body, events

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]
WRITERS, TURNS = 16, 10


async def test_sixteen_writers_of_one_sandbox_are_all_served(
    serve: Serve, engine: Engine, image: str, installation: UUID
) -> None:
    servers = [await serve("all", "one"), await serve("api", "two")]
    async with servers[0].client() as one, servers[1].client() as two:
        answer = await one.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"})
        sandbox = answer.json()["id"]
        base = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)

        async def write(number: int, client: httpx.AsyncClient) -> None:
            for turn in range(TURNS):
                at = (base + timedelta(seconds=number * TURNS + turn)).isoformat()
                renewed = await client.post(f"/sandboxes/{sandbox}/renew-expiration", json={"expiresAt": at})
                assert renewed.status_code == 200, renewed.text
                patched = await client.patch(f"/sandboxes/{sandbox}/metadata", json={f"w{number}": str(turn)})
                assert patched.status_code == 200, patched.text

        await asyncio.gather(*[write(number, (one, two)[number % 2]) for number in range(WRITERS)])
        assert len(await events(one, sandbox, "sandbox.renewed")) == WRITERS * TURNS
        assert len(await events(one, sandbox, "sandbox.metadata_patched")) == WRITERS * TURNS
        shown = (await two.get(f"/sandboxes/{sandbox}")).json()
        assert shown["metadata"] == {f"w{number}": str(TURNS - 1) for number in range(WRITERS)}
        # With If-Match a client asks to be refused, so the others are refused when one is served.
        tag = (await one.get(f"/sandboxes/{sandbox}")).headers["etag"]
        answers = await asyncio.gather(
            *[
                one.patch(f"/sandboxes/{sandbox}/metadata", json={"x": str(n)}, headers={"If-Match": tag})
                for n in range(WRITERS)
            ]
        )
        assert sorted(answer.status_code for answer in answers) == [200] + [412] * (WRITERS - 1)
