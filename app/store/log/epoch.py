"""The epoch of the log, and the cursors that carry it.

A cursor says where a reader stands. After the database was restored from a backup, positions and versions beyond its
end are given out a second time, to other events; a reader that goes on from an old cursor would miss some of them and
not notice. So a cursor carries the epoch that it was given out in, and one of another epoch is refused. The reader then
begins again, and misses nothing.

`installation.epoch` is to rise with each restore that is followed. Nothing raises it yet: that comes with the event
`audit.log_restored`. Until then every cursor is of epoch 1, and a restore goes unnoticed.

The epoch is read in the statement that reads the page, or before it. Read after it, an old page could leave with a new
epoch.
"""

from __future__ import annotations

from sqlalchemy import select

from app.errors import CursorExpired
from app.store.tables import installation

EPOCH = select(installation.c.epoch).scalar_subquery()
"""The present epoch, as a column of any statement."""


def check_epoch(given: int, present: int) -> None:
    """Compare the epoch of a cursor with the log's.

    Raises:
        CursorExpired: they differ.
    """
    if given != present:
        raise CursorExpired(
            "SANDLEDGER::CURSOR_EXPIRED",
            "The cursor belongs to another epoch of the log, because the database was restored since. "
            f"The present epoch is {present}; begin again with the first page.",
        )
