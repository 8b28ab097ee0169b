"""Keys of the installation: random, made once, wrapped by the master key.

========== ==================================================================
`digest`   digests of env values, fingerprints of requests, digests of API keys
`token`    tokens of agents and sidecars
`link`     signed links
`audit`    signatures of seals and receipts
========== ==================================================================

A rotation of the master key wraps them again and changes none of them, so digests, fingerprints and tokens stay as they
are. Two servers that start at once make one set: the insert that comes second finds the first one's rows.
"""

from __future__ import annotations

import os
from typing import Final

from msgspec import Struct
from sqlalchemy import LargeBinary, Text, bindparam, select, update
from sqlalchemy.dialects.postgresql import insert

from app.errors import SettingsError
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import installation_keys
from app.store.vault.seal import MasterKeys, Unsealable

NAMES: Final = ("digest", "token", "link", "audit")
_KEY_BYTES = 32
_K = installation_keys.c
_MAKE = Statement(
    insert(installation_keys)
    .values(
        name=bindparam("name", type_=Text),
        key_id=bindparam("key_id", type_=Text),
        wrapped=bindparam("wrapped", type_=LargeBinary),
    )
    .on_conflict_do_nothing(index_elements=[_K.name])
)
_READ = Statement(select(_K.name, _K.key_id, _K.wrapped))
_REWRAP = Statement(
    update(installation_keys)
    .where(_K.name == bindparam("of", type_=Text), _K.key_id == bindparam("old", type_=Text))
    .values(key_id=bindparam("key_id", type_=Text), wrapped=bindparam("wrapped", type_=LargeBinary))
    .returning(_K.name)
)


class InstallationKeys(Struct, frozen=True):
    """The keys in the clear. Never printed."""

    digest: bytes
    token: bytes
    link: bytes
    audit: bytes

    def __repr__(self) -> str:
        """Keep the keys out of logs and tracebacks."""
        return "InstallationKeys(***)"


def _bound(name: str) -> bytes:
    return b"installation-key/" + name.encode()


async def open_keys(database: Database, master: MasterKeys, key_id: str) -> InstallationKeys:
    """Read the keys; make those that are missing, wrapped by this master key.

    Raises:
        SettingsError: this server lacks the master key that wraps one of them.
    """
    rows = {row["name"]: row for row in await database.fetch(_READ)}
    if missing := [name for name in NAMES if name not in rows]:
        for name in missing:
            wrapped = master.wrap(key_id, os.urandom(_KEY_BYTES), _bound(name))
            await database.fetch(_MAKE, name=name, key_id=key_id, wrapped=wrapped)
        rows = {row["name"]: row for row in await database.fetch(_READ)}
    try:
        clear = {name: master.unwrap(rows[name]["key_id"], rows[name]["wrapped"], _bound(name)) for name in NAMES}
    except Unsealable as error:
        raise SettingsError(
            f"the keys of this installation do not open: {error}; give every server the same master key, in "
            "SANDLEDGER_MASTER_KEY or [sandledger] master_key_file"
        ) from None
    return InstallationKeys(**clear)


async def other_master_keys(database: Database, key_id: str) -> list[str]:
    """The master keys that wrap keys of the installation, one entry a key, without this one."""
    return [row["key_id"] for row in await database.fetch(_READ) if row["key_id"] != key_id]


async def rewrap_keys(database: Database, master: MasterKeys, key_id: str) -> int:
    """Wrap each key by this master key. Says how many were wrapped by another one."""
    done = 0
    for row in await database.fetch(_READ):
        if row["key_id"] == key_id:
            continue
        clear = master.unwrap(row["key_id"], row["wrapped"], _bound(row["name"]))
        wrapped = master.wrap(key_id, clear, _bound(row["name"]))
        done += len(await database.fetch(_REWRAP, of=row["name"], old=row["key_id"], key_id=key_id, wrapped=wrapped))
    return done
