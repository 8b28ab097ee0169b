"""One Idempotency-Key is one sandbox of one tenant, and its answer is the first answer, whatever dies in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Power
from app.domain.tenants import ANY_TENANT
from app.errors import KeyReused, StoreUnavailable
from app.service.sandboxes import Outcome, Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer, Secrets
from tests.log.test_append import traces
from tests.support.sql import connected
from tests.support.stream import META, TENANT, about, requested, seen

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]
TABLES = {"sandboxes": 1, "idempotency_keys": 1, "reconcile_queue": 1, "deadlines": 2, "sealed_values": 1}


async def keyed(service: Service, key: str = "key", tenant: str = TENANT, sealer: Sealer | None = None) -> Outcome:
    sandbox_id = uuid4()
    sealed = sealer and sealer.seal(sandbox_id, Secrets(env={"A": "b"}))
    return await service.create(sandbox_id, tenant, requested(), sealed, META, key=key)


async def test_two_hundred_creates_of_one_key_are_one_sandbox(dsn: str, service: Service, sealer: Sealer):
    other = Database(dsn)
    both = [service, Service(other, Signal(other))]
    outcomes = await asyncio.gather(*(keyed(both[number % 2], sealer=sealer) for number in range(200)))
    await other.close()
    assert sum(not outcome.replayed for outcome in outcomes) == 1
    assert len({msgspec.json.encode(outcome.sandbox) for outcome in outcomes}) == 1, "every answer is the first answer"
    async with connected(dsn) as connection:
        for table, rows in TABLES.items():
            assert await connection.fetchval(f"SELECT count(*) FROM {table}") == rows, table
        assert await connection.fetchval("SELECT count(*) FROM events WHERE kind = 'sandbox'") == 2
        assert await connection.fetchval("SELECT revision FROM reconcile_queue") == 1


async def test_a_repeated_request_is_answered_as_the_first_time_and_writes_nothing(dsn: str, service: Service):
    first = await keyed(service)
    for command in (cmd.RecordSeen(seen(Power.RUNNING)), cmd.PatchMetadata({"a": "b"}), cmd.Terminate()):
        await service.execute(first.sandbox.id, ANY_TENANT, about(first.sandbox.id, command), META)
        before = await traces(dsn)
        again = await keyed(service)
        assert (again.sandbox, again.replayed, again.position, again.events) == (first.sandbox, True, None, ())
        assert await traces(dsn) == before


async def test_the_first_answer_was_that_nobody_had_room(
    dsn: str, database: Database, signal: Signal, service: Service
):
    async with connected(dsn) as worker:
        await worker.execute("UPDATE engines SET state = 'dark', version = version")
        service.engines.forget()
        first = await keyed(service)
        assert first.sandbox.engine is None
        await worker.execute("UPDATE engines SET state = 'up', version = version")
    service.engines.forget()
    placed = cmd.RecordPlaced("default", 1, first.sandbox.id)
    await service.execute(first.sandbox.id, ANY_TENANT, placed, META)
    again = await keyed(service)
    assert (again.sandbox, again.replayed) == (first.sandbox, True)
    assert (again.sandbox.version, again.sandbox.engine) == (1, None)


async def test_a_key_with_another_body_is_refused(dsn: str, service: Service):
    await keyed(service)
    before = await traces(dsn)
    other = msgspec.structs.replace(requested(), fingerprint="0" * 64)
    with pytest.raises(KeyReused):
        await service.create(uuid4(), TENANT, other, None, META, key="key")
    assert await traces(dsn) == before


async def test_a_key_of_another_tenant_is_another_key(service: Service):
    mine, theirs = await keyed(service), await keyed(service, tenant="other")
    assert not theirs.replayed
    assert mine.sandbox.id != theirs.sandbox.id
    for tenant, first in ((TENANT, mine), ("other", theirs)):
        again = await keyed(service, tenant=tenant)
        assert (again.sandbox, again.replayed) == (first.sandbox, True)


async def test_without_a_key_every_request_is_a_new_one(service: Service):
    made = [(await service.create(uuid4(), TENANT, requested(), None, META)).sandbox.id for _ in range(2)]
    assert len(set(made)) == 2


async def waiting(dsn: str, until: Until, count: int = 1) -> None:
    async with connected(dsn, owner=True) as owner:

        async def waits() -> bool:
            return count <= await owner.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )

        await until(waits)


async def unfinished(connection: Any, key: str = "key") -> UUID:
    """The first statement of somebody who has not committed yet."""
    stream_id = uuid4()
    await connection.execute("BEGIN")
    await connection.execute(
        "INSERT INTO idempotency_keys VALUES ($1, $2, 'sandbox', $3, $4, clock_timestamp())",
        TENANT,
        key,
        stream_id,
        "f" * 64,
    )
    return stream_id


@pytest.mark.parametrize("end", ["rollback", "killed"])
async def test_whoever_waited_for_one_that_died_is_the_first(dsn: str, service: Service, until: Until, end: str):
    async with connected(dsn) as dying, connected(dsn, owner=True) as owner:
        stream_id = await unfinished(dying)
        second = asyncio.create_task(keyed(service))
        await waiting(dsn, until)
        if end == "killed":
            await owner.execute("SELECT pg_terminate_backend($1)", dying.get_server_pid())
        else:
            await dying.execute("ROLLBACK")
        outcome = await second
    assert not outcome.replayed
    assert outcome.sandbox.id != stream_id
    assert (await keyed(service)).sandbox == outcome.sandbox


async def test_a_kill_in_the_middle_leaves_no_key_behind(dsn: str, service: Service, until: Until):
    before = await traces(dsn)
    async with connected(dsn) as first, connected(dsn, owner=True) as owner:
        await unfinished(first)
        killed = asyncio.create_task(keyed(service))
        await waiting(dsn, until)
        await owner.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        with pytest.raises(StoreUnavailable):
            await killed
        await first.execute("ROLLBACK")
    assert await traces(dsn) == before
    assert not (await keyed(service)).replayed


async def test_looking_first_makes_two_of_one_key(dsn: str, service: Service):
    """The naive way: ask whether the key is there, and create when it is not."""

    async def naive() -> UUID:
        async with connected(dsn) as connection:
            found = await connection.fetchval("SELECT stream_id FROM idempotency_keys WHERE digest = 'key'")
            if found is not None:
                return found
            await asyncio.sleep(0)
            made = await service.create(uuid4(), TENANT, requested(), None, META)
            await connection.execute(
                "INSERT INTO idempotency_keys VALUES ($1, 'key', 'sandbox', $2, 'f', now()) ON CONFLICT DO NOTHING",
                TENANT,
                made.sandbox.id,
            )
            return made.sandbox.id

    assert len(set(await asyncio.gather(*(naive() for _ in range(10))))) > 1
