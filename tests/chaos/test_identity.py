"""A server at another engine, and a server on a restored copy of the database: each harms nothing and says what is wrong."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID, uuid4

import aiodocker
import httpx
import pytest

from app.cli.local_image import ensure_busybox_image
from app.store.embedded.server import EmbeddedPostgres
from tests.chaos.conftest import IMAGE
from tests.chaos.harness import Engine, ServerProcess, body, command, history, reaches, running, until
from tests.conftest import cloned, on_database
from tests.drivers.proxy import EngineProxy
from tests.engine.own import OwnEngine
from tests.support.sql import connected

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
Serve = Callable[..., Awaitable[ServerProcess]]
QUICK = "lease_seconds = 2\nmissing_grace_seconds = 0.5\nsweep_seconds = 0.5\norphan_grace_seconds = 0"
HARM = {"sandbox.failed", "sandbox.runtime_lost", "sandbox.runtime_exited", "sandbox.runtime_removed"}


async def unharmed(client: httpx.AsyncClient, engine: Engine, *ids: str) -> None:
    for sandbox in ids:
        assert (await client.get(f"/sandboxes/{sandbox}")).json()["status"]["state"] == "Running"
        assert not HARM & set(await history(client, sandbox))
        (container,) = await engine.containers(sandbox=sandbox)
        assert container["State"] == "running"


async def says(server: ServerProcess, wanted: str) -> str:
    """Wait until the engine has this state in the log; its trouble."""

    async def there() -> dict[str, str] | None:
        _, (line,) = await command(server, "engines", "ls", "--json")
        return line if line["state"] == wanted else None

    return (await until(there, f"the engine is {wanted}", 90))["trouble"]


async def stop(server: ServerProcess) -> None:
    server.send(signal.SIGTERM)
    assert await asyncio.to_thread(server.wait) == 0


@pytest.mark.proof
async def test_a_server_at_another_engine_concludes_nothing(
    serve: Serve, own: OwnEngine, engine: Engine, image: str, installation: UUID
) -> None:
    right = await serve("all", "right", worker=QUICK)
    async with right.client() as client:
        one, two = [await running(client, image) for _ in range(2)]
    await stop(right)
    await asyncio.to_thread(own.start)
    async with aiodocker.Docker(url=own.address) as docker:
        await ensure_busybox_image(docker, IMAGE)
        wrong = await serve("all", "wrong", host=own.address, worker=QUICK)
        async with wrong.client() as client:
            late = (await client.post("/sandboxes", json=body(image))).json()["id"]
            assert (await client.delete(f"/sandboxes/{two}")).status_code == 204
            trouble = await says(wrong, "mismatch")
            assert "MARK_ABSENT" in trouble
            await unharmed(client, engine, one)
            assert (await client.get(f"/sandboxes/{late}")).json()["status"]["state"] == "Pending"
            kinds = await history(client, two)
            assert kinds[-1] == "sandbox.termination_requested", "a removal is not concluded from another engine"
            code, overview = await command(wrong, "status", "--json")
            assert code == 1
            assert any("default" in problem for problem in overview["problems"]), overview["problems"]
            ready = await client.get(f"{wrong.base}/ready")
            assert ready.status_code == 503, ready.text
        assert await docker.containers.list(all=True) == [], "nothing was made there"
        assert (await docker.volumes.list())["Volumes"] in (None, []), "nor marked"
    await stop(wrong)
    again = await serve("all", "again", worker=QUICK)
    async with again.client() as client:
        await reaches(client, late, "Running")
        await reaches(client, two, "Terminated")
        await unharmed(client, engine, one, late)
        assert await says(again, "up") == ""


@pytest.fixture
async def copies(postgres: EmbeddedPostgres) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Copies of databases that nobody is connected to."""
    made: list[str] = []

    async def copy(dsn: str) -> str:
        name = f"copy_{uuid4().hex}"
        source = dsn.partition("?")[0].rpartition("/")[2]
        async with connected(postgres.dsn, owner=True) as connection:
            for statement in cloned(name, source):
                await connection.execute(statement)
        made.append(name)
        return on_database(dsn, name)

    yield copy
    async with connected(postgres.dsn, owner=True) as connection:
        for name in made:
            await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.mark.proof
async def test_a_server_on_a_restored_copy_removes_nothing_until_it_is_told_to_follow_it(
    serve: Serve,
    proxy: EngineProxy,
    engine: Engine,
    image: str,
    installation: UUID,
    dsn: str,
    copies: Callable[[str], Awaitable[str]],
) -> None:
    first = await serve("all", "first", worker=QUICK)
    async with first.client() as client:
        old = await running(client, image)
    await stop(first)
    copy = await copies(dsn)
    second = await serve("all", "second", worker=QUICK)
    async with second.client() as client:
        new = await running(client, image)
    await stop(second)

    restored = await serve("all", "restored", host=proxy.address, database=copy, worker=QUICK)
    async with restored.client() as client:
        assert "LOG_WENT_BACK" in await says(restored, "mismatch")
        asked = proxy.calls["version"] + proxy.calls["mark"]

        async def asked_on() -> bool:
            return proxy.calls["version"] + proxy.calls["mark"] > asked + 4

        await until(asked_on, "it has looked at the engine some more times")
        assert proxy.calls["remove"] == 0
        await unharmed(client, engine, old)
        assert len(await engine.containers(sandbox=new)) == 1
    await stop(restored)

    back = await serve("all", "back", worker=QUICK)
    async with back.client() as client:
        await unharmed(client, engine, old, new)
    await stop(back)

    followed = await serve("all", "followed", database=copy, worker=QUICK)
    code, said = await command(followed, "engines", "trust", "default")
    assert code == 0, said
    async with followed.client() as client:

        async def gone() -> bool:
            return await engine.containers(sandbox=new) == []

        await until(gone, "what the copy does not know is removed as an orphan", 60)
        await unharmed(client, engine, old)
