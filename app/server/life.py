"""A file that says that the worker is alive, for the supervisor of a process that serves no port.

While every loop of the worker goes round, the file's time moves every few seconds. A loop that stands still, and an
event loop that is blocked, both stop it. So a health check compares the file's time with the clock and needs nothing
of the process. A file of an earlier process is taken away at the start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

LIFE_SECONDS = 2.0
"""How often the file's time moves."""
_LOG = logging.getLogger(__name__)


def life_file(state_dir: Path) -> Path:
    """Where it is. Processes that share a state directory share it, so give each worker a directory of its own."""
    return state_dir / "worker.alive"


async def show_life(is_alive: Callable[[], bool], path: Path, *, every: float = LIFE_SECONDS) -> None:
    """Move the file's time for as long as this is true."""
    if not _do(path, _begin):
        return
    while True:
        if is_alive():
            _do(path, Path.touch)
        await asyncio.sleep(every)


def _begin(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)


def _do(path: Path, act: Callable[[Path], None]) -> bool:
    """On a local disk, so it takes no time worth a thread. A server works without the file."""
    try:
        act(path)
    except OSError as error:
        _LOG.warning("%s cannot be written, so a health check will fail: %s", path, error.strerror)
        return False
    return True
