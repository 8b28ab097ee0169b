"""Stopping in order, stopping at once, and a database that dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID

import aiodocker
import asyncpg
import httpx
import pytest

from tests.chaos.harness import Engine, ServerProcess, body, end, history, reaches, until, write_config
from tests.drivers.proxy import EngineProxy, Gate

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]
Serve = Callable[..., Awaitable[ServerProcess]]


async def leases(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("SELECT count(*) FROM reconcile_queue WHERE lease_until > clock_timestamp()")
    finally:
        await connection.close()


async def test_sigterm_finishes_requests_hands_leases_back_and_fails_nothing(
    serve: Serve, docker_host: str, engine: Engine, image: str, installation: UUID, dsn: str
) -> None:
    proxy = EngineProxy(docker_host)
    await proxy.up()
    proxy.gates["create"] = Gate()
    server = await serve(
        "all", "first", host=proxy.address, worker="lease_seconds = 600", server="timeout_graceful_shutdown = 2"
    )
    async with server.client() as client:
        waiting = asyncio.create_task(client.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"}))
        await proxy.gates["create"].reached.wait()
        assert await leases(dsn) == 1
        server.send(signal.SIGTERM)
        answer = await waiting
        assert answer.status_code == 202, "the request in flight got its answer"
        sandbox = answer.json()["id"]
    proxy.gates["create"].open()
    assert await asyncio.to_thread(server.wait) == 0
    assert await leases(dsn) == 0, "with a lease of ten minutes, nobody else could go on before long"
    await proxy.close()
    heir = await serve("all", "second")
    async with heir.client() as client:
        await reaches(client, sandbox, "Running")
        assert not {"sandbox.failed", "sandbox.reconcile_failed"} & set(await history(client, sandbox))
        assert len(await engine.containers(sandbox=sandbox)) == 1


async def test_a_second_sigterm_is_immediate(serve: Serve, docker_host: str, image: str, engine: Engine) -> None:
    proxy = EngineProxy(docker_host)
    await proxy.up()
    proxy.gates["create"] = Gate()
    server = await serve("all", "stuck", host=proxy.address, server="timeout_graceful_shutdown = 600")
    async with server.client() as client:
        waiting = asyncio.create_task(client.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"}))
        await proxy.gates["create"].reached.wait()
        server.send(signal.SIGTERM)

        async def heard() -> bool:
            return b"stopping" in server.log.read_bytes()

        await until(heard, "the first signal is heard")
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait, 10) == 128 + signal.SIGTERM
        await asyncio.gather(waiting, return_exceptions=True)
    await proxy.close()


async def test_the_embedded_postmaster_is_killed_under_a_live_server(
    home: Path, docker_host: str, image: str, docker: aiodocker.Docker
) -> None:
    """Accepted before the kill, still there and still served after it."""
    config = write_config(home, "x", docker_host)
    text = "\n".join(line for line in config.read_text().splitlines() if not line.startswith("dsn"))
    config.write_text(text)
    server = ServerProcess(config)
    try:
        await asyncio.to_thread(server.start)
        async with server.client() as client:
            answer = await client.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"})
            sandbox = answer.json()["id"]
            pid_file = next(home.rglob("postmaster.pid"))
            os.kill(int(pid_file.read_text().split("\n", 1)[0]), signal.SIGKILL)

            async def back() -> bool:
                try:
                    return (await client.get(f"/sandboxes/{sandbox}")).status_code == 200
                except httpx.TransportError:
                    return False

            await until(back, "the server comes back by itself", 60)

            async def deleted() -> bool:
                # A backend that outlived its postmaster may have answered "back" before it was told to quit: 503 is
                # honest then, and clients repeat a DELETE that met it.
                return (await client.delete(f"/sandboxes/{sandbox}")).status_code in (204, 404)

            await until(deleted, "a delete gets through", 60)
            await reaches(client, sandbox, "Terminated")
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait) == 0
    finally:
        await end(docker, [server])
