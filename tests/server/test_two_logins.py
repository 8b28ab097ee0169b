"""A server with two addresses: the owner's for the migration, and a login that the migration makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from app.errors import SettingsError
from app.server.assembly import open_database, opened
from app.settings import Settings, load
from tests.support.cluster import TcpServer, tcp_server


@pytest.fixture
def server() -> Iterator[TcpServer]:
    with tcp_server() as made:
        made.create("host all postgres 127.0.0.1/32 trust", "host all all 127.0.0.1/32 scram-sha-256")
        made.start()
        yield made


def settings(tmp_path: Path, dsn: str, migrate_dsn: str = "") -> Settings:
    environ = {"HOME": str(tmp_path), "SANDLEDGER_STATE_DIR": str(tmp_path / "state")}
    path = tmp_path / "empty.toml"
    path.write_text("")
    return load(path, {**environ, "DATABASE_URL": dsn, "SANDLEDGER_MIGRATE_DSN": migrate_dsn}).settings


async def test_the_first_start_makes_schema_and_login_and_works_as_the_login(server: TcpServer, tmp_path: Path):
    said: list[str] = []
    dsn = server.dsn(user="server:secret")
    async with opened(settings(tmp_path, dsn, server.dsn()), said.append) as parts:
        login = parts.database.login
        assert login is not None
        assert (login.name, login.superuser, login.owner) == ("server", False, False)
    assert said == ["database: migrated from empty to 0001"]
    # From then on nobody needs the owner's address.
    said.clear()
    async with opened(settings(tmp_path, dsn), said.append):
        assert said == []


async def test_one_address_of_an_owner_works_and_each_start_warns(server: TcpServer, tmp_path: Path):
    for _ in range(2):
        said: list[str] = []
        async with opened(settings(tmp_path, server.dsn()), said.append):
            pass
        assert said[-1].startswith("warning: the database login postgres is a superuser")


async def test_a_server_told_not_to_migrate_starts_on_a_right_schema_only(server: TcpServer, tmp_path: Path):
    ours = settings(tmp_path, server.dsn())
    with pytest.raises(SettingsError, match=r"schema is at nothing.*sandledger migrate"):
        async with opened(ours, print, upgrade=False):
            pass
    async with open_database(ours, print):
        pass
    async with opened(ours, print, upgrade=False) as parts:
        assert parts.database.login is not None


async def test_a_process_keeps_to_its_number_of_connections(server: TcpServer, tmp_path: Path):
    ours = settings(tmp_path, server.dsn())
    five = msgspec.structs.replace(ours.store.postgresql, max_pool_size=5)
    ours = msgspec.structs.replace(ours, store=msgspec.structs.replace(ours.store, postgresql=five))
    async with opened(ours, print) as parts:
        sizes = (parts.database._sizes[1], parts.database.reserved._sizes[1])
        assert sum(sizes) + 1 == 5  # and one that listens
