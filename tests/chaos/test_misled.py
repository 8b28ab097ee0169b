"""A real server whose engine's address leads to another engine for a while."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from uuid import UUID

import pytest

from tests.chaos.harness import Engine, ServerProcess, history, reaches, until
from tests.chaos.test_engine_faults import QUICK, LyingProxy, proxy, several, some

__all__ = ["proxy"]
pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]


async def test_another_engine_at_the_address_loses_and_removes_nothing(
    serve: Serve,
    proxy: LyingProxy,
    engine: Engine,
    image: str,
    installation: UUID,
) -> None:
    server = await serve("all", "misled", host=proxy.address, worker=QUICK)
    async with server.client() as client:
        kept, doomed = await some(client, image, 2)
        # An empty engine: it answers, and has neither our mark nor any object of ours.
        proxy.empty = True
        proxy.refusals = {"mark": 404, "inspect": 404}
        assert (await client.delete(f"/sandboxes/{doomed}")).status_code == 204

        async def noticed() -> bool:
            return "MARK_ABSENT" in server.log.read_text()

        await until(noticed, "the server says that it is another engine")
        await several(proxy, "mark", 5)
        assert (await client.get(f"/sandboxes/{kept}")).json()["status"]["state"] == "Running"
        assert {"sandbox.runtime_lost", "sandbox.failed"}.isdisjoint(await history(client, kept))
        assert "sandbox.terminated" not in await history(client, doomed)
        assert len(await engine.containers(installation=installation)) == 2
        proxy.empty, proxy.refusals = False, {}
        await reaches(client, doomed, "Terminated")
        assert (await client.get(f"/sandboxes/{kept}")).json()["status"]["state"] == "Running"
        assert len(await engine.containers(installation=installation)) == 1
