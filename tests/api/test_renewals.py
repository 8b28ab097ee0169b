"""Many clients renew one sandbox over sockets. Nobody is refused only because others are many (review F1)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from uuid import UUID

import httpx
import pytest

from app.domain.sandbox import events as ev
from tests.api.conftest import KEY, create
from tests.api.live import Live, serving

CLIENTS = 16
EACH = 12


@pytest.fixture
def live(dsn: str) -> Iterator[Live]:
    with serving(dsn, api_key=KEY) as server:
        yield server


@pytest.fixture
async def clients(live: Live) -> AsyncIterator[list[httpx.AsyncClient]]:
    async with AsyncExitStack() as stack:
        headers = {"OPEN-SANDBOX-API-KEY": KEY}
        yield [
            await stack.enter_async_context(httpx.AsyncClient(base_url=live.base, headers=headers, timeout=60))
            for _ in range(CLIENTS)
        ]


async def test_sixteen_clients_renew_one_sandbox(live: Live, clients: list[httpx.AsyncClient]):
    path = f"/v1/sandboxes/{(await create(clients[0]))['id']}"
    tag = (await clients[0].get(path)).headers["etag"]
    asked = {(n, turn): datetime(2040, 1, 1, n, turn, tzinfo=UTC) for n in range(CLIENTS) for turn in range(EACH)}

    async def renew(n: int, turn: int, **headers: str) -> httpx.Response:
        wanted = "2039-01-01T00:00:00Z" if headers else asked[n, turn].isoformat()
        return await clients[n].post(f"{path}/renew-expiration", json={"expiresAt": wanted}, headers=headers)

    strict = await asyncio.gather(*[renew(n, 0, **{"If-Match": tag}) for n in range(CLIENTS)])
    assert sorted(answer.status_code for answer in strict) == [200, *[412] * (CLIENTS - 1)], "they do meet each other"

    async def renew_all(n: int) -> list[httpx.Response]:
        return [await renew(n, turn) for turn in range(EACH)]

    answers = [one for part in await asyncio.gather(*[renew_all(n) for n in range(CLIENTS)]) for one in part]
    assert {answer.status_code for answer in answers} == {200}
    tags = [int(answer.headers["etag"].strip('"')) for answer in answers]
    assert sorted(tags) == list(range(4, 4 + CLIENTS * EACH)), "each renewal is an event of its own"
    sandbox_id = UUID(path.rpartition("/")[2])
    history = await asyncio.to_thread(live.run, live.context.service.history(sandbox_id, "default"))
    renewed = [one.event for one in history if isinstance(one.event, ev.Renewed)][1:]
    assert sorted(event.expires_at for event in renewed) == sorted(asked.values())
    last = (await clients[0].get(path)).json()["expiresAt"]
    assert datetime.fromisoformat(last) == renewed[-1].expires_at


async def test_renewals_among_other_changes(clients: list[httpx.AsyncClient]):
    """Metadata of the same sandbox changes meanwhile; neither is refused."""
    path = f"/v1/sandboxes/{(await create(clients[0]))['id']}"
    until = (datetime.now(UTC) + timedelta(hours=1)).isoformat()

    async def change(n: int) -> list[httpx.Response]:
        if n % 2:
            return [await clients[n].post(f"{path}/renew-expiration", json={"expiresAt": until}) for _ in range(EACH)]
        return [await clients[n].patch(f"{path}/metadata", json={f"k{n}": str(turn)}) for turn in range(EACH)]

    answers = [one for part in await asyncio.gather(*[change(n) for n in range(CLIENTS)]) for one in part]
    assert {answer.status_code for answer in answers} == {200}
    shown = (await clients[0].get(path)).json()["metadata"]
    assert shown == {f"k{n}": str(EACH - 1) for n in range(0, CLIENTS, 2)}
