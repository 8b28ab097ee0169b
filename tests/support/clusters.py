"""The PostgreSQL servers of one test run: one for each process that runs tests, all below one folder.

**Why one per process.** pytest-xdist runs tests in several processes. On one shared server they would meet: in
`pg_locks` and `pg_stat_activity`, in the lock that orders all commits with NOTIFY of a cluster, in `max_connections`,
and in a crash. A test that waits until "somebody waits for a lock" would then see the wait of another test and go on
too early. A server of its own costs about two seconds of CPU and keeps every such check exact.

**Protocol.** The first process, which starts the others, makes the folder (`make_folder`) and removes it at the end
(`end`). Each process keeps its server in the subfolder of its own name (`home`), and stops it when its tests are done.

**Where.** In memory, where that has room: each test copies a database, which is 300 files. On a disk the copy costs 120
to 180 ms of CPU time (ext4), and in memory 30 ms, so that it was a third of the suite.

**Failure.** A process that dies leaves its server running. `end` stops what still runs below the folder. If the first
process is killed, the servers of the others end with them, and the folder stays where it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import psutil

PREFIX = "sandledger-test-"
MEMORY = Path("/dev/shm")
ROOM_BYTES = 4 << 30
"""More than the servers of eight processes need."""
STOP_SECONDS = 20.0
"""How long each signal may take to end the servers that are left."""


def make_folder() -> Path:
    """A new folder for the servers of one run."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_in_memory()))
    folder.chmod(0o711)  # PostgreSQL runs as an account of its own and must be able to pass through
    return folder


def _in_memory() -> Path | None:
    """A file system in memory with room for all servers. None = there is none."""
    if not os.access(MEMORY, os.W_OK) or shutil.disk_usage(MEMORY).free < ROOM_BYTES:
        return None
    return MEMORY if psutil.virtual_memory().available > 2 * ROOM_BYTES else None


def home(folder: Path, name: str) -> Path:
    """Where the process of this name keeps its server."""
    made = folder / name
    made.mkdir(mode=0o711)
    made.chmod(0o711)
    return made


def running(folder: Path) -> list[psutil.Process]:
    """The PostgreSQL processes at work below the folder. A zombie works nowhere."""
    found = psutil.process_iter(["cwd"])
    return [process for process in found if Path(process.info["cwd"] or "/").is_relative_to(folder)]


def end(folder: Path) -> None:
    """Stop what still runs, then remove the folder."""
    # SIGQUIT first: PostgreSQL then releases its shared memory.
    for number in (signal.SIGQUIT, signal.SIGKILL):
        left = running(folder)
        for process in left:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        if not psutil.wait_procs(left, STOP_SECONDS)[1]:
            break
    shutil.rmtree(folder, ignore_errors=True)
