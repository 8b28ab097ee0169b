"""One PostgreSQL cluster on disk: create, start, inspect and stop it.

This module does not know who else uses the cluster: callers hold the locks of `app.store.embedded.server`, and
`launch` hands the one for the postmaster down to every process that it starts.

**Invariants.** `data` is complete or absent: initdb works in `data.new`, which gets the database of ours too, is synced
and renamed; a `data.new` that exists was left by a kill and is made again. So a cluster without the database has lost
it, and nothing here makes it a second time: an empty log must not take the place of a lost one. The postmaster has its
own session, no standard input, none of our files but the lock and none of our environment. It listens on a socket only,
in a folder (0700) that only its account and root can enter, which is why `trust` is enough. No statement, parameter or
key value reaches its log: errors of clients go to the clients only, and details are cut. Configuration lies beside
`data`, written at every start; the operator's own is `ALTER SYSTEM`, which wins.

**Failure.** StoreUnavailable with the last lines of PostgreSQL's log; SettingsError for a folder that is no cluster, is
another major version's, or has lost the database.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from msgspec import Struct

from app.errors import SettingsError, StoreUnavailable
from app.store.durable import sync_folder
from app.store.embedded.account import Account, account_for, home_for, programs_for, replace

DATABASE = "sandledger"
_SOCKET = ".s.PGSQL.5432"
_MAX_SOCKET_PATH_BYTES = 107
MAX_WAIT_SECONDS = 600.0
"""Seconds that a start, with recovery, may take."""
ORPHAN_EXIT_SECONDS = 5.0
"""Seconds that processes without a postmaster get to notice its death."""
_STOPPING = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))
"""Fast shutdown, immediate shutdown, the kernel's; each with its seconds. All are safe for what was committed."""
_SETTINGS = """\
# Written at every start. Own settings: ALTER SYSTEM SET ..., they win.
cluster_name = 'sandledger'
listen_addresses = ''
port = 5432
unix_socket_directories = '{sockets}'
unix_socket_permissions = 0700
hba_file = '{home}/pg_hba.conf'
max_connections = 100
# An idle server should use little memory.
shared_buffers = 32MB
huge_pages = off
io_method = sync
max_wal_size = 256MB
max_worker_processes = 4
max_parallel_workers = 2
max_logical_replication_workers = 0
jit = off
# Neither a small /dev/shm nor a logout that clears it may matter.
dynamic_shared_memory_type = mmap
fsync = on
full_page_writes = on
synchronous_commit = on
autovacuum = on
timezone = 'UTC'
log_timezone = 'UTC'
lc_messages = 'C'
# A week of log files, each day's overwritten a week later.
logging_collector = on
log_directory = '{home}/log'
log_filename = 'postgresql-%a.log'
log_file_mode = 0600
log_rotation_age = 1d
log_rotation_size = 0
log_truncate_on_rotation = on
log_line_prefix = '%m [%p] '
# Statements, parameters and key values may be secrets: errors of clients go to the clients (`log` ranks above
# error), DETAIL, which quotes rows, keys and the statement of a crashed backend, is cut by `terse`.
log_min_messages = log
log_error_verbosity = terse
log_min_error_statement = panic
log_statement = none
log_min_duration_statement = -1
log_parameter_max_length = 0
log_parameter_max_length_on_error = 0
log_checkpoints = off
"""


class Cluster(Struct, frozen=True):
    """One cluster and how to reach it."""

    home: Path
    """Configuration, `data`, `log`."""
    sockets: Path
    programs: Path
    account: Account
    say: Callable[[str], None]

    @property
    def data(self) -> Path:
        return self.home / "data"

    @property
    def log(self) -> Path:
        return self.home / "log"

    def client(self, program: str, *argv: str) -> tuple[int, str]:
        """Run a client program as the superuser."""
        where = ("-h", str(self.sockets), "-p", "5432", "-U", "postgres", "-d", "postgres")
        return self.account.run(self.programs / program, *where, *argv)

    def accepts(self) -> bool:
        return (self.sockets / _SOCKET).exists() and self.client("pg_isready", "-q")[0] == 0

    def postmaster(self) -> psutil.Process | None:
        """The process that `postmaster.pid` names, if it truly is one at work in this data folder."""
        try:
            process = psutil.Process(int(self._pid_file()[0]))
        except (ValueError, IndexError, psutil.Error):
            return None
        return process if self.occupied_by(process) else None

    def ready(self) -> bool:
        """Say whether the postmaster reports that it is ready."""
        return [line.strip() for line in self._pid_file()[7:]] == ["ready"]

    def _pid_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def occupied_by(self, process: psutil.Process) -> bool:
        """Whether a process works in the data folder, as all of PostgreSQL's do. A zombie works nowhere."""
        try:
            return process.cwd() == str(self.data)
        except psutil.Error:
            return False

    def last_words(self) -> str:
        """The end of the newest log, for an error message."""
        files = sorted(self.log.glob("*.log"), key=lambda path: path.stat().st_mtime)
        said = self.account.run("tail", "-n", "3", files[-1])[1] if files else ""
        return f"{said or 'nothing'} (more in {self.log})"


def find(root: Path, say: Callable[[str], None]) -> Cluster:
    """Where all of it is; makes the folders around the cluster, not the cluster."""
    home = home_for(root, say)
    account = account_for(home / "data")
    account.own(home / "log")
    found = Cluster(home, _sockets(home, account), programs_for(account), account, say)
    _check_version(found)
    return found


def _sockets(home: Path, account: Account) -> Path:
    """The socket's folder: beside the data if a socket path may be that long, else a short one that is recorded.

    The short one must be what we made: the account's, closed to others, no link. Anything else is replaced.
    """
    near = home / "socket"
    if re.fullmatch(r"[\w./+-]+", str(near), re.ASCII) and len(str(near / _SOCKET)) <= _MAX_SOCKET_PATH_BYTES:
        return account.own(near)
    record = home / "socket-dir"
    if record.exists():
        known = Path(record.read_text().strip())
        with suppress(FileNotFoundError):
            found = known.lstat()
            if (found.st_uid, found.st_mode) == (account.uid, stat.S_IFDIR | 0o700):
                return known
    # Not XDG_RUNTIME_DIR: a logout removes it under a daemon that lives on.
    short = next(path for path in ("/run", "/tmp") if path == "/tmp" or os.access(path, os.W_OK))  # noqa: S108
    made = account.own(Path(tempfile.mkdtemp(prefix="sandledger-", dir=short)))
    replace(record, f"{made}\n")
    return made


def _check_version(cluster: Cluster) -> None:
    if not cluster.data.exists():
        return
    written = cluster.data / "PG_VERSION"
    if not written.exists():
        raise SettingsError(
            f"{cluster.data}: is not a PostgreSQL data folder; move it away, or restore it from a backup"
        )
    made_by = written.read_text().strip()
    said = cluster.account.run(cluster.programs / "postgres", "--version")[1]
    brought = re.sub(r".* (\d+).*", r"\1", said)
    if made_by != brought:
        raise SettingsError(
            f"{cluster.data}: was made by PostgreSQL {made_by}, this release brings {brought}: pg_dump it with the"
            " release that made it and restore into a new state directory, or go back to that release"
        )


def launch(cluster: Cluster, lock: int, *, create: bool) -> None:
    """Start the postmaster, and wait until it takes connections. `create` makes a new cluster if there is none.

    `lock` is the postmaster lock, held: proof that pid files are leftovers. They go, since their pid may be somebody
    else's by now and PostgreSQL would then refuse to start. PostgreSQL's own interlock stays (the shared memory segment
    is found by the data folder's inode).
    """
    if not cluster.data.exists():
        if not create:
            raise _lost(cluster)
        _create(cluster, lock)
    (cluster.data / "postmaster.pid").unlink(missing_ok=True)
    (cluster.sockets / f"{_SOCKET}.lock").unlink(missing_ok=True)
    early = cluster.log / "start.log"
    early.unlink(missing_ok=True)
    configuration = cluster.home / "postgresql.conf"
    replace(cluster.home / "pg_hba.conf", "local all all trust\n")
    replace(configuration, _SETTINGS.format(home=cluster.home, sockets=cluster.sockets))
    cluster.say("starting PostgreSQL")
    code = _patiently(
        cluster,
        cluster.account.spawn(
            *(
                cluster.programs / "pg_ctl",
                "start",
                "-s",
                "-w",
                "-t",
                str(int(MAX_WAIT_SECONDS)),
                "-D",
                cluster.data,
                "-l",
                early,
            ),
            *("-o", f"-c config_file='{configuration}'"),
            keep=(lock,),
            output=subprocess.DEVNULL,
        ),
    )
    if code:
        raise StoreUnavailable(f"PostgreSQL does not start: {cluster.last_words()}")


def _patiently(cluster: Cluster, starter: subprocess.Popen[str]) -> int:
    """Wait for pg_ctl, telling what PostgreSQL does meanwhile: recovery may take its time."""
    while True:
        try:
            return starter.wait(timeout=5)
        except subprocess.TimeoutExpired:
            cluster.say(f"waiting for PostgreSQL: {cluster.last_words()}")


def _create(cluster: Cluster, lock: int) -> None:
    fresh = cluster.home / "data.new"
    if fresh.exists():
        shutil.rmtree(fresh)
    cluster.say(f"creating a PostgreSQL cluster in {cluster.data}")
    locale = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
    code, said = cluster.account.run(
        *(cluster.programs / "initdb", "-D", cluster.account.own(fresh), "-U", "postgres", "-A", "trust"),
        *(*locale, "--no-instructions"),
        # Inherited so that nobody removes the folder under an initdb that outlives us.
        keep=(lock,),
    )
    if code:
        raise StoreUnavailable(f"{fresh}: initdb failed: {' '.join(said.splitlines()[-3:])}")
    _make_database(cluster, fresh, lock)
    fresh.rename(cluster.data)
    sync_folder(cluster.home)


def heal(cluster: Cluster, headless: float) -> None:
    """Help what lives but takes no connections, or will not by itself. Repeated until it does or is gone.

    Backends of a killed postmaster end at their next look; one that computes does not look, and holds up everything.
    With no postmaster left SIGQUIT, and later SIGKILL, lose nothing that was committed.
    """
    master = cluster.postmaster()
    if master is not None:
        if cluster.ready() and not (cluster.sockets / _SOCKET).exists():
            cluster.say("PostgreSQL has lost its socket; restarting it")
            stop(cluster)
    elif headless > ORPHAN_EXIT_SECONDS:
        for process in filter(cluster.occupied_by, psutil.process_iter()):
            with suppress(psutil.Error):
                process.send_signal(signal.SIGQUIT if headless < 2 * ORPHAN_EXIT_SECONDS else signal.SIGKILL)


def stop(cluster: Cluster) -> None:
    """Stop the postmaster and wait for its end. Signals go to a process that was looked at, never to a bare pid."""
    master = cluster.postmaster()
    if master is None:
        return
    for sign, patience in _STOPPING:
        with suppress(psutil.NoSuchProcess):
            master.send_signal(sign)
        deadline = time.monotonic() + patience
        while cluster.occupied_by(master):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        else:
            return
    raise StoreUnavailable(f"PostgreSQL (pid {master.pid}) does not end, not even killed: {cluster.last_words()}")


def _make_database(cluster: Cluster, fresh: Path, lock: int) -> None:
    """In single-user mode, so before anybody can use the cluster; what it writes is synced by its last checkpoint."""
    single = ("--single", "-D", str(fresh), "-c", "dynamic_shared_memory_type=mmap", "-c", "log_min_messages=warning")
    with tempfile.TemporaryFile() as statement:
        statement.write(f"CREATE DATABASE {DATABASE}\n".encode())
        statement.seek(0)
        code, said = cluster.account.run(
            cluster.programs / "postgres", *single, "postgres", keep=(lock,), source=statement.fileno()
        )
    # An error of a statement does not end this mode, and is only printed.
    if code or "ERROR" in said or "FATAL" in said:
        raise StoreUnavailable(f"{fresh}: the database was not made: {' '.join(said.splitlines()[-3:])}")


def check_database(cluster: Cluster) -> None:
    """Check that our database is there.

    Raises:
        SettingsError: it was dropped.
    """
    sql = f"SELECT 1 FROM pg_database WHERE datname = '{DATABASE}'"  # noqa: S608 - a constant of ours
    code, said = cluster.client("psql", "-XAtqc", sql)
    if code:
        raise StoreUnavailable(f"PostgreSQL answers {said!r}: {cluster.last_words()}")
    if not said:
        raise _lost(cluster)


def _lost(cluster: Cluster) -> SettingsError:
    return SettingsError(
        f"the database {DATABASE} is gone from {cluster.data}, and an empty log must not take its place: restore a "
        f"backup (into a database {DATABASE} at the socket in {cluster.sockets}, or the whole folder while nothing "
        "runs), or remove the state directory to begin with an empty one"
    )
