"""Dump and restore, whole and data only, with the programs that come with the embedded server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.dsn import address
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.embedded.server import EmbeddedPostgres, binaries
from app.store.log.signal import Signal
from tests.conftest import as_server, on_database
from tests.support.drift import assert_no_drift
from tests.support.sql import connected
from tests.support.stream import META, requested


@pytest.fixture
async def restored(postgres: EmbeddedPostgres) -> Iterator[str]:
    """An empty database to restore into."""
    name = f"r_{uuid4().hex}"
    async with connected(postgres.dsn, owner=True) as superuser:
        await superuser.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        yield on_database(postgres.dsn, name)
        await superuser.execute(f"DROP DATABASE {name} WITH (FORCE)")


def tool(name: str, *argv: str) -> None:
    done = subprocess.run([str(binaries() / name), *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def lived(service: Service) -> UUID:
    """A sandbox with some history."""
    made = await service.create(uuid4(), "default", requested(), None, META)
    await service.execute(made.sandbox.id, ANY_TENANT, cmd.Terminate(), META)
    return made.sandbox.id


async def works_on(dsn: str) -> None:
    """History is whole, the log goes on behind it, and stays append-only."""
    assert await assert_no_drift(dsn) == 2
    database = Database(as_server(dsn))
    service = Service(database, Signal(database))
    last = await service.log.horizon()
    made = await service.create(uuid4(), "default", requested(), None, META)
    assert made.position > last
    assert await service.log.horizon(fresh=True) >= made.position
    await database.close()
    async with connected(dsn, owner=True) as owner:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="append-only"):
            await owner.execute("DELETE FROM events")


async def test_a_whole_dump(dsn: str, restored: str, service: Service, tmp_path: Path):
    for _ in range(2):
        await lived(service)
    tool("pg_dump", "-Fc", "-f", str(tmp_path / "dump"), dsn)
    tool("pg_restore", "--exit-on-error", "-d", restored, str(tmp_path / "dump"))
    await works_on(restored)
    assert (await migrate(restored)).before == (await migrate(dsn)).after


async def test_data_only_into_a_freshly_migrated_database(dsn: str, restored: str, service: Service, tmp_path: Path):
    """pg_restore works with an empty search path, and triggers that are always on fire meanwhile."""
    for _ in range(2):
        await lived(service)
    await migrate(restored, admit=address(as_server(restored)))
    async with connected(restored, owner=True) as owner:
        # What the migration itself put there.
        await owner.execute("TRUNCATE installation, phase_transitions, alembic_version")
    tool("pg_dump", "-Fc", "--data-only", "-f", str(tmp_path / "dump"), dsn)
    tool("pg_restore", "--exit-on-error", "--data-only", "-d", restored, str(tmp_path / "dump"))
    # The restored row names the other database's role; the migration puts this one's there again.
    await migrate(restored, admit=address(as_server(restored)))
    await works_on(restored)
