"""Two versions of the code on one schema: both append to one stream, and the older one harms nothing that it cannot read.

The newer version is a copy of the tree in which the registry has revision 2, a type has a field more (which needs no new
number), and another type has schema 2. It runs as a process of its own.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.store.embedded.server import EmbeddedPostgres
from tests.chaos.harness import Engine, ServerProcess, body, events, history, reaches, state, until
from tests.conftest import ROOT, cloned, on_database
from tests.support.sql import connected

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]
Serve = Callable[..., Awaitable[ServerProcess]]
EDITS = {
    # A field with a default: older readers ignore it.
    '    source: str = "api"\n': '    source: str = "api"\n    note: str = "from the newer version"\n    extra: str = ""\n',
    # A new meaning: a new schema number, and a higher revision.
    '        "sandbox.terminated": Terminated,\n    },\n)': '        "sandbox.terminated": Terminated,\n    },\n'
    '    revision=2,\n    schemas={"sandbox.metadata_patched": 2},\n)',
}
CHECK = "import asyncio, sys; from tests.support.drift import assert_no_drift; print(asyncio.run(assert_no_drift(sys.argv[1])))"


@pytest.fixture
def newer(home: Path) -> Path:
    """The tree of the newer version."""
    tree = home / "newer"
    for name in ("app", "tests", "migrations"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("alembic.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tree / name)
    path = tree / "app/domain/sandbox/events.py"
    text = path.read_text()
    for old, new in EDITS.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return tree


@pytest.fixture
async def shared(postgres: EmbeddedPostgres, template: str, newer: Path) -> AsyncIterator[str]:
    """A database of its own: at the end only the newer version can fold all of it, so that one checks it."""
    name = f"t_{uuid4().hex}"
    async with connected(postgres.dsn, owner=True) as owner:
        for statement in cloned(name, template):
            await owner.execute(statement)
    dsn = on_database(postgres.dsn, name)
    try:
        yield dsn
        argv = [sys.executable, "-c", CHECK, dsn]
        done = await asyncio.to_thread(subprocess.run, argv, cwd=newer, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
    finally:
        async with connected(postgres.dsn, owner=True) as owner:
            await owner.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@pytest.mark.proof
async def test_both_versions_write_to_one_stream_and_lose_nothing(
    serve: Serve, engine: Engine, docker: object, image: str, shared: str, newer: Path
) -> None:
    connection = await asyncpg.connect(shared)
    own = UUID(str(await connection.fetchval("SELECT id FROM sandledger.installation")))
    await connection.close()
    old = await serve("all", "old", database=shared)
    new = await serve("all", "new", database=shared, tree=newer)
    try:
        async with old.client() as a, new.client() as b:
            answer = await a.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"})
            sandbox = answer.json()["id"]
            other = (await b.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"})).json()["id"]

            async def renew(number: int) -> None:
                at = (datetime.now(UTC) + timedelta(hours=1, seconds=number)).isoformat()
                client = (a, b)[number % 2]
                renewed = await client.post(f"/sandboxes/{sandbox}/renew-expiration", json={"expiresAt": at})
                assert renewed.status_code == 200, renewed.text

            await asyncio.gather(*[renew(number) for number in range(20)])
            seen = [[event["data"] for event in await events(client, sandbox, "sandbox.renewed")] for client in (a, b)]
            assert seen[0] == seen[1]
            assert len(seen[0]) == 20

            # Now the newer one writes what the older one cannot read, and wants something done.
            patched = await b.patch(f"/sandboxes/{sandbox}/metadata", json={"by": "newer"})
            assert patched.status_code == 200, patched.text
            refused = await a.patch(f"/sandboxes/{sandbox}/metadata", json={"by": "older"})
            assert (refused.status_code, refused.json()["code"]) == (503, "SANDLEDGER::NEWER_HISTORY")
            assert (await a.patch(f"/sandboxes/{other}/metadata", json={})).status_code == 200, "others are served"
            assert (await b.post(f"/sandboxes/{sandbox}/pause")).status_code == 202
            await reaches(b, sandbox, "Paused")
            assert (await history(b, sandbox))[-2:] == ["sandbox.pause_requested", "sandbox.paused"]
            assert await history(a, sandbox) == await history(b, sandbox), "the older one shows what it cannot read"

            # Without the newer one the stream waits, uncounted and unharmed.
            assert (await b.post(f"/sandboxes/{sandbox}/resume")).status_code == 202
            await reaches(b, sandbox, "Running")
            before = await history(a, sandbox)
            new.kill()
            assert (await a.post(f"/sandboxes/{sandbox}/pause")).status_code == 503
            late = (await a.post("/sandboxes", json=body(image), headers={"Prefer": "wait=60"})).json()["id"]
            assert await state(a, late) == "Running", "the older one works on with what it can read"
            assert await history(a, sandbox) == before
            again = await serve("all", "new", database=shared, tree=newer)
            async with again.client() as c:
                for each in (sandbox, other, late):
                    assert (await c.delete(f"/sandboxes/{each}")).status_code == 204
                for each in (sandbox, other, late):
                    await reaches(c, each, "Terminated")

            async def gone() -> bool:
                return await engine.containers(installation=own) == []

            await until(gone, "nothing is left")
    finally:
        await engine.forget(own)
