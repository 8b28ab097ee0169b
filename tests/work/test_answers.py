"""Questions of processes without an engine: who answers, when a worker dies, and what is never told."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import msgspec

from app.domain.sandbox.diagnostics import Inspection, LogText
from app.domain.sandbox.masking import MASK
from app.store.diagnostics.requests import (
    ABSENT,
    MAX_OPEN,
    Arguments,
    EngineRequests,
    Question,
    Reply,
    inspect_question,
    logs_question,
)
from app.store.vault.seal import Secrets
from app.work.worker import Worker
from tests.work.stage import Gate, Stage

SECRET = "s3cr3t-of-a-client"


async def talking(stage: Stage, worker: Worker, *lines: str, tenant: str = "default") -> UUID:
    sandbox_id = await stage.running(worker, secrets=Secrets({"PLAIN": SECRET}), tenant=tenant)
    stage.engine.write(sandbox_id, *lines)
    return sandbox_id


async def ask(stage: Stage, question: Question, engine: str = "default") -> Reply:
    """As an API process does."""
    requests = EngineRequests(stage.database)
    with stage.signal.subscribe(question.id) as news:
        await requests.ask(question, engine)
        stage.signal.poke(stage.engines.stream_id(engine), work=False)
        async with asyncio.timeout(30):
            while (reply := await requests.take(question.id, question.tenant)) is None:
                await news.wait(1)
    return reply


async def left(stage: Stage) -> list[Any]:
    return await stage.sql("SELECT * FROM sandledger.engine_requests")


async def test_a_log_is_shown_without_secrets(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker, f"PLAIN={SECRET}", "two", "three")
    async with stage.working(worker):
        reply = await ask(stage, logs_question("default", sandbox_id, Arguments()))
        last = await ask(stage, logs_question("default", sandbox_id, Arguments(tail=1)))
        none = await ask(stage, logs_question("default", sandbox_id, Arguments(since_s=0)))
    shown = msgspec.json.decode(reply.answer or "", type=LogText)
    assert [line.partition(" ")[2] for line in shown.text.splitlines()] == [f"PLAIN={MASK}", "two", "three"]
    assert SECRET not in repr(reply)
    one = msgspec.json.decode(last.answer or "", type=LogText)
    assert (one.text.partition(" ")[2], one.more) == ("three\n", True)
    assert msgspec.json.decode(none.answer or "", type=LogText).text == ""
    assert not await left(stage), "an answer is taken once"


async def test_an_inspection_is_shown_without_secrets(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    async with stage.working(worker):
        reply = await ask(stage, inspect_question("default", sandbox_id))
    shown = msgspec.json.decode(reply.answer or "", type=Inspection)
    assert (shown.status, shown.env) == ("running", {"PLAIN": MASK})
    assert SECRET not in (reply.answer or "")


async def test_of_another_tenant_or_engine_there_is_nothing(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker, "one", tenant="acme")
    never = await stage.create(image="missing/image:1")
    async with stage.working(worker):
        for question in (
            logs_question("default", sandbox_id, Arguments()),
            inspect_question("default", sandbox_id),
            logs_question("default", UUID(int=7), Arguments()),
            logs_question("default", never, Arguments()),
        ):
            reply = await ask(stage, question)
            assert (reply.answer, reply.error) == (None, ABSENT)
    assert await EngineRequests(stage.database).claim("another", 9, 1) == []


async def test_an_answer_is_taken_by_its_tenant_only(stage: Stage):
    requests = EngineRequests(stage.database)
    question = logs_question("acme", UUID(int=7), Arguments())
    await requests.ask(question, "default")
    await requests.answer(question, "{}")
    assert await requests.take(question.id, "default") is None
    await requests.forget(question.id, "default")
    assert await requests.take(question.id, "acme") == Reply("{}", None)


async def test_a_worker_that_dies_with_a_question(stage: Stage):
    """Another one answers when the lease ends; what the first one finds out later is thrown away."""
    worker, requests = stage.worker(), EngineRequests(stage.database)
    sandbox_id = await talking(stage, worker, "one")
    question = logs_question("default", sandbox_id, Arguments())
    await requests.ask(question, "default")
    (claimed,) = await requests.claim("default", 9, 3600)
    assert claimed == question
    assert await requests.claim("default", 9, 3600) == [], "a question is answered once"
    await stage.sql("UPDATE sandledger.engine_requests SET lease_until = clock_timestamp()")
    async with stage.working(worker):
        async with asyncio.timeout(30):
            while not (await left(stage))[0]["answered_at"]:
                await asyncio.sleep(0.01)
    await requests.answer(question, None, "late")
    reply = await requests.take(question.id, "default")
    assert reply is not None
    assert reply.answer is not None
    assert "one" in reply.answer


async def test_an_engine_that_hangs_is_an_answer(stage: Stage):
    maker, gate = stage.worker(), Gate("logs")
    sandbox_id = await talking(stage, maker, "one")
    worker = stage.worker(stage.driver(gate), answer_within=0.05)
    async with stage.working(worker):
        reply = await ask(stage, logs_question("default", sandbox_id, Arguments()))
        assert reply == Reply(None, "The engine did not answer within 0.05 s.")
        other = await ask(stage, inspect_question("default", sandbox_id))
        assert other.answer is not None, "one question that hangs leaves the others alone"


async def test_while_the_engine_is_away_nothing_is_claimed(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker, "one")
    stage.engine.down = True
    await worker.station.contact()
    asking = asyncio.create_task(ask(stage, logs_question("default", sandbox_id, Arguments())))
    async with stage.working(worker):
        asked = stage.engine.calls["version"]
        async with asyncio.timeout(30):
            while stage.engine.calls["version"] < asked + 3:
                await asyncio.sleep(0.01)
        (row,) = await left(stage)
        assert row["lease_until"] is None
        stage.engine.down = False
        assert (await asking).answer is not None


async def test_questions_live_for_a_minute(stage: Stage):
    requests = EngineRequests(stage.database)
    for number in range(2):
        await requests.ask(logs_question("default", UUID(int=number), Arguments()), "default")
    await stage.sql(
        "UPDATE sandledger.engine_requests SET asked_at = asked_at - interval '61 s' WHERE stream_id = $1", UUID(int=0)
    )
    assert [each.stream_id for each in await requests.claim("default", 9, 1)] == [UUID(int=1)]
    assert await requests.purge() == 1
    assert [row["stream_id"] for row in await left(stage)] == [UUID(int=1)]


async def test_more_questions_than_are_answered_at_once(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker, "one")
    async with stage.working(worker):
        replies = await asyncio.gather(
            *(ask(stage, logs_question("default", sandbox_id, Arguments())) for _ in range(30))
        )
    assert all(reply.answer is not None for reply in replies)


async def asked(stage: Stage, tenant: str, count: int, most: int = MAX_OPEN) -> int:
    """Questions about nothing. Says how many were taken."""
    requests = EngineRequests(stage.database)
    questions = [logs_question(tenant, UUID(int=7), Arguments()) for _ in range(count)]
    return sum(await asyncio.gather(*(requests.ask(each, "default", most) for each in questions)))


async def test_a_tenant_has_so_many_open_questions(stage: Stage):
    for _ in range(3):
        await asked(stage, "hostile", 50, 64)
    mine = len([row for row in await left(stage) if row["tenant"] == "hostile"])
    assert 64 <= mine <= 64 + 10, "those of one instant may exceed it, and no more than there are connections"
    assert await asked(stage, "default", 1) == 1
    requests = EngineRequests(stage.database)
    assert not await requests.ask(logs_question("hostile", UUID(int=7), Arguments()), "default")
    await stage.sql("UPDATE sandledger.engine_requests SET answered_at = clock_timestamp() WHERE tenant = 'hostile'")
    assert await asked(stage, "hostile", 1) == 1, "answered ones are not open"


async def test_the_next_question_is_that_of_the_tenant_with_the_fewest(stage: Stage):
    """The oldest first, the naive way, has another tenant wait for all of the one that asks most."""
    await asked(stage, "hostile", 1000, 1000)
    await asked(stage, "default", 2)
    requests = EngineRequests(stage.database)
    oldest = await stage.sql("SELECT tenant FROM sandledger.engine_requests ORDER BY asked_at LIMIT 6")
    assert {row["tenant"] for row in oldest} == {"hostile"}
    found = await requests.claim("default", 6, 60, share=4)
    assert sorted(each.tenant for each in found) == ["default"] * 2 + ["hostile"] * 4
    assert await requests.claim("default", 2, 60, share=4, held={"hostile": 4}) == [], "its share is used up"
    (one,) = await requests.claim("default", 2, 60, share=4, held={"hostile": 3})
    assert one.tenant == "hostile"
    await asked(stage, "default", 1)
    ours, theirs = await requests.claim("default", 2, 60, share=4, held={"hostile": 1})
    assert (ours.tenant, theirs.tenant) == ("default", "hostile")


async def test_a_thousand_reads_that_hang_leave_another_tenants_one_alone(stage: Stage):
    maker, gate = stage.worker(), Gate("logs")
    theirs = await talking(stage, maker, "one", tenant="hostile")
    mine = await talking(stage, maker, "two")
    worker = stage.worker(stage.driver(gate), answer_within=3600)
    requests = EngineRequests(stage.database)
    for _ in range(1000):
        await requests.ask(logs_question("hostile", theirs, Arguments()), "default", 1000)
    async with stage.working(worker):
        stage.signal.poke(stage.engines.stream_id("default"), work=False)
        await gate.reached.wait()
        reply = await ask(stage, inspect_question("default", mine))
        assert reply.answer is not None
        gate.open.set()
