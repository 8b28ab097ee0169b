"""Where the master key comes from: the environment, a configured file, or a file made once beside the state."""

from __future__ import annotations

import os
from pathlib import Path

from app.errors import SettingsError
from app.store.vault.seal import decode_master_key, generate_master_key


def master_key(from_environment: bytes | None, configured: Path | None, state_dir: Path) -> tuple[bytes, str]:
    """The key, and where it was found. Blocking.

    Raises:
        SettingsError: the file cannot be read or holds something else.
    """
    if from_environment is not None:
        return from_environment, "SANDLEDGER_MASTER_KEY"
    if configured is not None:
        return _read(configured), str(configured)
    path = state_dir / "master.key"
    _make(path)
    return _read(path), str(path)


def _make(path: Path) -> None:
    """Write a new key unless there is one. A reader sees a whole file or none: written aside, then linked in place.

    The folder is synced before anybody uses the key: else a power cut could keep what was sealed and lose the key.
    """
    if path.exists():
        _sync(path.parent)  # whoever linked it may not have come to that yet
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(handle, generate_master_key().encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        path.hardlink_to(aside)
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


def _read(path: Path) -> bytes:
    try:
        return decode_master_key(path.read_text("utf-8"), str(path))
    except OSError as error:
        raise SettingsError(
            f"{path}: the master key cannot be read: {error.strerror}; correct sandledger.master_key_file or the file"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: the master key is not text; it has to be 32 bytes in base64") from error
