"""The end of a sandbox's log outlives its removal: whatever dies in between, and without its secrets."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from msgspec import structs

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.diagnostics import LogText
from app.domain.sandbox.masking import MASK
from app.domain.sandbox.state import Phase
from app.errors import RuntimeUnavailable
from app.runtime.faults import AttemptFailed
from app.runtime.workload import Agent
from app.store.diagnostics.kept import End, KeptEnds, Run
from app.store.vault.seal import Secrets
from tests.work.stage import ENDED, Gate, Raiser, Stage

SECRET = "s3cr3t-of-a-client"
SAID = f"connecting with {SECRET}"


class Crash(BaseException):
    """The process dies here."""


async def talking(stage: Stage, worker: Any, *lines: str, **details: Any) -> UUID:
    sandbox_id = await stage.running(worker, secrets=Secrets({"PLAIN": SECRET}), **details)
    stage.engine.write(sandbox_id, *(lines or (SAID,)))
    return sandbox_id


async def kept(stage: Stage, sandbox_id: UUID) -> Any:
    rows = await stage.sql("SELECT * FROM sandledger.kept_ends WHERE stream_id = $1", sandbox_id)
    return rows[0] if rows else None


async def test_the_end_is_read_before_the_removal(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    assert not await stage.sql("SELECT 1 FROM sandledger.sealed_values WHERE stream_id = $1", sandbox_id), (
        "the naive way, to ask the vault what is secret, comes too late"
    )
    await stage.settle(worker)
    assert (await stage.told(sandbox_id))[-3:] == ENDED
    row = await kept(stage, sandbox_id)
    assert row["logs"].endswith(f" connecting with {MASK}\n")
    assert (row["tenant"], row["generation"], row["run"], row["error"]) == ("default", 1, 1, None)
    assert SECRET not in str(dict(row))
    end = await KeptEnds(stage.database).read(sandbox_id, "default")
    assert end is not None
    assert end.inspection is not None
    assert end.inspection.env == {"PLAIN": MASK}


async def test_the_exit_code_is_kept(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    stage.engine.exit(sandbox_id, 7, message=f"exec {SECRET}: not found")
    await worker.queue.enqueue([sandbox_id])
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.FAILED
    assert await kept(stage, sandbox_id) is None, "it is still there to be read"
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    end = await KeptEnds(stage.database).read(sandbox_id, "default")
    assert end is not None
    assert end.inspection is not None
    assert (end.inspection.exit_code, end.inspection.error) == (7, f"exec {MASK}: not found")


async def test_what_was_never_made_has_no_end(stage: Stage):
    worker = stage.worker()
    sandbox_id = await stage.create(image="missing/image:1")
    await stage.settle(worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    assert await kept(stage, sandbox_id) is None
    assert stage.engine.calls["logs"] == 0


async def test_a_worker_that_dies_between_reading_and_removing(stage: Stage):
    worker = stage.worker(stage.driver(Raiser(Crash, "remove")))
    sandbox_id = await talking(stage, worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    with pytest.raises(Crash):
        await stage.turn(worker)
    first = await kept(stage, sandbox_id)
    assert first["logs"]
    assert (await stage.told(sandbox_id))[-1] == "termination_requested"
    stage.engine.written.clear()  # what is left of its log is going
    await stage.make_overdue(sandbox_id)
    await stage.settle(stage.worker(worker_id="w2"))
    assert (await stage.told(sandbox_id))[-3:] == ENDED
    assert dict(await kept(stage, sandbox_id)) == dict(first)


async def test_what_is_kept_is_not_written_over(stage: Stage):
    """The naive way, to store what the last worker read, ends with nothing: by then the log is going, too."""
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    stage.engine.slow_removals = True
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.turn(worker)
    first = await kept(stage, sandbox_id)
    assert first["logs"]
    await stage.sql("CREATE TABLE public.naive AS SELECT * FROM sandledger.kept_ends")
    sandbox = await stage.sandbox(sandbox_id)
    late = await worker.diagnostics.logs(sandbox, 100)
    assert late is None, "the engine removes it"
    await stage.sql("UPDATE public.naive SET logs = NULL")
    assert not (await stage.sql("SELECT logs FROM public.naive"))[0]["logs"]
    store, run = KeptEnds(stage.database), Run(sandbox_id, 1, 1)
    await store.keep(run, "default", End(None, None, "the engine had no log"), days=7)
    await store.keep(run, "default", End(LogText("another\n"), None), days=7)
    for _ in range(3):
        await stage.make_due(sandbox_id)
        await stage.turn(worker)
    assert dict(await kept(stage, sandbox_id)) == dict(first)


async def test_an_end_without_a_log_is_completed_by_one_that_has_it(stage: Stage):
    store, run = KeptEnds(stage.database), Run(await stage.create(), 1, 1)
    await store.keep(run, "default", End(None, None, "in trouble"), days=7)
    assert not await store.is_done(run, 60)
    await store.keep(run, "default", End(LogText("line\n", more=True), None), days=7)
    assert await store.is_done(run, 60)
    assert await store.read(run.stream_id, "default") == End(LogText("line\n", more=True), None)


async def test_two_workers_keep_one_end(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    sandbox = await stage.sandbox(sandbox_id)
    gate = Gate("logs")
    others = [stage.worker(stage.driver(gate), worker_id=f"w{n}") for n in range(2)]
    both = [asyncio.create_task(other.diagnostics.keep(sandbox)) for other in others]
    await gate.reached.wait()
    gate.open.set()
    await asyncio.gather(*both)
    rows = await stage.sql("SELECT logs FROM sandledger.kept_ends WHERE stream_id = $1", sandbox_id)
    assert len(rows) == 1


@pytest.mark.parametrize("call", ["logs", "inspect"])
async def test_an_engine_that_hangs_holds_no_removal_up(stage: Stage, call: str):
    maker = stage.worker()
    sandbox_id = await talking(stage, maker)
    await stage.ask(sandbox_id, cmd.Terminate())
    gate = Gate(call)
    naive = stage.worker(stage.driver(gate), keep_end=3600)
    sandbox = await stage.sandbox(sandbox_id)
    waiting = asyncio.create_task(naive.diagnostics.keep(sandbox))
    await gate.reached.wait()
    done, _ = await asyncio.wait([waiting], timeout=0.2)
    assert not done, "without a limit it waits as long as the engine does"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    hasty = stage.worker(stage.driver(gate), keep_end=0.05)
    await hasty.diagnostics.keep(sandbox)
    row = await kept(stage, sandbox_id)
    assert row["logs"] is None
    assert "within 0.05 s" in row["error"]
    gate.open.set()
    await stage.settle(hasty)
    assert (await stage.told(sandbox_id))[-3:] == ENDED
    assert (await kept(stage, sandbox_id))["logs"], "the removal was asked for again, and the engine answers"


async def test_a_removal_that_fails_for_long_asks_no_more_for_the_log(stage: Stage):
    """Each attempt would else hold a slot until the engine does not answer for that, too."""
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    trouble = Raiser(lambda: AttemptFailed("REMOVE_FAILED", "device or resource busy"), "remove")
    silent = Raiser(lambda: RuntimeUnavailable("the engine would not show a log (500)"), "logs")

    async def both(call: str) -> None:
        await trouble(call)
        await silent(call)

    async def attempts(worker: Any, count: int) -> int:
        before = silent.raised
        for _ in range(count):
            await stage.make_due(sandbox_id)
            await stage.turn(worker)
        return silent.raised - before

    patient = stage.worker(stage.driver(both), keep_patience=3600)
    assert await attempts(patient, 3) == 3, "the naive way asks in every attempt"
    done = stage.worker(stage.driver(both), keep_patience=0)
    assert await attempts(done, 3) == 0
    assert trouble.raised == 6
    assert "the engine would not show a log" in (await kept(stage, sandbox_id))["error"]
    trouble.armed = False
    await stage.make_due(sandbox_id)
    await stage.settle(done)
    assert (await stage.told(sandbox_id))[-3:] == ["reconcile_failed", *ENDED[1:]]


async def test_an_engine_in_trouble_holds_no_removal_up(stage: Stage):
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    trouble = Raiser(lambda: RuntimeUnavailable("the engine would not show a log (500)"), "logs")
    await stage.settle(stage.worker(stage.driver(trouble)))
    assert (await stage.told(sandbox_id))[-3:] == ENDED
    row = await kept(stage, sandbox_id)
    assert (row["logs"], row["error"]) == (None, "the engine would not show a log (500)")
    assert row["inspect"], "what could be read is kept"


async def test_a_database_that_is_away_keeps_the_object(stage: Stage):
    """Nothing is removed whose end could not be stored."""
    worker = stage.worker()
    sandbox_id = await talking(stage, worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.sql("REVOKE INSERT ON sandledger.kept_ends FROM PUBLIC")
    (role,) = await stage.sql("SELECT app_role FROM sandledger.installation")
    await stage.sql(f"REVOKE INSERT ON sandledger.kept_ends FROM {role['app_role']}")
    await stage.turn(worker)
    assert stage.container(sandbox_id) is not None
    await stage.sql(f"GRANT INSERT ON sandledger.kept_ends TO {role['app_role']}")
    await stage.make_overdue(sandbox_id)
    await stage.settle(worker)
    assert (await kept(stage, sandbox_id))["logs"]
    assert stage.container(sandbox_id) is None


async def test_only_the_end_of_a_long_log(stage: Stage):
    worker = stage.worker()
    lines = [f"{n:05} {'x' * 90}" for n in range(2000)]
    sandbox_id = await talking(stage, worker, *lines, SAID)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    row = await kept(stage, sandbox_id)
    assert 60_000 < len(row["logs"].encode()) <= 64 * 1024
    assert row["more"]
    assert row["logs"].endswith(f"connecting with {MASK}\n")


async def test_the_token_of_the_agent_is_not_kept(stage: Stage):
    worker, token = stage.worker(), "t0ken-of-an-agent"
    sandbox_id = await talking(stage, worker, f"env: {token}")
    found = stage.container(sandbox_id)
    assert found is not None
    assert found.work is not None
    work = structs.replace(found.work, agent=Agent("volume", token))
    stage.engine.containers[found.name] = structs.replace(found, work=work)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    row = await kept(stage, sandbox_id)
    assert row["logs"].endswith(f"env: {MASK}\n")
    assert token not in str(dict(row))


async def test_nothing_is_kept_when_nothing_shall_be(stage: Stage):
    worker = stage.worker(keep_days=0)
    sandbox_id = await talking(stage, worker)
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    assert await kept(stage, sandbox_id) is None
    assert stage.engine.calls["logs"] == 0


async def test_what_is_old_goes(stage: Stage):
    worker, store = stage.worker(), KeptEnds(stage.database)
    old, young = [await talking(stage, worker) for _ in range(2)]
    for sandbox_id in (old, young):
        await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    row = await kept(stage, old)
    assert timedelta(days=7) <= row["keep_until"] - row["taken_at"] < timedelta(days=7, seconds=1)
    await stage.sql("UPDATE sandledger.kept_ends SET keep_until = clock_timestamp() WHERE stream_id = $1", old)
    assert await store.read(old, "default") is None, "not even before it is deleted"
    assert await store.purge() == 1
    assert await kept(stage, old) is None
    assert await store.read(young, "default") is not None


async def test_an_end_belongs_to_its_tenant(stage: Stage):
    worker, store = stage.worker(), KeptEnds(stage.database)
    sandbox_id = await talking(stage, worker, tenant="acme")
    await stage.ask(sandbox_id, cmd.Terminate())
    await stage.settle(worker)
    assert await store.read(sandbox_id, "acme") is not None
    assert await store.read(sandbox_id, "default") is None
