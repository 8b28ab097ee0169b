"""Whether a connection keeps its session. Behind a pooler in transaction mode it does not.

Such a pooler gives each transaction whatever server connection is free. Statements that were prepared then fail at
random, and notifications and locks of a session are lost. All of this shows only later, under load, so a server looks
for it at its start:

1. One connection sets a value of its session, outside of a transaction. In transaction mode the pooler takes the server
   connection back.
2. Another one begins a transaction. The pooler gives it a free server connection: the one of step 1, or, when other
   clients keep the pooler busy, perhaps another one.
3. The first one reads its value. With a session of its own it always finds it. Without one it finds nothing, or the
   value of somebody else, unless the pooler happens to give it the same server connection again.

The last may happen by chance, so it is repeated. A refusal is always right. A pooler that is missed does the harm that
it would do without the check. It costs some ten round trips.
"""

from __future__ import annotations

import asyncio
import secrets
from typing import Final

from asyncpg import exceptions as pg
from sqlalchemy import Text, bindparam, func, select

from app.errors import StoreRefused
from app.store.database.pool import Connection, Database
from app.store.database.statement import Statement

ROUNDS: Final = 3
_NAME: Final = "sandledger.session"
_WITHIN_SECONDS: Final = 2.0
"""A pooler with one server connection has none for the third step; then nothing is concluded."""
_SET = Statement(select(func.set_config(_NAME, bindparam("word", type_=Text), False)))
_READ = Statement(select(func.current_setting(_NAME, True)))
_UNPREPARED = (pg.InvalidSQLStatementNameError, pg.DuplicatePreparedStatementError)
"""The driver prepares statements under names of its own, and nobody else closes them."""


async def check_session(database: Database) -> None:
    """Check that connections keep their sessions.

    Raises:
        StoreRefused: a pooler in transaction mode is in between.
    """
    try:
        async with database.connection() as one, database.reserved.connection() as other:
            async with asyncio.timeout(_WITHIN_SECONDS):
                kept = all([await _keeps(one, other) for _ in range(ROUNDS)])
    except _UNPREPARED:
        kept = False
    except TimeoutError:
        return
    if not kept:
        raise StoreRefused(
            "a pooler in front of PostgreSQL is in transaction mode: statements would fail at random, and "
            "notifications and locks of a session would be lost. Set pool_mode = session, or connect without it; "
            "README, Poolers, has the lines"
        )


async def _keeps(one: Connection, other: Connection) -> bool:
    word = secrets.token_hex(8)
    await one.fetch(_SET, word=word)
    async with other.all_or_none():
        await other.fetch(_READ)
        row = await one.fetch_one(_READ)
    return row is not None and row[0] == word
