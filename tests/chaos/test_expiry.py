"""Expiry in real time, over a kill and over downtime."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from tests.chaos.harness import Engine, ServerProcess, body, history, reaches, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]


def ahead(seconds: float) -> dict[str, str]:
    return {"expiresAt": (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()}


async def test_downtime_over_a_deadline_loses_nothing(
    serve: Serve, engine: Engine, image: str, installation: UUID
) -> None:
    server = await serve("all", "first")
    async with server.client() as client:
        answers = await asyncio.gather(
            *[client.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"}) for _ in range(3)]
        )
        ids = [answer.json()["id"] for answer in answers]
        for sandbox in ids[:2]:
            renewed = await client.post(f"/sandboxes/{sandbox}/renew-expiration", json=ahead(2))
            assert renewed.status_code == 200, renewed.text
    deadline = datetime.now(UTC) + timedelta(seconds=3)
    server.kill()

    async def passed() -> bool:
        return datetime.now(UTC) > deadline

    await until(passed, "the deadline passes while no server runs")
    assert len(await engine.containers(installation=installation)) == 3, "nobody was there to remove them"
    heir = await serve("all", "second")
    async with heir.client() as client:
        for sandbox in ids[:2]:
            await reaches(client, sandbox, "Terminated", 10)
            gone = await client.get(f"/sandboxes/{sandbox}")
            assert gone.status_code == 404
            assert "expired" in gone.json()["message"]
            assert (await history(client, sandbox)).count("sandbox.expired") == 1
        assert len(await engine.containers(installation=installation)) == 1
        assert (await client.get(f"/sandboxes/{ids[2]}")).status_code == 200
        late = await client.post(f"/sandboxes/{ids[0]}/renew-expiration", json=ahead(600))
        assert late.status_code in (404, 409), heir.log.read_text()[-3000:]


async def test_two_schedulers_and_renewals_racing_the_deadline(
    serve: Serve, engine: Engine, image: str, installation: UUID
) -> None:
    """A 200 with a later time is never followed by an expiry before it, and each expires once."""
    one, two = await serve("all", "one"), await serve("all", "two")
    async with one.client() as a, two.client() as b:
        answers = await asyncio.gather(
            *[a.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"}) for _ in range(8)]
        )
        ids = [answer.json()["id"] for answer in answers]

        async def race(number: int, sandbox: str) -> tuple[str, datetime]:
            promised = ahead(1.5)
            clients = (a, b)
            accepted = datetime.fromisoformat(promised["expiresAt"])
            assert (await a.post(f"/sandboxes/{sandbox}/renew-expiration", json=promised)).status_code == 200
            for round_ in range(30):
                wanted = ahead(0.15 + 0.02 * number)
                answer = await clients[round_ % 2].post(f"/sandboxes/{sandbox}/renew-expiration", json=wanted)
                if answer.status_code == 200:
                    accepted = datetime.fromisoformat(wanted["expiresAt"])
                    # Right up to the deadline, so that renewal and expiry meet.
                    await asyncio.sleep(max(0, (accepted - datetime.now(UTC)).total_seconds() - 0.01 * (round_ % 5)))
                else:
                    assert answer.status_code in (400, 404, 409), answer.text
                    break
            return sandbox, accepted

        for sandbox, accepted in await asyncio.gather(*[race(n, sandbox) for n, sandbox in enumerate(ids)]):
            await reaches(a, sandbox, "Terminated", 15)
            items = (await a.get(f"/sandboxes/{sandbox}/events", params={"limit": 1000})).json()["items"]
            expired = [item for item in items if item["type"] == "sandbox.expired"]
            assert len(expired) == 1
            ended = datetime.fromisoformat(expired[0]["recordedAt"])
            assert ended >= accepted, "a promise was broken"
            assert items[-1]["type"] == "sandbox.terminated"
    assert await engine.containers(installation=installation) == []
