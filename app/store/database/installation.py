"""Who we are: the one row of `installation`, made by the first migration."""

from __future__ import annotations

from uuid import UUID

from msgspec import Struct
from sqlalchemy import Text, bindparam, select, update

from app.errors import SettingsError
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import installation

_READ = Statement(select(installation.c.id, installation.c.master_key_id))
_CLAIM = Statement(
    update(installation)
    .where(installation.c.master_key_id.is_(None))
    .values(master_key_id=bindparam("key_id", type_=Text))
    .returning(installation.c.id)
)


class Installation(Struct, frozen=True):
    """The row."""

    id: UUID
    master_key_id: str | None


async def read_installation(database: Database) -> Installation:
    """The row as it stands."""
    row = await database.fetch_one(_READ)
    if row is None:
        raise SettingsError("the table installation is empty; restore it from a backup, it names what is ours")
    return Installation(UUID(int=row["id"].int), row["master_key_id"])


async def claim_master_key(database: Database, key_id: str) -> Installation:
    """Make this key the installation's, or find that it is.

    Raises:
        SettingsError: another key seals here; starting with this one would make every sealed value unreadable.
    """
    await database.fetch_one(_CLAIM, key_id=key_id)
    found = await read_installation(database)
    if found.master_key_id != key_id:
        raise SettingsError(
            f"this database is sealed by master key {found.master_key_id}, this server has {key_id}: give every server "
            "the same key, in SANDLEDGER_MASTER_KEY or [sandledger] master_key_file"
        )
    return found
