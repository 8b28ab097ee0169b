"""Process logs: one line a record, to standard output or to rotated files."""

from __future__ import annotations

import logging
import logging.handlers
import sys
import time
from pathlib import Path
from typing import Any

from app.domain.text import printable
from app.settings import LogSettings

_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s"


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


class _OneLine(logging.Formatter):
    """Escapes control characters: messages repeat what engines and images say. Only a traceback has lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - theirs
        """The line."""
        record.message = printable(record.message)
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
    return handler
