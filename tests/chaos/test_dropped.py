"""The schema or the database is dropped under a server with a worker: it says so in lines, answers 503, and ends with a
reason when another installation stands in its place. No engine is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from app.store.database.dsn import address
from app.store.database.migrate import migrate
from app.store.embedded.server import EmbeddedPostgres
from tests.chaos.harness import ServerProcess, body, until, write_config
from tests.conftest import as_server, cloned, on_database

NONE = "unix:///nonexistent/engine.sock"
pytestmark = pytest.mark.timeout(180)


async def told(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def doomed(postgres: EmbeddedPostgres, template: str) -> AsyncIterator[str]:
    """Name of a database that the test may drop."""
    name = f"x_{uuid4().hex}"
    await told(postgres.dsn, *cloned(name, template))
    yield name
    await told(postgres.dsn, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.mark.parametrize("dropped", ["schema", "database"])
async def test_it_answers_503_and_ends_when_another_installation_comes(
    postgres: EmbeddedPostgres, template: str, doomed: str, home: Path, dropped: str
):
    dsn = on_database(postgres.dsn, doomed)
    server = ServerProcess(write_config(home, as_server(dsn), NONE, owner_dsn=dsn), "all").start()
    try:
        async with server.client() as client:
            assert (await client.post("/sandboxes", json=body("image:1"))).status_code == 202
            if dropped == "schema":
                await told(dsn, "DROP SCHEMA sandledger CASCADE")
            else:
                await told(postgres.dsn, f"DROP DATABASE {doomed} WITH (FORCE)")

            async def is_said() -> bool:
                refusal = await client.get("/sandboxes")
                assert (refusal.status_code, refusal.json()["code"]) == (503, "GENERAL::STORE_UNAVAILABLE")
                return "requests are answered 503 until then" in server.log.read_text()

            await until(is_said, "the log says what is wrong")
            assert server._process is not None
            assert server._process.poll() is None
            if dropped == "schema":
                await migrate(dsn, admit=address(as_server(dsn)))
            else:
                await told(
                    postgres.dsn,
                    *cloned(doomed, template),
                )
                await told(dsn, "UPDATE sandledger.installation SET id = gen_random_uuid()")
        code = await asyncio.to_thread(server.wait, 20)
    finally:
        server.kill()
        print(server.log.read_text())
    said = server.log.read_text()
    assert code == 1
    # Not always its last line: what is closed after it may have something to say.
    assert "the database was replaced under this server" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) < 400, "no loop spins"
