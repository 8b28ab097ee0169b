"""Files and folders of the stand-in agent. A mode is a number whose decimal digits are the octal ones, as on the wire."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import stat
from collections.abc import Iterator

from commands import instant, lines_of

KINDS = ((stat.S_ISLNK, "symlink"), (stat.S_ISDIR, "directory"), (stat.S_ISREG, "file"))


def upload(content_type: str, body: bytes) -> None:
    """Pairs of parts: where a file belongs, and the file."""
    boundary = b"--" + content_type.partition("boundary=")[2].strip('"').encode()
    if boundary == b"--":
        raise ValueError("not a multipart body")
    metadata: dict = {}
    for part in (b"\r\n" + body).split(b"\r\n" + boundary)[1:-1]:
        head, _, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        if b'name="metadata"' in head:
            metadata = json.loads(content)
            continue
        os.makedirs(os.path.dirname(metadata["path"]) or "/", exist_ok=True)
        with open(metadata["path"], "wb") as file:
            file.write(content)
        set_permissions(metadata["path"], metadata)


def read(path: str, first_line: int | None, count: int | None) -> bytes:
    with open(path, "rb") as file:
        content = file.read()
    if first_line is None and count is None:
        return content
    return b"".join(content.splitlines(keepends=True)[(first_line or 1) - 1 :][:count])


def span(asked: str, size: int) -> tuple[int, int]:
    """First and last byte of a Range header. Raises ValueError for one that names no byte of the file."""
    unit, _, value = asked.partition("=")
    first, dash, last = value.partition("-")
    if unit != "bytes" or not dash or not (first or last):
        raise ValueError(f"not a range: {asked}")
    begin = int(first) if first else max(size - int(last), 0)
    end = min(size - 1, int(last)) if first and last else size - 1
    if begin > end:
        raise ValueError(f"the file has {size} bytes")
    return begin, end


def set_permissions(path: str, wanted: dict) -> None:
    """An owner or group that the sandbox does not know is left out."""
    if wanted.get("mode"):
        os.chmod(path, int(str(wanted["mode"]), 8))
    tables = (("owner", "/etc/passwd"), ("group", "/etc/group"))
    uid, gid = (_number(table, wanted.get(key) or "") for key, table in tables)
    if (uid, gid) != (-1, -1):
        os.chown(path, uid, gid)


def make_folder(path: str, wanted: dict) -> None:
    if not os.path.isdir(path):
        os.makedirs(path)
        set_permissions(path, {"mode": 755, **{key: value for key, value in wanted.items() if value}})


def remove_file(path: str) -> None:
    """One that is absent is removed."""
    if os.path.isdir(path) and not os.path.islink(path):
        raise IsADirectoryError(f"path is a directory: {path}")
    if os.path.lexists(path):
        os.unlink(path)


def remove_folder(path: str) -> None:
    if os.path.lexists(path):
        shutil.rmtree(path)


def move(source: str, target: str) -> None:
    os.lstat(source)
    os.makedirs(os.path.dirname(target) or "/", exist_ok=True)
    if os.path.lexists(target):
        raise FileExistsError(f"destination path already exists: {target}")
    shutil.move(source, target)


def replace(path: str, old: str, new: str) -> int:
    """How often."""
    if not old:
        raise ValueError("old content must not be empty")
    with open(path, newline="") as file:
        content = file.read()
    with open(path, "w", newline="") as file:
        file.write(content.replace(old, new))
    return content.count(old)


def search(folder: str, pattern: str) -> list[dict]:
    """Files below a folder whose name fits."""
    os.lstat(folder)
    found = (os.path.join(above, name) for above, _, names in os.walk(folder) for name in names)
    return [info(path) for path in sorted(found) if fnmatch.fnmatch(os.path.basename(path), pattern or "*")]


def entries(folder: str, depth: int) -> Iterator[dict]:
    """Those of a folder by name, each followed by its own. Links are not followed."""
    if os.path.islink(folder):
        raise ValueError(f"{folder} is a link")
    for name in sorted(os.listdir(folder)):
        shown = info(os.path.join(folder, name))
        yield shown
        if shown["type"] == "directory" and depth > 1:
            yield from entries(shown["path"], depth - 1)


def info(path: str) -> dict:
    shown = os.lstat(path)
    at = instant(shown.st_mtime)
    return {
        "path": path,
        "size": shown.st_size,
        "modified_at": at,
        "created_at": at,
        "mode": int(f"{shown.st_mode & 0o777:o}"),
        "type": next((kind for is_it, kind in KINDS if is_it(shown.st_mode)), "other"),
        "owner": _name("/etc/passwd", shown.st_uid),
        "group": _name("/etc/group", shown.st_gid),
    }


def _rows(table: str) -> list[list[str]]:
    return [row for line in lines_of(table) if len(row := line.split(":")) > 2]


def _name(table: str, number: int) -> str:
    return next((row[0] for row in _rows(table) if row[2] == str(number)), str(number))


def _number(table: str, name: str) -> int:
    return next((int(row[2]) for row in _rows(table) if row[0] == name), -1)
