"""Process logs: one line a record, to standard output or to rotated files.

While a database or an engine is away, every part that needs it says so each time that it tries. So warnings that repeat
are held back: one of a kind is shown every `REPEAT_SECONDS`, with the number of those that were not.
"""

from __future__ import annotations

import logging
import logging.handlers
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

from app.api.errors import SHOW_EACH
from app.domain.text import printable
from app.settings import LogSettings

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s"
REPEAT_SECONDS: Final = 30.0
"""A warning like one that was shown less than this ago is held back."""
MAX_KINDS: Final = 1000
"""How many kinds of warnings are remembered; beyond that the one that was shown longest ago is forgotten."""
_HELD: Final = "held_back"
_Kind: TypeAlias = tuple[str, int, str, type[BaseException] | None]


def configure(settings: LogSettings) -> None:
    """Set up the root logger. Libraries that print requests or parameters stay at WARNING."""
    formatter = _OneLine(_FORMAT, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    root = logging.getLogger()
    root.setLevel(settings.level.value)
    root.handlers = [_handler(settings, settings.file_path, formatter)]
    for name in ("sqlalchemy", "apscheduler", "alembic", "aiohttp", "asyncio", "litestar"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    access = logging.getLogger("uvicorn.access")
    access.setLevel(logging.INFO)
    if settings.file_enabled:
        access.handlers = [_handler(settings, settings.access_file_path, formatter)]
        access.propagate = False


class Repeats(logging.Filter):
    """Holds back a warning or an error of the same kind as one that was shown shortly before.

    The kind is the logger, the level, the template (the text before its values are put in) and the type of the
    exception. The next of its kind that is shown says how many were held back. A record with the attribute `SHOW_EACH`
    is always shown: a client was told that the log has it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` in seconds."""
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()  # a handler asks its filters before it takes its own lock
        self._shown: OrderedDict[_Kind, tuple[float, int]] = OrderedDict()
        """When each kind was shown last, and how many were held back since; the one of longest ago first."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show it."""
        if record.levelno < logging.WARNING or getattr(record, SHOW_EACH, False):
            return True
        kind = (record.name, record.levelno, str(record.msg), record.exc_info[0] if record.exc_info else None)
        with self._lock:
            now = self._clock()
            at, held = self._shown.get(kind, (None, 0))
            if at is not None and now - at < REPEAT_SECONDS:
                self._shown[kind] = (at, held + 1)
                return False
            self._shown[kind] = (now, 0)
            self._shown.move_to_end(kind)
            if len(self._shown) > MAX_KINDS:
                self._shown.popitem(last=False)
        setattr(record, _HELD, held)
        return True


class _OneLine(logging.Formatter):
    """Escapes control characters: messages repeat what engines and images say. Only a traceback has lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - theirs
        """The line."""
        record.message = printable(record.message)
        if held := getattr(record, _HELD, 0):
            record.message += f" ({held} like it were held back)"
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - theirs
        """The traceback, line by line."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def _handler(settings: LogSettings, path: Path, formatter: logging.Formatter) -> logging.Handler:
    handler: logging.Handler
    if settings.file_enabled:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=settings.file_max_bytes, backupCount=settings.file_backup_count, encoding="utf-8"
        )
    else:
        handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    handler.addFilter(Repeats())
    return handler
