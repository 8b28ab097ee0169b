"""Wake-ups: prompt when all is well, merely late when it is not, and never a reason to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import product
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.observed import Power
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import NEWS_CHANNEL, WORK_CHANNEL, Signal, Subscription
from tests.support.sql import connected
from tests.support.stream import META as ACTOR
from tests.support.stream import TENANT, about, requested, seen

Until = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]


@pytest.fixture
async def remote(dsn: str) -> AsyncIterator[Signal]:
    """Another process's signal."""
    database = Database(dsn, max_size=2)
    made = Signal(database)
    task = asyncio.create_task(made.run())
    yield made
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await database.close()


async def ready(*signals: Signal) -> None:
    """Until each hears the others, and has said its first word: look for yourselves.

    Twice: the first news may come while a receiver still opens its second channel, before that first word.
    """
    for sender, receiver in [*product(signals, signals)] * 2:
        probe = uuid4()
        if sender is not receiver:
            with receiver.subscribe(probe) as subscription:
                sender.poke(probe, work=False)
                assert await heard(subscription)


async def heard(subscription: Subscription) -> bool:
    """Within a time in which a healthy signal has long spoken."""
    return await subscription.wait(20)


async def silent(subscription: Subscription) -> bool:
    return not await subscription.wait(0)


async def test_a_poke_wakes_here_and_elsewhere_who_asked_for_it(dsn: str, signal: Signal, remote: Signal, until: Until):
    await ready(signal, remote)
    mine, other = uuid4(), uuid4()
    with (
        signal.subscribe(mine) as here,
        signal.subscribe(other) as not_here,
        remote.subscribe(mine) as there,
        remote.subscribe(other) as not_there,
        remote.subscribe() as anything,
    ):
        signal.poke(mine)
        assert await here.wait(0.001), "at once, in this process"
        assert await heard(there)
        assert await heard(anything)
        assert await silent(not_here)
        assert await silent(not_there)


async def test_only_work_wakes_claimers_here_and_elsewhere(signal: Signal, remote: Signal):
    """Fifty patches of metadata woke every claimer of every process fifty times."""
    await ready(signal, remote)
    mine = uuid4()
    with signal.subscribe_work() as here, remote.subscribe_work() as there, remote.subscribe(mine) as news:
        signal.poke(mine, work=False)
        assert await heard(news), "it was sent"
        assert await silent(here)
        assert await silent(there)
        signal.poke(mine, work=True)
        assert await here.wait(0.001)
        assert await heard(there)


async def test_work_that_comes_beside_mere_news_is_not_forgotten(signal: Signal, remote: Signal):
    await ready(signal, remote)
    with remote.subscribe_work() as there:
        for work in (False, True, False):
            signal.poke(uuid4(), work=work)
        assert await heard(there)


async def test_commands_say_which_they_are(service: Service, signal: Signal):
    sandbox_id = (await service.create(uuid4(), TENANT, requested(), None, ACTOR)).sandbox.id
    with signal.subscribe_work() as work, signal.subscribe(sandbox_id) as news:
        for command, wakes in (
            (cmd.PatchMetadata({"a": "b"}), False),
            (cmd.RecordSeen(seen(Power.RUNNING)), False),
            (cmd.Pause(), True),
            (cmd.Terminate(), True),
        ):
            await service.execute(sandbox_id, ANY_TENANT, about(sandbox_id, command), ACTOR)
            assert await news.wait(0.001), command
            assert await work.wait(0) == wakes, command
        created = (await service.create(uuid4(), TENANT, requested(), None, ACTOR)).sandbox
        assert await work.wait(0.001)
        await service.record(created, cmd.RecordWaiting("fetch", "IMAGE_PULLING"), ACTOR)
        assert await silent(work)


async def test_nobody_wakes_by_his_own_echo(signal: Signal, remote: Signal):
    await ready(signal, remote)
    mine = uuid4()
    with (
        signal.subscribe(mine) as news,
        signal.subscribe_work() as work,
        remote.subscribe(mine) as there,
        remote.subscribe_work() as there_work,
    ):
        for _ in range(3):
            signal.poke(mine)
            assert await news.wait(0.001)
            assert await work.wait(0.001)
            assert await heard(there)
            assert await heard(there_work)
            # What came before on a connection was heard before: the remote's word comes after our echo.
            remote.poke(mine, work=False)
            assert await heard(news)
            assert await silent(work)
            assert await there.wait(0.001)
            assert await silent(there_work)
        assert await silent(news)
        assert await silent(work)


async def test_the_last_words_are_sent(dsn: str, remote: Signal):
    """A server that stops has just appended; whoever waits elsewhere must not wait for its poll."""
    database = Database(dsn, max_size=2)
    leaving = Signal(database)
    running = asyncio.create_task(leaving.run())
    await ready(leaving, remote)
    mine, last = uuid4(), uuid4()
    with remote.subscribe(mine) as there, remote.subscribe(last) as there_too, remote.subscribe_work() as claimer:
        leaving.poke(uuid4(), work=False)
        leaving.poke(mine, work=False)
        await asyncio.sleep(0)  # the statement is under way; it is cancelled with the rest
        leaving.poke(last, work=True)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await database.close()
        assert await heard(there)
        assert await heard(there_too)
        assert await heard(claimer)


async def test_last_words_to_a_database_that_is_gone_are_given_up():
    gone = Database("postgresql://postgres@127.0.0.1:1/none")
    signal = Signal(gone)
    running = asyncio.create_task(signal.run())
    await asyncio.sleep(0)
    signal.poke(uuid4())
    running.cancel()
    async with asyncio.timeout(20):
        await asyncio.gather(running, return_exceptions=True)
    await gone.close()


async def test_an_append_pokes(service: Service, signal: Signal):
    with signal.subscribe() as anything:
        made = await service.create(uuid4(), TENANT, requested(), None, ACTOR)
        assert await anything.wait(0.001)
        with signal.subscribe(made.sandbox.id) as here:
            await service.execute(made.sandbox.id, ANY_TENANT, cmd.Terminate(), ACTOR)
            assert await here.wait(0.001)


async def test_more_ids_than_a_notification_holds_wake_everybody(
    dsn: str, signal: Signal, remote: Signal, until: Until
):
    await ready(signal, remote)
    ids = [uuid4() for _ in range(500)]
    with remote.subscribe(ids[0]) as first, remote.subscribe(ids[-1]) as last, remote.subscribe(uuid4()) as stranger:
        for sandbox_id in ids:
            signal.poke(sandbox_id)
        assert await heard(first)
        assert await heard(last)
        assert await heard(stranger), "woken for nothing, which is allowed"


async def test_just_as_many_as_it_holds(dsn: str, signal: Signal, remote: Signal, until: Until):
    await ready(signal, remote)
    ids = [uuid4() for _ in range(200)]
    with remote.subscribe(ids[-1]) as last, remote.subscribe(uuid4()) as stranger:
        for sandbox_id in ids:
            signal.poke(sandbox_id)
        assert await heard(last)
        assert await silent(stranger)


async def test_pokes_are_gathered(dsn: str, signal: Signal, until: Until):
    """A burst is far fewer notifications than pokes."""
    heard_ids: set[UUID] = set()
    notifications = works = 0

    def count(_connection: Any, _pid: int, _channel: str, payload: str) -> None:
        nonlocal notifications
        notifications += 1
        heard_ids.update(map(UUID, payload.partition(" ")[2].split(",")))

    def count_work(_connection: Any, _pid: int, _channel: str, _payload: str) -> None:
        nonlocal works
        works += 1

    ids = [uuid4() for _ in range(150)]
    async with connected(dsn) as connection:
        await connection.add_listener(NEWS_CHANNEL, count)
        await connection.add_listener(WORK_CHANNEL, count_work)
        for number, sandbox_id in enumerate(ids):
            signal.poke(sandbox_id, work=number % 2 == 0)

        async def all_heard() -> bool:
            return heard_ids >= set(ids)

        await until(all_heard)
    assert notifications <= 3
    assert 0 < works <= notifications


async def test_a_killed_listener_comes_back_and_says_look_for_yourselves(
    dsn: str, signal: Signal, remote: Signal, until: Until
):
    await ready(signal, remote)
    mine = uuid4()
    with remote.subscribe(mine) as there:
        async with connected(dsn, owner=True) as owner:
            killed = await owner.fetch(
                "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND query ILIKE 'LISTEN%'"
            )
            assert len(killed) == 2
        assert await heard(there), "whatever was said while nobody listened"
        signal.poke(mine)
        assert await heard(there)


async def test_a_notification_that_cannot_be_sent_is_lost_and_the_next_one_is_not(
    dsn: str, signal: Signal, remote: Signal, until: Until
):
    await ready(signal, remote)
    mine, refused = uuid4(), uuid4()
    async with connected(dsn, owner=True) as owner:
        await owner.execute("REVOKE EXECUTE ON FUNCTION pg_notify(text, text) FROM PUBLIC")
        with signal.subscribe(refused) as here, remote.subscribe(mine) as there:
            signal.poke(refused)
            assert await here.wait(0.001)
            await _tried(owner, until)
            await owner.execute("GRANT EXECUTE ON FUNCTION pg_notify(text, text) TO PUBLIC")

            async def poked() -> bool:
                signal.poke(mine)
                return await there.wait(0.1)

            await until(poked)


async def _tried(owner: Any, until: Until) -> None:
    """Until the refused notification was the last thing that a connection did."""

    async def tried() -> bool:
        return bool(
            await owner.fetchval(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle' "
                "AND query ILIKE '%pg_notify%' AND pid <> pg_backend_pid()"
            )
        )

    await until(tried)


async def test_nonsense_on_the_channel_wakes_everybody_and_harms_nobody(dsn: str, signal: Signal, remote: Signal):
    await ready(signal, remote)
    mine = uuid4()
    with remote.subscribe(mine) as there:
        async with connected(dsn) as connection:
            for payload in ("", "nonsense", "*,*", "é" * 100, mine.hex):
                await connection.execute("SELECT pg_notify($1, $2)", NEWS_CHANNEL, payload)
                assert await heard(there), payload
            with remote.subscribe_work() as claimer:
                for payload in ("", "nonsense", "é" * 100):
                    await connection.execute("SELECT pg_notify($1, $2)", WORK_CHANNEL, payload)
                    assert await heard(claimer), payload


async def test_a_poke_before_the_wait_is_not_lost(database: Database):
    signal, mine = Signal(database), uuid4()
    with signal.subscribe(mine) as here:
        signal.poke(mine)
        signal.poke(mine)
        assert await here.wait(0.001)
        assert await silent(here)


async def test_who_leaves_is_forgotten(database: Database):
    signal, mine = Signal(database), uuid4()
    with signal.subscribe(mine) as first:
        with signal.subscribe(mine), signal.subscribe():
            assert len(signal._by_id[mine]) == 2
            assert len(signal._everything) == 1
        with signal.subscribe_work():
            assert len(signal._claimers) == 1
        signal.poke(mine)
        assert await first.wait(0.001)
    with pytest.raises(RuntimeError), signal.subscribe(mine):
        raise RuntimeError
    assert (signal._by_id, signal._everything, signal._claimers) == ({}, set(), set())


async def test_the_state_goes_along_within_the_process(service: Service, signal: Signal):
    made = await service.create(uuid4(), TENANT, requested(), None, ACTOR)
    with signal.subscribe(made.sandbox.id) as news, signal.subscribe() as everything:
        assert news.after(made.sandbox) is None
        outcome = await service.execute(made.sandbox.id, TENANT, cmd.PatchMetadata({"a": "b"}), ACTOR)
        assert await news.wait(0)
        loaded = await service.view.load(made.sandbox.id, TENANT)
        assert loaded is not None
        assert news.after(made.sandbox) == outcome.sandbox == loaded[0]
        assert news.after(outcome.sandbox) is None, "it is known already"
        assert await everything.wait(0)
        assert everything.after(made.sandbox) is None, "it is about all streams"


async def test_appends_that_report_in_the_wrong_order_leave_the_later_state(service: Service, signal: Signal):
    made = await service.create(uuid4(), TENANT, requested(), None, ACTOR)
    first = await service.execute(made.sandbox.id, TENANT, cmd.PatchMetadata({"a": "b"}), ACTOR)
    second = await service.execute(made.sandbox.id, TENANT, cmd.PatchMetadata({"a": "c"}), ACTOR)
    with signal.subscribe(made.sandbox.id) as news:
        signal.poke(made.sandbox.id, state=second.sandbox)
        signal.poke(made.sandbox.id, state=first.sandbox)
        assert news.after(made.sandbox) == second.sandbox


async def test_other_news_beside_a_state_is_read(service: Service, signal: Signal):
    """It may be about a later event, of another process."""
    made = await service.create(uuid4(), TENANT, requested(), None, ACTOR)
    patched = await service.execute(made.sandbox.id, TENANT, cmd.PatchMetadata({"a": "b"}), ACTOR)
    with signal.subscribe(made.sandbox.id) as news:
        signal.poke(made.sandbox.id)
        signal.poke(made.sandbox.id, state=patched.sandbox)
        assert await news.wait(0)
        assert news.after(made.sandbox) is None
        news.take()
        assert news.after(made.sandbox) == patched.sandbox
