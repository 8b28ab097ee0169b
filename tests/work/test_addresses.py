"""Leases of addresses on our own network: one holder each, whoever dies or comes at the same time."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from app.domain.engine import events as engine_events
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.address import leasable, own_network
from app.domain.sandbox.state import Phase
from app.errors import RuntimeUnavailable
from app.runtime.fake import FakeDriver
from app.store.addresses import Addresses, Holder
from app.store.database.pool import Database
from app.work.worker import Worker
from tests.work.stage import Gate, Raiser, Stage

SUBNET = "10.99.0.0/24"
FIRST, LAST = leasable(SUBNET)
HERE = "default"


def driver(stage: Stage, **hooks: Any) -> FakeDriver:
    return FakeDriver(stage.engine, stage.installation, name=stage.engine_name, subnet=SUBNET, **hooks)


def worker(stage: Stage, worker_id: str = "w1", **hooks: Any) -> Worker:
    return stage.worker(driver(stage, **hooks), worker_id=worker_id)


def holder() -> Holder:
    return Holder(uuid4(), "default", uuid4(), 1)


async def address(stage: Stage, sandbox_id: Any) -> str:
    found = (await stage.sandbox(sandbox_id)).address
    assert found is not None
    assert found.network == own_network(stage.installation)
    return found.ip


async def leased(stage: Stage) -> dict[Any, str]:
    rows = await stage.sql("SELECT stream_id, host(ip) AS ip FROM addresses WHERE freed_at IS NULL")
    return {row["stream_id"]: row["ip"] for row in rows}


async def test_a_hundred_leases_at_once_are_a_hundred_addresses(dsn: str, database: Database):
    """The naive way looks for a free one and then takes it: what is read by two is taken twice, or refused."""

    async def naive(connection: asyncpg.Connection[Any]) -> Any:
        free = "SELECT ip FROM sandledger.addresses WHERE freed_at IS NOT NULL ORDER BY freed_at, ip LIMIT 1"
        found = await connection.fetchval(free)
        await both.wait()
        await connection.execute(
            "UPDATE sandledger.addresses SET stream_id = gen_random_uuid(), tenant = 't', leased_at = now(),"
            " freed_at = NULL WHERE ip = $1",
            found,
        )
        return found

    ours = Addresses(database, HERE)
    one = holder()
    assert await ours.lease(one, (FIRST, LAST)) == str(FIRST)
    both = asyncio.Barrier(2)
    connections = [await asyncpg.connect(dsn) for _ in range(2)]
    try:
        taken = await asyncio.gather(*map(naive, connections))
        assert taken[0] == taken[1], "the naive way gives one address to two"
    finally:
        for connection in connections:
            await connection.close()
    found = await asyncio.gather(*(ours.lease(holder(), (FIRST, LAST)) for _ in range(100)))
    assert len({*found, str(FIRST)}) == 101
    assert await ours.lease(one, (FIRST, LAST)) == str(FIRST), "a second lease of one sandbox is the first"


async def test_one_sandbox_gets_one_address_from_two_workers(database: Database):
    one = holder()
    found = await asyncio.gather(*(Addresses(database, HERE).lease(one, (FIRST, LAST)) for _ in range(20)))
    assert len(set(found)) == 1


async def test_a_late_worker_gives_up_the_address_that_it_had_and_no_other(database: Database):
    """Its claim ran out, and the next worker leased another address for the object that runs now."""
    ours, one = Addresses(database, HERE), holder()
    late = await ours.lease(one, (FIRST, LAST))
    await ours.give_up(one.stream_id, late)
    present = await ours.lease(one, (FIRST, LAST))
    assert present != late
    await ours.give_up(one.stream_id, late)
    assert await ours.lease(one, (FIRST, LAST)) == present


async def test_addresses_go_round(dsn: str, database: Database):
    """The one that has been free for the longest time comes next, and none before its time."""
    ours = Addresses(database, HERE, quarantine=0)
    few = (FIRST, IPv4Address(int(FIRST) + 2))
    first, second = holder(), holder()
    assert [await ours.lease(each, few) for each in (first, second)] == [str(FIRST), str(few[0] + 1)]
    await ours.give_up(second.stream_id)
    await ours.give_up(first.stream_id)
    assert [await ours.lease(holder(), few) for _ in range(4)] == [str(few[1]), str(few[0] + 1), str(few[0]), None]
    slow = Addresses(database, HERE)
    await slow.give_up(first.stream_id)
    connection = await asyncpg.connect(dsn)
    try:
        free = "UPDATE sandledger.addresses SET freed_at = clock_timestamp() - $1 * interval '1 second'"
        await connection.execute(free, 590.0)
        assert await slow.lease(holder(), few) is None
        await connection.execute(free, 601.0)
        assert await slow.lease(holder(), few) is not None
    finally:
        await connection.close()


async def test_a_life_on_our_own_network(stage: Stage):
    hands = worker(stage)
    one, two = await stage.running(hands), await stage.running(hands)
    assert [await address(stage, each) for each in (one, two)] == [str(FIRST), str(FIRST + 1)]
    assert await leased(stage) == {one: str(FIRST), two: str(FIRST + 1)}
    await stage.ask(one, cmd.Terminate())
    await stage.settle(hands)
    assert await leased(stage) == {two: str(FIRST + 1)}
    assert await address(stage, await stage.running(hands)) == str(FIRST + 2), "not the one that was just freed"


async def test_the_network_is_one_event_of_two_workers(stage: Stage):
    both = [worker(stage, name) for name in ("w1", "w2")]
    for hands in both:
        await stage.running(hands)

    async def told() -> list[engine_events.NetworkPrepared]:
        history = await stage.engines.history(HERE)
        return [one.event for one in history if isinstance(one.event, engine_events.NetworkPrepared)]

    (event,) = await told()
    assert (event.name, event.subnet) == (own_network(stage.installation), SUBNET)
    engine = await stage.engines.load(HERE)
    assert engine is not None
    assert engine.network == event
    stage.engine.networks.clear()
    sandbox_id = await stage.create()
    await stage.settle(both[0])
    await stage.make_due(sandbox_id)
    await stage.settle(both[0])
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert len(await told()) == 2, "it was made again"


@pytest.mark.parametrize("call", ["create", "start", "inspect"])
async def test_a_worker_that_dies_leaves_one_lease(stage: Stage, call: str):
    gate = Gate(call)
    dying = worker(stage, "dying", before=gate)
    await dying.station.contact()
    sandbox_id = await stage.create()
    (claim,) = (await dying.queue.claim(1, lease=30, tenant_slots=1)).claims
    held = stage.hold(dying, claim)
    run = asyncio.create_task(dying.reconcile(held))
    async with asyncio.timeout(30):
        await gate.reached.wait()
    before = await leased(stage)
    await stage.make_overdue(sandbox_id)
    await stage.settle(worker(stage, "other"))
    assert await stage.phase(sandbox_id) is Phase.RUNNING
    assert await leased(stage) == before == {sandbox_id: await address(stage, sandbox_id)}
    held.left = True
    gate.open.set()
    await asyncio.wait([run])


async def test_a_stranger_has_the_address(stage: Stage):
    """The naive way tries the same again, for ever."""
    stage.engine.taken = {str(FIRST), str(FIRST + 1)}
    hands = worker(stage)
    sandbox_id = await stage.running(hands)
    assert await address(stage, sandbox_id) == str(FIRST + 2)
    assert "reconcile_failed" not in await stage.told(sandbox_id)
    assert await leased(stage) == {sandbox_id: str(FIRST + 2)}


async def test_a_full_network_is_waited_for(stage: Stage):
    hands = worker(stage)
    first = await stage.running(hands)
    await stage.sql(
        "INSERT INTO addresses SELECT engine, $1::inet + n, tenant, gen_random_uuid(), object_id, 1, leased_at, NULL"
        " FROM addresses CROSS JOIN generate_series(1, $2::int) n WHERE freed_at IS NULL"
        " ON CONFLICT (engine, ip) DO UPDATE SET stream_id = excluded.stream_id, tenant = 'default',"
        " leased_at = excluded.leased_at, freed_at = NULL",
        FIRST,
        int(LAST) - int(FIRST),
    )
    waiting = await stage.create()
    await stage.turn(hands)
    sandbox = await stage.sandbox(waiting)
    assert (sandbox.phase, sandbox.waiting and sandbox.waiting.reason) == (Phase.PENDING, "NO_CAPACITY")
    assert (await stage.row(waiting))["attempts"] == 0
    await stage.ask(first, cmd.Terminate())
    await stage.settle(hands)
    await stage.sql("UPDATE addresses SET freed_at = freed_at - interval '10 minutes'")
    await stage.make_due(waiting)
    await stage.settle(hands)
    assert await address(stage, waiting) == str(FIRST)


async def test_a_closed_sandbox_keeps_none(stage: Stage):
    """A worker whose claim was lost may lease after the removal was recorded."""
    hands = worker(stage)
    sandbox_id = await stage.running(hands)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(hands)
    late = Holder(sandbox_id, "default", sandbox_id, 1)
    assert await Addresses(stage.database, HERE).lease(late, (FIRST, LAST)) is not None
    await hands.networks.reap()
    assert await leased(stage), "it may be under way"
    assert await Addresses(stage.database, HERE).reap(age=0) == 1
    assert await leased(stage) == {}


async def test_what_a_restored_database_does_not_know_is_not_touched(stage: Stage):
    """Its objects keep their addresses, whatever the table says."""
    hands = worker(stage)
    known = await stage.running(hands)
    await stage.sql("DELETE FROM addresses")
    new = await stage.running(hands)
    assert await address(stage, known) == str(FIRST)
    assert await address(stage, new) == str(FIRST + 1)
    assert await stage.phase(known) is Phase.RUNNING


async def test_an_object_that_was_there_keeps_its_address(stage: Stage):
    hands = worker(stage, after=Raiser(lambda: RuntimeUnavailable("the reply got lost"), "start"))
    sandbox_id = await stage.create()
    await stage.turn(hands)
    await stage.sql("DELETE FROM addresses")
    other = holder()
    assert await Addresses(stage.database, HERE).lease(other, (FIRST, LAST)) == str(FIRST)
    await Addresses(stage.database, HERE).give_up(other.stream_id)
    await stage.make_due(sandbox_id)
    await stage.settle(worker(stage, "w2"))
    assert await address(stage, sandbox_id) == str(FIRST)
    assert (await leased(stage))[sandbox_id] == str(FIRST)
