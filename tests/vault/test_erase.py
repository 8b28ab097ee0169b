"""The sealed row: bound to its sandbox in the database too, gone with its end, empty of anything readable."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Exit, Power
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Outcome, Service
from app.store.database.pool import Database
from app.store.vault.seal import Sealed, Sealer, Secrets, Unsealable
from tests.support.sql import connected
from tests.support.stream import BEGIN, TENANT, about, requested, seen
from tests.support.stream import META as ACTOR

CANARY = "canary-7f3a91"


async def create(service: Service, sealer: Sealer, key: str | None = None) -> UUID:
    sandbox_id = uuid4()
    values = Secrets({"TOKEN": CANARY}, "user", CANARY)
    await service.create(sandbox_id, TENANT, requested(), sealer.seal(sandbox_id, values), ACTOR, key=key)
    return sandbox_id


async def stored(dsn: str, sandbox_id: UUID) -> Sealed | None:
    async with connected(dsn) as connection:
        row = await connection.fetchrow(
            "SELECT key_id, wrapped_key, sealed FROM sealed_values WHERE stream_id = $1", sandbox_id
        )
        return None if row is None else Sealed(*row)


async def test_what_the_database_holds_opens_and_shows_nothing(dsn: str, service: Service, sealer: Sealer):
    sandbox_id = await create(service, sealer)
    sealed = await stored(dsn, sandbox_id)
    assert sealed is not None
    assert sealer.unseal(sandbox_id, sealed).env == {"TOKEN": CANARY}
    async with connected(dsn, owner=True) as owner:
        for table in ("sealed_values", "sandboxes", "events", "reconcile_queue", "deadlines"):
            for row in await owner.fetch(f"SELECT * FROM {table}"):
                assert CANARY not in str(dict(row))
                assert all(CANARY.encode() not in value for value in row if isinstance(value, bytes))


async def test_rows_swapped_by_somebody_do_not_open(dsn: str, service: Service, sealer: Sealer):
    one, two = await create(service, sealer), await create(service, sealer)
    async with connected(dsn, owner=True) as owner:
        await owner.execute(
            "UPDATE sealed_values a SET sealed = b.sealed, wrapped_key = b.wrapped_key FROM sealed_values b "
            "WHERE a.stream_id <> b.stream_id"
        )
    for sandbox_id in (one, two):
        sealed = await stored(dsn, sandbox_id)
        assert sealed is not None
        with pytest.raises(Unsealable):
            sealer.unseal(sandbox_id, sealed)


RUNNING = cmd.RecordSeen(seen(Power.RUNNING))
ENDS: dict[str, list[cmd.Command]] = {
    "deleted": [cmd.Terminate()],
    "deleted while it runs": [RUNNING, cmd.Terminate()],
    "failed": [cmd.RecordFailure("ensure", "E", "m")],
    "exited": [RUNNING, cmd.RecordSeen(seen(Power.EXITED, end=Exit(0)))],
    "exited before it was ready": [cmd.RecordSeen(seen(Power.EXITED, end=Exit(1)))],
    "lost": [RUNNING, cmd.RecordLost(BEGIN)],
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
async def test_what_can_never_run_again_erases_its_own_and_no_others(
    dsn: str, service: Service, sealer: Sealer, end: list[cmd.Command]
):
    ended, stays = await create(service, sealer), await create(service, sealer)
    for command in end:
        assert await stored(dsn, ended) is not None
        await service.execute(ended, ANY_TENANT, about(ended, command), ACTOR)
    assert await stored(dsn, ended) is None
    assert await stored(dsn, stays) is not None


async def test_an_expiry_erases_too(dsn: str, service: Service, sealer: Sealer, until: Any):
    ended = await create(service, sealer)
    loaded = await service.view.load(ended, ANY_TENANT)
    assert loaded is not None
    await service.execute(ended, ANY_TENANT, cmd.Renew(loaded[0].created_at + timedelta(milliseconds=500)), ACTOR)

    async def expired() -> bool:
        return bool((await service.execute(ended, ANY_TENANT, cmd.Expire(), ACTOR)).events)

    await until(expired)
    assert await stored(dsn, ended) is None


async def test_what_may_run_again_keeps_its_values(dsn: str, service: Service, sealer: Sealer):
    sandbox_id = await create(service, sealer)
    for command in (
        cmd.RecordRetry("ensure", "E", "again", 1),
        RUNNING,
        cmd.Pause(),
        cmd.RecordPowerRefused("REFUSED", "no"),
        cmd.Pause(),
        cmd.RecordSeen(seen(Power.PAUSED)),
        cmd.Resume(),
        RUNNING,
    ):
        await service.execute(sandbox_id, ANY_TENANT, about(sandbox_id, command), ACTOR)
        assert await stored(dsn, sandbox_id) is not None, command


async def test_a_replayed_create_seals_nothing_again(dsn: str, service: Service, sealer: Sealer):
    sandbox_id = await create(service, sealer, key="k")
    first = await stored(dsn, sandbox_id)

    async def again() -> Outcome:
        other = uuid4()
        sealed = sealer.seal(other, Secrets({"TOKEN": "another"}))
        outcome = await service.create(other, TENANT, requested(), sealed, ACTOR, key="k")
        assert await stored(dsn, other) is None
        return outcome

    assert (await again()).replayed
    assert await stored(dsn, sandbox_id) == first
    await service.execute(sandbox_id, ANY_TENANT, cmd.Terminate(), ACTOR)
    assert (await again()).replayed
    assert await stored(dsn, sandbox_id) is None, "an ended sandbox gets no secrets back"


async def test_the_application_cannot_exchange_a_sealed_row(dsn: str, service: Service, sealer: Sealer):
    await create(service, sealer)
    async with connected(dsn) as app:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute("UPDATE sealed_values SET sealed = '\\x00'")


async def test_nothing_is_sealed_where_nothing_was_given(database: Database, service: Service, dsn: str):
    made = await service.create(uuid4(), TENANT, requested(), None, ACTOR)
    assert await stored(dsn, made.sandbox.id) is None
