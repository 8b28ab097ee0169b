"""Rotation of the master key: every data key is wrapped again, online and resumable.

**Protocol.** Every server gets the new key as its first and the old one as its previous key: in its key file, which it
reads again when it meets a key that it does not have, or in its environment, by a restart. They go on sealing by the
key that `installation.master_key_id` names. Then `rotate`:

1. `installation.master_key_id` becomes the new key. Each server asks for it every few seconds (`follow_master_key`) and
   seals by it from then on.
2. Rows that another key wrapped are wrapped again, in batches by stream id. A row is changed only while the old key
   still wraps it, so a row that was erased or wrapped meanwhile is passed over.
3. After every server has had time to notice, the rotation is recorded (`record`), and then the keys of the installation
   are wrapped again. A trigger accepts a
   sealed row only by a master key that is in use: the one of step 1, or one that still wraps a key of the installation.
   So from here on no server seals by the old key. One that has not noticed is refused, asks which key is in use, and
   seals once more by that one (`notice_master_key`); a server that cannot get the new key answers 503.
4. Each insert of a sealed row holds a shared advisory lock to its end. Taking it exclusively once waits for those that
   were checked before step 3. What the last pass does not see after that cannot come any more.

Only wrapped keys change; sealed values, digests and tokens stay as they are.

**How it fails.** A kill at any point leaves rows of both keys, which every server opens; `rotate` again goes on. Two
rotations to one key share the work. Of two rotations to different keys one stops when it finds that the other one's key
is in use. The old key may be destroyed when `remaining` says 0 after the rotation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias
from uuid import UUID

import asyncpg
from msgspec import Struct
from msgspec.structs import replace
from sqlalchemy import (
    Integer,
    LargeBinary,
    Text,
    Uuid,
    bindparam,
    column,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.errors import SettingsError, StoreUnavailable
from app.store.database.installation import read_installation, switch_master_key
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import installation_keys, sealed_values
from app.store.vault.keys import other_master_keys, rewrap_keys
from app.store.vault.seal import MasterKeys, Sealer

NOTICE_SECONDS = 5.0
"""How often a server asks which master key is in use."""
BATCH_ROWS = 500
_DRAIN = Statement(select(func.pg_advisory_xact_lock(literal(0x534C, Integer), literal(1, Integer))))
_LOG = logging.getLogger(__name__)
_V = sealed_values.c
_BATCH = Statement(
    select(_V.stream_id, _V.key_id, _V.wrapped_key)
    .where(_V.stream_id > bindparam("after", type_=Uuid), _V.key_id != bindparam("key_id", type_=Text))
    .order_by(_V.stream_id)
    .limit(bindparam("limit", type_=Integer))
)
_REMAINING = Statement(
    select(func.count()).select_from(sealed_values).where(_V.key_id != bindparam("key_id", type_=Text))
)
_WRAPS = Statement(
    select(
        or_(
            exists().where(_V.key_id == bindparam("key_id", type_=Text)),
            exists().where(installation_keys.c.key_id == bindparam("key_id", type_=Text)),
        )
    )
)


def _rewrap() -> Statement:
    rows = (
        func.unnest(
            bindparam("ids", type_=ARRAY(Uuid)),
            bindparam("olds", type_=ARRAY(Text)),
            bindparam("wrapped", type_=ARRAY(LargeBinary)),
        )
        .table_valued(column("id", Uuid), column("old", Text), column("wrapped", LargeBinary))
        .render_derived(name="rewrapped")
    )
    # Locked in the order of ids: two rotations at once would lock each other out otherwise.
    locked = (
        select(_V.stream_id, rows.c.wrapped)
        .where(_V.stream_id == rows.c.id, _V.key_id == rows.c.old)
        .order_by(_V.stream_id)
        .with_for_update(of=sealed_values)
        .cte("locked")
    )
    return Statement(
        update(sealed_values)
        .where(_V.stream_id == locked.c.stream_id)
        .values(key_id=bindparam("key_id", type_=Text), wrapped_key=locked.c.wrapped)
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


Record: TypeAlias = Callable[[Rotated], Awaitable[None]]


async def rotate(
    database: Database,
    master: MasterKeys,
    report: Callable[[int], None],
    record: Record,
    *,
    notice: float = NOTICE_SECONDS,
) -> Rotated:
    """Make the first of these keys the one in use, and wrap everything by it. `report` gets the count so far.

    `record` is called before the old key goes out of use, so that a kill can record a rotation twice, never not at all.
    It is called once for each old key: a rotation that began before another one had ended takes several out of use.
    The answer names the last of them, and counts all. Servers get twice `notice` seconds to seal by the new key.

    Raises:
        SettingsError: the key in use now is not among them, or another rotation makes another key the one in use.
    """
    new = master.ids[0]
    in_use = (await read_installation(database)).master_key_id or new
    if in_use not in master.ids:
        raise SettingsError(
            f"the database is sealed by master key {in_use}, which is not here; set it as "
            "SANDLEDGER_PREVIOUS_MASTER_KEY"
        )
    others = await other_master_keys(database, new)
    if in_use not in (new, *others):
        # The rotation that brought it into use was killed before it wrapped a key of the installation by it. After the
        # switch nothing says that it was in use.
        await record(Rotated(in_use, new, 0))
    await switch_master_key(database, in_use, new)
    await _check_in_use(database, new)
    sealer = Sealer(master, key_id=new)
    done = Rotated(in_use, new, await _pass(database, sealer, report, 0))
    # Also when the switch was done before: nobody knows how long ago an interrupted rotation did it.
    if others := await other_master_keys(database, new):
        await asyncio.sleep(2 * notice)
        await _check_in_use(database, new)
        done = await _record_each(record, done, others)
        await rewrap_keys(database, master, new)
    await database.fetch(_DRAIN)
    return replace(done, rewrapped=await _pass(database, sealer, report, done.rewrapped))


async def _record_each(record: Record, done: Rotated, others: list[str]) -> Rotated:
    """Record each of these old keys, one entry a key of the installation that it wraps. Data keys were wrapped in one
    pass, so the first event counts all of them.
    """
    rewrapped = done.rewrapped
    for old in dict.fromkeys(others):
        done = Rotated(old, done.new_key_id, rewrapped + others.count(old))
        await record(done)
        rewrapped = 0
    return done


async def is_due(database: Database, key_id: str) -> bool:
    """Whether anything is not wrapped by this master key, or another one is in use."""
    in_use = (await read_installation(database)).master_key_id
    if in_use not in (None, key_id):
        return True
    return bool(await other_master_keys(database, key_id)) or bool(await remaining(database, key_id))


async def wraps_anything(database: Database, key_id: str) -> bool:
    """Whether this master key wraps any data key or any key of the installation."""
    row = await database.fetch_one(_WRAPS, key_id=key_id)
    assert row is not None, "a select of two conditions has one row"
    return row[0]


async def _check_in_use(database: Database, key_id: str) -> None:
    found = (await read_installation(database)).master_key_id
    if found not in (None, key_id):
        raise SettingsError(
            f"another rotation has made {found} the master key in use; put that key first here, or wait for its end"
        )


async def _pass(database: Database, sealer: Sealer, report: Callable[[int], None], done: int) -> int:
    """Wrap again whatever another key wraps, in the order of ids. Says how many it is by now."""
    after = UUID(int=0)
    while rows := await database.fetch(_BATCH, key_id=sealer.key_id, after=after, limit=BATCH_ROWS):
        ids = [UUID(int=row["stream_id"].int) for row in rows]
        olds = [row["key_id"] for row in rows]
        wrapped = [
            sealer.rewrap(stream_id, row["key_id"], row["wrapped_key"])
            for stream_id, row in zip(ids, rows, strict=True)
        ]
        done += len(await database.fetch(_REWRAP, ids=ids, olds=olds, wrapped=wrapped, key_id=sealer.key_id))
        after = ids[-1]
        report(done)
        await _check_in_use(database, sealer.key_id)
    return done


async def notice_master_key(database: Database, sealer: Sealer) -> None:
    """Seal by the master key that is in use now. One that is not here is looked for where the keys came from.

    Raises:
        SettingsError: it is not there either.
    """
    found = (await read_installation(database)).master_key_id
    if found is None or found == sealer.key_id:
        return
    await sealer.learn(found)
    if found != sealer.key_id:
        sealer.use(found)
        _LOG.warning("the master key in use is now %s", found)


async def follow_master_key(database: Database, sealer: Sealer, *, every: float = NOTICE_SECONDS) -> None:
    """Ask every few seconds which master key is in use, for as long as the server runs."""
    while True:
        await asyncio.sleep(every)
        try:
            await notice_master_key(database, sealer)
        except (StoreUnavailable, asyncpg.PostgresError) as error:
            # Nothing that PostgreSQL says here is a reason to end the server.
            _LOG.info("which master key is in use is not known now: %s", type(error).__name__)
        except SettingsError as error:
            _LOG.error("%s; creates with values to seal are answered 503 here when the rotation has ended", error)
