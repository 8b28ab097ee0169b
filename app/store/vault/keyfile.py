"""Where the master keys come from: the environment, a configured file, or a file made once beside the state.

A file holds one key a line, in base64. The first is the one to use; the others only open what they sealed.
"""

from __future__ import annotations

import os
from pathlib import Path

from app.errors import SettingsError
from app.store.vault.seal import MasterKeys, decode_master_key, generate_master_key


def master_keys(
    from_environment: bytes | None, previous: bytes | None, configured: Path | None, state_dir: Path
) -> tuple[MasterKeys, str]:
    """The keys, and where they were found. Blocking.

    Raises:
        SettingsError: the file cannot be read or holds something else.
    """
    others = () if previous is None else (previous,)
    if from_environment is not None:
        return MasterKeys(from_environment, *others), "SANDLEDGER_MASTER_KEY"
    path = configured or state_dir / "master.key"
    if configured is None:
        _make(path)
    return MasterKeys(*_read(path), *others), str(path)


def prepend_new_key(path: Path) -> None:
    """Put a new key before the others in the file. A reader sees the old file or the new one. Blocking."""
    aside = _aside(path, f"{generate_master_key()}\n{path.read_text('utf-8')}")
    aside.replace(path)
    _sync_folder(path.parent)


def _make(path: Path) -> None:
    """Write a new key unless there is one. A reader sees a whole file or none: written aside, then linked in place.

    The folder is synced before anybody uses the key: else a power cut could keep what was sealed and lose the key.
    """
    if path.exists():
        _sync(path.parent)  # whoever linked it may not have come to that yet
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path, f"{generate_master_key()}\n")
    try:
        path.hardlink_to(aside)
        _sync_folder(path.parent)  # else a power cut could lose the key of what is sealed by then
    except FileExistsError:
        pass  # another server was quicker; its key is the key
    finally:
        aside.unlink()
    _sync(path.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(path: Path, text: str) -> Path:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(handle, text.encode())
        os.fsync(handle)
    finally:
        os.close(handle)
    return aside


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> list[bytes]:
    try:
        lines = path.read_text("utf-8").split()
        return [decode_master_key(line, str(path)) for line in lines or [""]]
    except OSError as error:
        raise SettingsError(
            f"{path}: the master key cannot be read: {error.strerror}; correct sandledger.master_key_file or the file"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: the master key is not text; it has to be 32 bytes in base64") from error
