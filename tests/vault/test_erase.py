"""The sealed row: bound to its sandbox in the database too, gone with its end, empty of anything readable."""

from __future__ import annotations

from uuid import UUID, uuid4

import asyncpg
import pytest

from app.domain.sandbox import commands as cmd
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.vault.seal import Sealed, Sealer, Secrets, Unsealable
from tests.support.sql import connected
from tests.support.stream import META as ACTOR
from tests.support.stream import requested

CANARY = "canary-7f3a91"


async def create(service: Service, sealer: Sealer) -> UUID:
    sandbox_id = uuid4()
    values = Secrets({"TOKEN": CANARY}, "user", CANARY)
    await service.create(sandbox_id, requested(), sealer.seal(sandbox_id, values), ACTOR)
    return sandbox_id


async def stored(dsn: str, sandbox_id: UUID) -> Sealed | None:
    async with connected(dsn) as connection:
        row = await connection.fetchrow(
            "SELECT key_id, wrapped_key, sealed FROM sandbox_secrets WHERE sandbox_id = $1", sandbox_id
        )
        return None if row is None else Sealed(*row)


async def test_what_the_database_holds_opens_and_shows_nothing(dsn: str, service: Service, sealer: Sealer):
    sandbox_id = await create(service, sealer)
    sealed = await stored(dsn, sandbox_id)
    assert sealed is not None
    assert sealer.unseal(sandbox_id, sealed).env == {"TOKEN": CANARY}
    async with connected(dsn, owner=True) as owner:
        for table in ("sandbox_secrets", "sandboxes", "events", "reconcile_queue", "expiry_jobs"):
            for row in await owner.fetch(f"SELECT * FROM {table}"):
                assert CANARY not in str(dict(row))
                assert all(CANARY.encode() not in value for value in row if isinstance(value, bytes))


async def test_rows_swapped_by_somebody_do_not_open(dsn: str, service: Service, sealer: Sealer):
    one, two = await create(service, sealer), await create(service, sealer)
    async with connected(dsn, owner=True) as owner:
        await owner.execute(
            "UPDATE sandbox_secrets a SET sealed = b.sealed, wrapped_key = b.wrapped_key FROM sandbox_secrets b "
            "WHERE a.sandbox_id <> b.sandbox_id"
        )
    for sandbox_id in (one, two):
        sealed = await stored(dsn, sandbox_id)
        assert sealed is not None
        with pytest.raises(Unsealable):
            sealer.unseal(sandbox_id, sealed)


@pytest.mark.parametrize("end", [cmd.Terminate(), cmd.RecordFailure("E", "m")], ids=["deleted", "failed"])
async def test_an_ending_erases_its_own_and_no_other(dsn: str, service: Service, sealer: Sealer, end: cmd.Command):
    ended, stays = await create(service, sealer), await create(service, sealer)
    await service.execute(ended, end, ACTOR)
    assert await stored(dsn, ended) is None
    assert await stored(dsn, stays) is not None


async def test_a_replayed_create_seals_nothing_again(dsn: str, service: Service, sealer: Sealer):
    sandbox_id = await create(service, sealer)
    first = await stored(dsn, sandbox_id)
    again = sealer.seal(sandbox_id, Secrets({"TOKEN": "another"}))
    assert (await service.create(sandbox_id, requested(), again, ACTOR)).replayed
    assert await stored(dsn, sandbox_id) == first
    await service.execute(sandbox_id, cmd.Terminate(), ACTOR)
    assert (await service.create(sandbox_id, requested(), again, ACTOR)).replayed
    assert await stored(dsn, sandbox_id) is None, "an ended sandbox gets no secrets back"


async def test_the_application_cannot_exchange_a_sealed_row(dsn: str, service: Service, sealer: Sealer):
    await create(service, sealer)
    async with connected(dsn) as app:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute("UPDATE sandbox_secrets SET sealed = '\\x00'")


async def test_nothing_is_sealed_where_nothing_was_given(database: Database, service: Service, dsn: str):
    made = await service.create(uuid4(), requested(), None, ACTOR)
    assert await stored(dsn, made.sandbox.id) is None
