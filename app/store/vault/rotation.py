"""Rotation of the master key: every data key is wrapped again, online and resumable.

**Protocol.** Every server gets the new key as its first and the old one as its previous key, and is restarted; they go
on sealing by the key that `installation.master_key_id` names. Then `rotate`:

1. `installation.master_key_id` becomes the new key. Each server asks for it every few seconds (`follow_master_key`).
2. Rows that another key wrapped are wrapped again, in batches by stream id. A row is changed only while the old key
   still wraps it, so a row that was erased or wrapped meanwhile is passed over.
3. The passes go on until one finds nothing. A server that has not yet noticed the new key may have sealed a row by the
   old one meanwhile; therefore the last pass comes after every server has had time to notice.

Only wrapped keys change; sealed values, digests and tokens stay as they are.

**How it fails.** A kill at any point leaves rows of both keys, which every server opens; `rotate` again goes on. The
old key may be destroyed when `remaining` says 0 after the rotation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from uuid import UUID

from msgspec import Struct
from sqlalchemy import Integer, LargeBinary, Text, Uuid, bindparam, func, select, update
from sqlalchemy.dialects.postgresql import ARRAY

from app.errors import SettingsError, StoreUnavailable
from app.store.database.installation import read_installation, switch_master_key
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import sealed_values
from app.store.vault.keys import rewrap_keys
from app.store.vault.seal import MasterKeys, Sealer

NOTICE_SECONDS = 5.0
"""How often a server asks which master key is in use."""
BATCH_ROWS = 500
_LOG = logging.getLogger(__name__)
_V = sealed_values.c
_BATCH = Statement(
    select(_V.stream_id, _V.key_id, _V.wrapped_key)
    .where(_V.key_id != bindparam("key_id", type_=Text))
    .order_by(_V.stream_id)
    .limit(bindparam("limit", type_=Integer))
)
_REMAINING = Statement(
    select(func.count()).select_from(sealed_values).where(_V.key_id != bindparam("key_id", type_=Text))
)


def _rewrap() -> Statement:
    rows = (
        func.unnest(
            bindparam("ids", type_=ARRAY(Uuid)),
            bindparam("olds", type_=ARRAY(Text)),
            bindparam("wrapped", type_=ARRAY(LargeBinary)),
        )
        .table_valued("id", "old", "wrapped")
        .render_derived(name="rewrapped")
    )
    return Statement(
        update(sealed_values)
        .where(_V.stream_id == rows.c.id, _V.key_id == rows.c.old)
        .values(key_id=bindparam("key_id", type_=Text), wrapped_key=rows.c.wrapped)
        .returning(_V.stream_id)
    )


_REWRAP = _rewrap()


class Rotated(Struct, frozen=True):
    """What a rotation did. `rewrapped` counts data keys and keys of the installation."""

    old_key_id: str
    new_key_id: str
    rewrapped: int


async def remaining(database: Database, key_id: str) -> int:
    """How many data keys another master key still wraps."""
    row = await database.fetch_one(_REMAINING, key_id=key_id)
    assert row is not None, "a count has one row"
    return row[0]


async def rotate(database: Database, master: MasterKeys, report: Callable[[int], None]) -> Rotated:
    """Make the first of these keys the one in use, and wrap everything by it. `report` gets the count so far.

    Raises:
        SettingsError: the key in use now is not among them.
    """
    new = master.ids[0]
    old = (await read_installation(database)).master_key_id or new
    if old not in master.ids:
        raise SettingsError(
            f"the database is sealed by master key {old}, which is not here; set it as SANDLEDGER_PREVIOUS_MASTER_KEY"
        )
    await switch_master_key(database, old, new)
    sealer = Sealer(master, key_id=new)
    done = await rewrap_keys(database, master, new)
    for last in (False, True):
        if last and old != new:
            await asyncio.sleep(2 * NOTICE_SECONDS)
        while rows := await database.fetch(_BATCH, key_id=new, limit=BATCH_ROWS):
            ids = [UUID(int=row["stream_id"].int) for row in rows]
            olds = [row["key_id"] for row in rows]
            wrapped = [
                sealer.rewrap(stream_id, row["key_id"], row["wrapped_key"])
                for stream_id, row in zip(ids, rows, strict=True)
            ]
            done += len(await database.fetch(_REWRAP, ids=ids, olds=olds, wrapped=wrapped, key_id=new))
            report(done)
    return Rotated(old, new, done)


async def follow_master_key(database: Database, sealer: Sealer) -> None:
    """Ask every few seconds which master key is in use, for as long as the server runs."""
    while True:
        await asyncio.sleep(NOTICE_SECONDS)
        try:
            found = (await read_installation(database)).master_key_id
            if found is not None and found != sealer.key_id:
                sealer.use(found)
                _LOG.warning("the master key in use is now %s", found)
        except StoreUnavailable:
            continue
        except SettingsError as error:
            _LOG.error("%s; what this server seals cannot be read once the old key is destroyed", error)
