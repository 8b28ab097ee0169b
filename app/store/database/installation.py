"""Who we are: the one row of `installation`, made by the first migration.

A database that was dropped and made again under a running server, or that another one was restored into, names another
installation. What the server holds in memory (the id that labels objects, the key of digests, what it knows of engines)
is then wrong, so it ends and is started again. A database or a schema that is only gone is waited for, like one that
does not answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from uuid import UUID

import asyncpg
from msgspec import Struct
from sqlalchemy import Text, bindparam, select, update

from app.errors import SettingsError, StoreRefused, StoreUnavailable
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import installation

WATCH_SECONDS = 5.0
"""How often a running server compares the installation."""
_LOG = logging.getLogger(__name__)
_READ = Statement(select(installation.c.id, installation.c.master_key_id))
_CLAIM = Statement(
    update(installation)
    .where(installation.c.master_key_id.is_(None))
    .values(master_key_id=bindparam("key_id", type_=Text))
    .returning(installation.c.id)
)


_SWITCH = Statement(
    update(installation)
    .where(installation.c.master_key_id == bindparam("old", type_=Text))
    .values(master_key_id=bindparam("new", type_=Text))
    .returning(installation.c.id)
)


class Installation(Struct, frozen=True):
    """The one row of the table `installation`."""

    id: UUID
    master_key_id: str | None


async def read_installation(database: Database) -> Installation:
    """Read the row.

    Raises:
        SettingsError: it is not there; without it no object on an engine can be told to be ours.
        StoreUnavailable: PostgreSQL does not answer, or lacks the schema.
    """
    row = await database.fetch_one(_READ)
    if row is None:
        raise SettingsError("the table installation is empty; restore it from a backup, it names what is ours")
    return Installation(UUID(int=row["id"].int), row["master_key_id"])


async def claim_master_key(database: Database, key_ids: Sequence[str]) -> Installation:
    """Make the first of these keys the installation's, or find which one is.

    Raises:
        SettingsError: another key seals here; starting without it would make every sealed value unreadable.
    """
    await database.fetch_one(_CLAIM, key_id=key_ids[0])
    found = await read_installation(database)
    if found.master_key_id not in key_ids:
        raise SettingsError(
            f"this database is sealed by master key {found.master_key_id}, this server has {', '.join(key_ids)}: give "
            "every server the same key, in SANDLEDGER_MASTER_KEY or [sandledger] master_key_file"
        )
    return found


async def switch_master_key(database: Database, old: str, new: str) -> None:
    """Name another master key as the one in use. Nothing happens when another server did so before."""
    await database.fetch(_SWITCH, old=old, new=new)


async def watch_installation(database: Database, ours: UUID, *, every: float = WATCH_SECONDS) -> None:
    """Compare the row with `ours` for as long as the server runs.

    Raises:
        SettingsError: it names another installation, or it is empty.
    """
    refused = False
    while True:
        await asyncio.sleep(every)
        try:
            found = (await read_installation(database)).id
        except StoreRefused as error:
            if not refused:
                _LOG.error("%s; requests are answered 503 until then", error)
            refused = True
        except (StoreUnavailable, asyncpg.PostgresError):
            pass  # the parts that need the database say so
        else:
            refused = False
            if found != ours:
                raise SettingsError(
                    f"the database was replaced under this server: it is installation {found} now and was {ours}. "
                    "Start the server again if that is right, else restore the right database"
                )
