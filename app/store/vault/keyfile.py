"""Where the master keys come from: the environment, a configured file, or a file made once beside the state.

A file holds one key a line, in base64. The first is the one to use; the others only open what they sealed. A
process that changes the file locks its folder, so that of two new keys none is lost: a lost key may be in use already.

Only the start of a server makes the file, and only for a database that no master key seals yet. Every other reader gets
`NoKeyFile`: a key that was made where the right one is missing would hide that it is missing.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.errors import SettingsError
from app.store.durable import sync_folder
from app.store.vault.seal import MasterKeys, decode_master_key, generate_master_key


class NoKeyFile(SettingsError):
    """There is no key file, and no key in the environment."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: there is no such file; it holds the master key. sandledger.master_key_file names another place, "
            "SANDLEDGER_MASTER_KEY gives the key itself"
        )
        self.path = path

    def wanted(self, key_id: str) -> SettingsError:
        """What to do when this key seals the database."""
        return SettingsError(
            f"this database is sealed by master key {key_id}, which is not here. Bring that key back: {self}"
        )


def key_file(configured: Path | None, state_dir: Path) -> Path:
    """Where the key file is: the configured one, else one beside the state."""
    return configured or state_dir / "master.key"


def master_keys(
    from_environment: bytes | None,
    previous: bytes | None,
    configured: Path | None,
    state_dir: Path,
    *,
    make: bool = False,
) -> tuple[MasterKeys, str]:
    """The keys, and where they were found. Blocking. `make` makes the file beside the state when there is none.

    Raises:
        NoKeyFile: there is no file.
        SettingsError: the file cannot be read or holds something else.
    """
    others = () if previous is None else (previous,)
    if from_environment is not None:
        return MasterKeys(from_environment, *others), "SANDLEDGER_MASTER_KEY"
    path = key_file(configured, state_dir)
    if make and configured is None:
        _make(path)
    return MasterKeys(*_read(path), *others), str(path)


def prepend_new_key(path: Path, *, before: str) -> bool:
    """Put a new key before the others in the file. A reader sees the old file or the new one. Blocking.

    `before` is the id of the key that has to be the first. False = another one is by now: somebody has put a new key
    there meanwhile, and a second one would only make more work. The file keeps its owner: the server that reads it may
    run as another account than the operator.

    Raises:
        SettingsError: the file cannot be replaced, e.g. because it is mounted.
    """
    path = path.resolve()
    aside = _aside(path)
    try:
        with _locked_folder(path.parent) as folder:
            if MasterKeys(*_read(path)).ids[0] != before:
                return False
            found = path.stat()
            _write(aside, f"{generate_master_key()}\n{path.read_text('utf-8')}")
            if os.geteuid() == 0:
                os.chown(aside, found.st_uid, found.st_gid)
            aside.replace(path)
            os.fsync(folder)
            return True
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise SettingsError(
            f"{path}: a new key cannot be put into the file: {error.strerror}; write it as the first line yourself"
        ) from error


def _make(path: Path) -> None:
    """Write a new key unless there is one. A reader sees a whole file or none: written aside, then linked in place.

    The folder is synced before anybody uses the key: else a power cut could keep what was sealed and lose the key.
    """
    if path.exists():
        sync_folder(path.parent)  # the process that linked it may not have synced the folder yet
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    _write(aside, f"{generate_master_key()}\n")
    try:
        path.hardlink_to(aside)
    except FileExistsError:
        pass  # another server was quicker; its key is the key
    finally:
        aside.unlink()
    sync_folder(path.parent)


def _aside(path: Path) -> Path:
    """A name of its own. Not by process id: two containers with one volume both are process 1, and the second would
    write its key into the file that the first one has linked already.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _write(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _locked_folder(folder: Path) -> Generator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _read(path: Path) -> list[bytes]:
    try:
        lines = path.read_text("utf-8").split()
        return [decode_master_key(line, str(path)) for line in lines or [""]]
    except FileNotFoundError:
        raise NoKeyFile(path) from None
    except OSError as error:
        raise SettingsError(
            f"{path}: the master key cannot be read: {error.strerror}; correct sandledger.master_key_file or the file"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: the master key is not text; it has to be 32 bytes in base64") from error
