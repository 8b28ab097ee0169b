"""Doctor looks and changes nothing, and each subject has an answer of its own."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from app.store.database.migrate import migrate
from app.store.embedded.server import EmbeddedPostgres
from tests.chaos.harness import ServerProcess, write_config
from tests.cli.test_commands import config, home, run
from tests.conftest import on_database
from tests.support.sql import connected

__all__ = ["home"]
NONE = "unix:///nonexistent/engine.sock"


@pytest.fixture
def empty(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A database that was never migrated."""
    name = f"d_{uuid4().hex}"

    async def tell(statement: str) -> None:
        async with connected(postgres.dsn, owner=True) as owner:
            await owner.execute(statement)

    asyncio.run(tell(f"CREATE DATABASE {name} TEMPLATE template0"))
    yield on_database(postgres.dsn, name)
    asyncio.run(tell(f"DROP DATABASE {name} WITH (FORCE)"))


def examine(home: Path, dsn: str) -> list[str]:
    path = config(home, f'[server]\nport = 0\n[sandledger]\nstate_dir = "{home}/state"\n')
    done = run("doctor", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, DOCKER_HOST=NONE)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()


def test_a_role_without_a_worker_needs_no_engine(home: Path, dsn: str):
    path = config(home, f'[server]\nport = 0\n[sandledger]\nstate_dir = "{home}/state"\n')
    for role, fine in (("proxy", True), ("api", True), ("worker", False)):
        done = run("doctor", "--role", role, "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, DOCKER_HOST=NONE)
        (engine,) = [line for line in done.stderr.splitlines() if "  engine " in line]
        assert (done.returncode == 0, engine.startswith("ok")) == (fine, fine), done.stderr


def test_a_schema_that_is_behind_is_said_and_left_as_it_is(home: Path, empty: str):
    found = [line for line in examine(home, empty) if "migrations" in line and line.startswith(("ok", "FAIL"))]
    assert len(found) == 1
    assert found[0].startswith("FAIL")
    assert "sandledger migrate" in found[0]
    assert asyncio.run(migrate(empty, apply=False)).before is None


@pytest.mark.parametrize(
    "words",
    [("status",), ("events", str(uuid4())), ("engines", "ls"), ("engines", "trust", "x"), ("keys", "rotate-master")],
)
def test_no_other_command_touches_the_schema(home: Path, empty: str, words: tuple[str, ...]):
    done = run(*words, OPENSANDBOX_STORE_POSTGRESQL_DSN=empty, SANDLEDGER_STATE_DIR=str(home))
    assert done.returncode == 1
    assert "schema is at nothing" in done.stderr
    assert "sandledger migrate" in done.stderr
    assert "Traceback" not in done.stderr
    assert asyncio.run(migrate(empty, apply=False)).before is None


@pytest.mark.parametrize(
    "words",
    [
        ("doctor",),
        ("status",),
        ("events", str(uuid4())),
        ("engines", "ls"),
        ("engines", "trust", "x"),
        ("keys", "rotate-master"),
    ],
)
def test_where_there_is_no_database_none_is_made(home: Path, words: tuple[str, ...]):
    path = config(home, f'[server]\nport = 0\n[sandledger]\nstate_dir = "{home}/state"\n')
    done = run(*words, "--config", path, DOCKER_HOST=NONE, OPENSANDBOX_STORE_POSTGRESQL_DSN="", DATABASE_URL="")
    assert done.returncode == 1
    assert "there is no database yet" in done.stderr
    assert "sandledger serve" in done.stderr
    assert "dsn" in done.stderr
    assert not (home / "state").exists(), "nothing was made"
    if words == ("doctor",):
        found = done.stderr.splitlines()
        assert any(line.startswith("FAIL  database") for line in found)
        assert any(line.startswith("FAIL  engine") for line in found), "the others are examined all the same"


def listening_on(home: Path, dsn: str, port: int) -> str:
    """What doctor says of a port where something listens."""
    path = config(home, f'[server]\nport = {port}\n[sandledger]\nstate_dir = "{home}/state"\n')
    done = run("doctor", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, DOCKER_HOST=NONE)
    (line,) = [line for line in done.stderr.splitlines() if "  port " in line]
    return line


def test_a_server_of_ours_on_the_port_is_only_worth_a_warning(home: Path, dsn: str):
    server = ServerProcess(write_config(home, dsn, NONE, "running"), role="api").start()
    try:
        line = listening_on(home, dsn, urlsplit(server.base).port or 0)
    finally:
        server.kill()
    assert line.startswith("WARN  port")
    assert "a server answers there already" in line


@pytest.mark.parametrize("says", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", b"SSH-2.0-x\r\n", b""])
def test_anything_else_on_the_port_is_a_fault(home: Path, dsn: str, says: bytes):
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(says)

    with socketserver.TCPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        line = listening_on(home, dsn, other.server_address[1])
        other.shutdown()
    assert line.startswith("FAIL  port")
    assert "Address already in use" in line


def test_a_login_that_could_rewrite_the_log_is_warned_of(home: Path, dsn: str):
    assert any(line.startswith("WARN  login") and "superuser" in line for line in examine(home, dsn))


def test_a_database_that_is_away_hides_nothing_else(home: Path):
    found = examine(home, "postgresql://u:hidden-word@127.0.0.1:1/x")
    assert any(line.startswith("FAIL  database") and "store.postgresql.dsn" in line for line in found)
    assert any(line.startswith("FAIL  engine") for line in found)
    assert "hidden-word" not in "\n".join(found)


def test_a_master_key_that_is_not_there_is_reported_and_not_made(home: Path, dsn: str):
    file = home / "state" / "master.key"

    def key_line() -> str:
        (line,) = [line for line in examine(home, dsn) if "  master key " in line]
        assert not file.exists()
        assert str(file) in line
        return line

    fresh = key_line()
    assert fresh.startswith("ok    master key")
    assert "`sandledger serve` makes it at its first start" in fresh

    async def claim() -> None:
        async with connected(dsn, owner=True) as owner:
            await owner.execute("UPDATE sandledger.installation SET master_key_id = 'the-wanted-one'")

    asyncio.run(claim())
    lost = key_line()
    assert lost.startswith("FAIL  master key")
    assert "the-wanted-one" in lost


def test_a_server_makes_no_second_key_where_one_is_lost(home: Path, dsn: str):
    async def claim() -> None:
        async with connected(dsn, owner=True) as owner:
            await owner.execute("UPDATE sandledger.installation SET master_key_id = 'the-wanted-one'")

    asyncio.run(claim())
    path = config(home, f'[server]\nport = 0\n[sandledger]\nstate_dir = "{home}/state"\n')
    done = run("serve", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, DOCKER_HOST=NONE)
    assert done.returncode == 1
    assert "the-wanted-one" in done.stderr
    assert f"{home}/state/master.key" in done.stderr
    assert not (home / "state" / "master.key").exists()


def test_a_key_file_that_is_not_there_is_named_with_its_setting(home: Path, dsn: str):
    path = config(home, f'[server]\nport = 0\n[sandledger]\nmaster_key_file = "{home}/no.key"\n')
    done = run("serve", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn)
    assert done.returncode == 1
    assert f"{home}/no.key" in done.stderr
    assert "sandledger.master_key_file" in done.stderr


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ('[server]\napi_key = "a\\nb"\n', "text in one line"),
        ('[docker]\nhost = "ftp://engine"\n', "unix:///var/run/docker.sock"),
    ],
)
def test_values_that_could_never_work_stop_the_start(home: Path, setting: str, allowed: str, monkeypatch):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    done = run("serve", "--config", config(home, setting))
    assert done.returncode == 1
    assert allowed in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
