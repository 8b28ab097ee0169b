"""The command as a person meets it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from app import __version__
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.spec import SandboxSpec
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from tests.support import warm

ROOT = Path(__file__).resolve().parents[2]
META = Meta(Actor(ActorKind.API_KEY, "k", "default"), "test", request_id="r1")


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sandledger-cli-") as folder:
        path = Path(folder)
        path.chmod(0o711)
        yield path


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SANDLEDGER_", "OPENSANDBOX_", "SANDBOX_"))}
    return warm.run("app", *arguments, environ={**clean, **environ}, timeout=120)


def config(home: Path, text: str) -> str:
    path = home / "server.toml"
    path.write_text(text)
    return str(path)


def test_version_and_help() -> None:
    assert run("--version").stdout.strip().endswith(__version__)
    shown = run("--help").stdout
    for command in ("serve", "migrate", "doctor", "demo", "events", "status", "engines", "keys"):
        assert command in shown


def test_a_bad_value_stops_the_start_with_file_key_value_and_what_is_allowed(home: Path) -> None:
    path = config(home, "[server]\nport = 99999\n")
    done = run("serve", "--config", path)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for part in (path, "server.port", "99999", "65535"):
        assert part in done.stderr


def test_an_unknown_key_is_named_with_the_nearest_known_one(home: Path, dsn: str) -> None:
    path = config(home, "[server]\nprot = 1\n")
    done = run("migrate", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn)
    assert done.returncode == 0, done.stderr
    assert "server.prot" in done.stderr
    assert "server.port" in done.stderr


def test_exposure_without_a_key_is_refused(home: Path, dsn: str) -> None:
    path = config(home, '[server]\nhost = "0.0.0.0"\n')
    done = run("serve", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn)
    assert done.returncode == 1
    assert "api_key" in done.stderr
    assert "OPENSANDBOX_INSECURE_SERVER" in done.stderr


def test_a_taken_port_is_said_in_one_line(home: Path, dsn: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        path = config(home, f"[server]\nport = {taken.getsockname()[1]}\n")
        done = run("serve", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn)
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_that_is_not_there(home: Path) -> None:
    path = config(home, "[sandledger]\nstart_wait_seconds = 0\n")
    done = run("migrate", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN="postgresql://u:hidden-word@127.0.0.1:1/x")
    assert done.returncode == 1
    assert "PostgreSQL" in done.stderr
    assert "hidden-word" not in done.stderr
    assert "Traceback" not in done.stderr


def test_another_master_key_is_refused(home: Path, dsn: str) -> None:
    first = config(home, f'[server]\nport = 0\n[sandledger]\nstate_dir = "{home}/a"\n')
    looked = run("doctor", "--config", first, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn)
    assert "master key" in looked.stderr

    async def claim() -> None:
        connection = await asyncpg.connect(dsn)
        await connection.execute("UPDATE installation SET master_key_id = 'somebody-else'")
        await connection.close()

    import asyncio

    asyncio.run(claim())
    done = run("serve", "--config", first, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn)
    assert done.returncode == 1
    assert "SANDLEDGER_MASTER_KEY" in done.stderr


@pytest.mark.engine
def test_doctor_finds_everything_in_order_and_says_what_is_not(home: Path, dsn: str, docker_host: str) -> None:
    path = config(home, f'[server]\nport = 0\n[sandledger]\nstate_dir = "{home}/state"\n')
    fine = run("doctor", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, DOCKER_HOST=docker_host)
    assert fine.returncode == 0, fine.stderr
    for subject in ("port", "database", "migrations", "clock", "master key", "engine"):
        assert f"ok    {subject}" in fine.stderr, fine.stderr
    assert not (home / "state" / "master.key").exists(), "a diagnostic changes nothing"
    sick = run("doctor", "--config", path, OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, DOCKER_HOST=f"unix://{home}/none")
    assert sick.returncode == 1
    assert "FAIL  engine" in sick.stderr


async def test_events_prints_the_history_of_one_that_is_gone(dsn: str, home: Path, service: Service) -> None:
    sandbox = uuid4()
    spec = SandboxSpec("busybox", ("sleep", "1"))
    await service.create(sandbox, "default", ev.Requested(spec, "f", timeout_s=600), None, META)
    await service.execute(sandbox, ANY_TENANT, cmd.Terminate(), META)
    await service.execute(sandbox, ANY_TENANT, cmd.RecordRemoved(), META)
    shown = run("events", str(sandbox), OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn, SANDLEDGER_STATE_DIR=str(home))
    assert shown.returncode == 0, shown.stderr
    for part in (
        "sandbox.requested",
        "sandbox.placed",
        "sandbox.terminated",
        "api_key default",
        "user_delete",
        "Terminated",
    ):
        assert part in shown.stdout
    lines = run("events", "--json", str(sandbox), OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn).stdout.splitlines()
    assert [json.loads(line)["version"] for line in lines] == [1, 2, 3, 4, 5]
    missing = run("events", str(uuid4()), OPENSANDBOX_STORE_POSTGRESQL_DSN=dsn)
    assert missing.returncode == 1
    assert "never was" in missing.stderr
