"""When bytes of a sandbox's traffic last moved through a proxy, and how many.

Processes add to a row and never write over it, so any number of them may carry the traffic of one sandbox. The tenant
is the owner's, taken from the head row in the same statement: whoever sends the traffic need not be the owner. A mark
for a sandbox that does not exist adds nothing.

The time is the database's clock less the age of the mark, so clocks of servers do not matter, and a mark that waited
for a database that was away still has its own time.

**How it fails.** When a connection is lost after the statement and before its answer, nobody knows whether it was done.
It is done again: a request that counts twice is better than a sandbox in use that seems idle.

A row stays as long as its sandbox's head row, which is for ever. It has about a hundred bytes and is written at most
once in a few seconds by each process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final
from uuid import UUID

from msgspec import Struct
from sqlalchemy import BigInteger, Double, Uuid, bindparam, column, func, select
from sqlalchemy.dialects.postgresql import ARRAY, insert

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.database.times import SECOND
from app.store.tables import activity, sandboxes

MOST_AT_ONCE: Final = 5000
"""Rows of one statement, so that it ends well within the time that a statement has."""
_A = activity.c
_NOW = func.clock_timestamp()


class Marks(Struct):
    """What moved since it was last written."""

    at: float = 0.0
    """When bytes moved last, by a clock of the process."""
    requests: int = 0
    bytes_in: int = 0
    """To the sandbox: bodies, and what goes over a WebSocket."""
    bytes_out: int = 0
    """From the sandbox."""


def _add() -> Statement:
    given = (
        func.unnest(
            bindparam("ids", type_=ARRAY(Uuid)),
            bindparam("ages", type_=ARRAY(Double)),
            bindparam("requests", type_=ARRAY(BigInteger)),
            bindparam("bytes_in", type_=ARRAY(BigInteger)),
            bindparam("bytes_out", type_=ARRAY(BigInteger)),
        )
        .table_valued(
            column("id", Uuid),
            column("age", Double),
            column("requests", BigInteger),
            column("bytes_in", BigInteger),
            column("bytes_out", BigInteger),
        )
        .render_derived(name="given")
    )
    new = given.c
    rows = insert(activity).from_select(
        ["sandbox_id", "tenant", "last_at", "requests", "bytes_in", "bytes_out"],
        select(new.id, sandboxes.c.tenant, _NOW - new.age * SECOND, new.requests, new.bytes_in, new.bytes_out)
        .join_from(given, sandboxes, sandboxes.c.id == new.id)
        # In the order of their keys, as every statement that waits for several rows.
        .order_by(new.id),
    )
    counts = ("requests", "bytes_in", "bytes_out")
    return Statement(
        rows.on_conflict_do_update(
            index_elements=[_A.sandbox_id],
            set_={
                "last_at": func.greatest(_A.last_at, rows.excluded.last_at),
                **{name: _A[name] + rows.excluded[name] for name in counts},
            },
        )
    )


_ADD = _add()


async def add_activity(database: Database, marks: Mapping[UUID, Marks], clock: Callable[[], float]) -> None:
    """Add these, `MOST_AT_ONCE` at most, in one statement. `clock` is that of the marks.

    Raises:
        StoreUnavailable: they were not added, or nobody knows.
    """
    given = list(marks.values())
    async with database.connection() as connection:
        now = clock()  # a connection may have to be waited for
        await connection.fetch(
            _ADD,
            ids=list(marks),
            ages=[now - each.at for each in given],
            requests=[each.requests for each in given],
            bytes_in=[each.bytes_in for each in given],
            bytes_out=[each.bytes_out for each in given],
        )
