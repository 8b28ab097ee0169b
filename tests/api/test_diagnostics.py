"""Diagnostics on the wire: both forms of the contract, live, after the end, and of others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import httpx
import pytest
from litestar import Litestar

from app.api.app import create_app
from app.api.auth import Principal
from app.api.context import ApiContext
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.masking import MASK
from app.domain.stream import Actor, ActorKind
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeUnavailable
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.diagnostics.requests import MAX_OPEN, Arguments, EngineRequests, logs_question
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from tests.api.conftest import KEY, MakeContext, client, create, observe
from tests.work.stage import CLIENT, Raiser, Stage

SECRET = "s3cr3t-of-a-client"
KINDS = ("logs", "events", "inspect", "summary")


@pytest.fixture
async def stage(dsn: str, database: Database, service: Service, signal: Signal, sealer: Sealer) -> Stage:
    return Stage(dsn, database, service, signal, sealer)


@pytest.fixture
async def working(stage: Stage) -> AsyncIterator[Stage]:
    """With a worker, which has the engine that the API has not."""
    async with stage.working(stage.worker()):
        yield stage


async def talking(http: httpx.AsyncClient, stage: Stage, *lines: str) -> str:
    """A sandbox that runs and has written this."""
    made = await create(http, {"Prefer": "wait=30"}, env={"PLAIN": SECRET})
    assert made["status"]["state"] == "Running"
    stage.engine.write(UUID(made["id"]), *lines)
    return made["id"]


async def ended(http: httpx.AsyncClient, stage: Stage, sandbox_id: str) -> None:
    assert (await http.delete(f"/v1/sandboxes/{sandbox_id}")).status_code == 204
    async with asyncio.timeout(30):
        while (await stage.told(UUID(sandbox_id)))[-1] != "terminated":
            await asyncio.sleep(0.01)


class TestLogs:
    async def test_json(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working, f"PLAIN={SECRET}", "caf\u00e9")
        answer = await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/logs?scope=Container%20")
        assert answer.status_code == 200
        assert "deprecation" not in answer.headers
        assert answer.headers["cache-control"] == "no-store"
        found = answer.json()
        content = found.pop("content")
        assert [line.partition(" ")[2] for line in content.splitlines()] == [f"PLAIN={MASK}", "caf\u00e9"]
        assert found == {
            "sandboxId": sandbox_id,
            "kind": "logs",
            "scope": "container",
            "delivery": "inline",
            "contentType": "text/plain; charset=utf-8",
            "contentLength": len(content.encode()),
            "truncated": False,
        }

    async def test_all_carries_a_warning(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working)
        found = (await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/logs?scope=all")).json()
        assert len(found["warnings"]) == 1
        assert found["content"] == "(no logs)"

    async def test_a_hundred_lines(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working, *(f"line {n}" for n in range(150)))
        found = (await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/logs?scope=container&tail=3")).json()
        lines = found["content"].splitlines()
        assert (len(lines), lines[-1].partition(" ")[2], found["truncated"]) == (100, "line 149", True)

    @pytest.mark.parametrize("mount", ["", "/v1"])
    async def test_text(self, http: httpx.AsyncClient, working: Stage, mount: str):
        sandbox_id = await talking(http, working, "one", SECRET)
        path = f"{mount}/sandboxes/{sandbox_id}/diagnostics/logs"
        answer = await http.get(f"{path}?tail=1&container=any")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.headers["deprecation"] == "true"
        assert answer.text.partition(" ")[2] == f"{MASK}\n"
        assert (await http.get(f"{path}?since=1h")).text.count("\n") == 2
        assert (await http.get(f"{path}?since=0s")).text == "(no logs)"

    async def test_after_the_end(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working, "one", f"two {SECRET}")
        await ended(http, working, sandbox_id)
        assert (await http.get(f"/v1/sandboxes/{sandbox_id}")).status_code == 404
        path = f"/v1/sandboxes/{sandbox_id}/diagnostics/logs"
        found = (await http.get(f"{path}?scope=container")).json()
        assert [line.partition(" ")[2] for line in found["content"].splitlines()] == ["one", f"two {MASK}"]
        assert (await http.get(f"{path}?tail=1")).text.partition(" ")[2] == f"two {MASK}\n"
        await working.sql("UPDATE sandledger.kept_ends SET keep_until = clock_timestamp()")
        gone = await http.get(f"{path}?scope=container")
        assert (gone.status_code, gone.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")
        assert "deleted by" in gone.json()["message"]
        assert (await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/events")).status_code == 200

    async def test_of_an_end_whose_log_could_not_be_read(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working, "one")
        await ended(http, working, sandbox_id)
        await working.sql("UPDATE sandledger.kept_ends SET logs = NULL, error = 'The engine was busy.'")
        answer = await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/logs")
        assert answer.text == "(no logs: The engine was busy.)"

    async def test_before_there_is_anything(self, http: httpx.AsyncClient):
        made = await create(http)
        assert (await http.get(f"/v1/sandboxes/{made['id']}/diagnostics/logs")).text == "(no logs)"

    async def test_a_container_that_somebody_removed(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working, "one")
        del working.engine.containers[f"sandbox-{sandbox_id}"]  # nobody has noticed yet
        assert (await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/logs")).text == "(no logs)"


class TestEvents:
    async def test_json(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working)
        found = (await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/events?scope=RUNTIME")).json()
        assert (found["kind"], found["scope"], found["truncated"]) == ("events", "runtime", False)
        first, *lines = found["content"].splitlines()
        assert first.startswith("State:      Running (CONTAINER_RUNNING) since ")
        assert [line.split()[1] for line in lines] == await working.told(UUID(sandbox_id))
        assert " by api_key default" in lines[0]
        assert "warnings" not in found
        both = (await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/events?scope=all")).json()
        assert len(both["warnings"]) == 1

    async def test_text_and_the_last_of_many(self, http: httpx.AsyncClient, service: Service):
        made = await create(http)
        await observe(service, made["id"])
        for number in range(60):
            patch = cmd.PatchMetadata({"n": str(number)})
            await service.execute(UUID(made["id"]), ANY_TENANT, patch, CLIENT)
        path = f"/v1/sandboxes/{made['id']}/diagnostics/events"
        found = (await http.get(f"{path}?scope=all")).json()
        assert found["truncated"]
        assert len(found["content"].splitlines()) == 51
        answer = await http.get(f"{path}?limit=2")
        assert answer.headers["deprecation"] == "true"
        assert [line.split()[1] for line in answer.text.splitlines()[1:]] == ["metadata_patched"] * 2

    async def test_they_need_no_engine_and_outlive_all(self, http: httpx.AsyncClient):
        made = await create(http)
        await http.delete(f"/v1/sandboxes/{made['id']}")
        answer = await http.get(f"/v1/sandboxes/{made['id']}/diagnostics/events")
        assert "termination_requested by api_key default end_cause=user_delete" in answer.text


class TestInspect:
    async def test_live_and_after_the_end(self, http: httpx.AsyncClient, working: Stage):
        sandbox_id = await talking(http, working)
        path = f"/v1/sandboxes/{sandbox_id}/diagnostics/inspect"
        live = await http.get(path)
        assert live.headers["content-type"] == "text/plain; charset=utf-8"
        assert "deprecation" not in live.headers
        assert {f"Name:           sandbox-{sandbox_id}", "Status:         running", f"  PLAIN={MASK}"} <= set(
            live.text.splitlines()
        )
        await ended(http, working, sandbox_id)
        assert (await http.get(path)).text == live.text
        await working.sql("DELETE FROM sandledger.kept_ends")
        assert (await http.get(path)).status_code == 404

    async def test_before_there_is_anything(self, http: httpx.AsyncClient):
        made = await create(http)
        text = (await http.get(f"/v1/sandboxes/{made['id']}/diagnostics/inspect")).text
        assert "Status:         Pending" in text


async def test_the_summary(http: httpx.AsyncClient, working: Stage):
    sandbox_id = await talking(http, working, "one", SECRET)
    path = f"/v1/sandboxes/{sandbox_id}/diagnostics/summary"
    text = (await http.get(f"{path}?tail=1&event_limit=1")).text
    assert text.startswith("=" * 72 + f"\nSANDBOX DIAGNOSTICS SUMMARY\nSandbox ID: {sandbox_id}\n")
    assert text.endswith(f" {MASK}\n\n")
    assert [title for title in ("INSPECT", "EVENTS", "LOGS (last 1 lines)") if f"\n{title}\n" not in text] == []
    assert " one\n" not in text


class TestRefusals:
    @pytest.mark.parametrize("kind", KINDS)
    async def test_what_is_not_there(self, http: httpx.AsyncClient, kind: str):
        for sandbox_id in (uuid4(), "fsb-1", "no-uuid"):
            answer = await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/{kind}")
            assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")

    @pytest.mark.parametrize("kind", KINDS)
    async def test_another_tenant_sees_nothing(
        self, make_context: MakeContext, http: httpx.AsyncClient, working: Stage, kind: str
    ):
        sandbox_id = await talking(http, working, "one")
        theirs = create_app(
            make_context(authenticate=lambda key: Principal("acme", Actor(ActorKind.API_KEY, "k2", "acme")))
        )
        async with client(theirs, **{"OPEN-SANDBOX-API-KEY": "theirs"}) as stranger:
            for _ in range(2):  # live, and when it has ended
                answer = await stranger.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/{kind}")
                assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")
                assert "does not exist" in answer.json()["message"]
                await http.delete(f"/v1/sandboxes/{sandbox_id}")

    @pytest.mark.parametrize(
        ("query", "status", "code"),
        [
            ("logs?scope=runtime", 400, "DIAGNOSTICS_SCOPE_UNSUPPORTED"),
            ("logs?scope=", 400, "DIAGNOSTICS_SCOPE_UNSUPPORTED"),
            ("events?scope=container", 400, "DIAGNOSTICS_SCOPE_UNSUPPORTED"),
            ("logs?tail=0", 422, "GENERAL::VALIDATION_ERROR"),
            ("logs?tail=10001", 422, "GENERAL::VALIDATION_ERROR"),
            ("logs?tail=x", 422, "GENERAL::VALIDATION_ERROR"),
            ("logs?tail=1&tail=2", 422, "GENERAL::VALIDATION_ERROR"),
            ("events?limit=501", 422, "GENERAL::VALIDATION_ERROR"),
            ("summary?event_limit=0", 422, "GENERAL::VALIDATION_ERROR"),
            ("summary?tail=1e2", 422, "GENERAL::VALIDATION_ERROR"),
        ],
    )
    async def test_bad_input(self, http: httpx.AsyncClient, query: str, status: int, code: str):
        made = await create(http)
        answer = await http.get(f"/v1/sandboxes/{made['id']}/diagnostics/{query}")
        assert (answer.status_code, answer.json()["code"]) == (status, code)

    async def test_when_no_worker_answers(self, make_context: MakeContext, service: Service, stage: Stage):
        async with client(
            create_app(make_context(diagnostics_wait_seconds=0.05)), **{"open-sandbox-api-key": KEY}
        ) as http:
            made = await create(http)
            await observe(service, made["id"])
            for kind in ("logs", "inspect", "summary"):
                answer = await http.get(f"/v1/sandboxes/{made['id']}/diagnostics/{kind}")
                assert (answer.status_code, answer.json()["code"]) == (503, "DOCKER::SANDBOX_QUERY_FAILED")
                assert answer.headers["retry-after"] == "2"
        assert not await stage.sql("SELECT 1 FROM sandledger.engine_requests"), "it takes its question back"

    async def test_when_the_engine_is_in_trouble(self, http: httpx.AsyncClient, stage: Stage):
        trouble = Raiser(lambda: RuntimeUnavailable("the engine would not show a log (500)"), "logs")
        async with stage.working(stage.worker(stage.driver(trouble))):
            sandbox_id = await talking(http, stage, "one")
            answer = await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/logs")
        assert (answer.status_code, answer.json()["code"]) == (503, "DOCKER::SANDBOX_QUERY_FAILED")
        assert "would not show a log" in answer.json()["message"]


async def test_a_stop_takes_the_questions_back(
    app: Litestar, context: ApiContext, http: httpx.AsyncClient, service: Service, stage: Stage
):
    made = await create(http)
    await observe(service, made["id"])
    asking = asyncio.create_task(http.get(f"/v1/sandboxes/{made['id']}/diagnostics/logs"))
    async with asyncio.timeout(30):
        while not await stage.sql("SELECT 1 FROM sandledger.engine_requests"):
            await asyncio.sleep(0.01)
    assert context.waiters.count == 1
    context.stopping.set()
    assert (await asking).status_code == 503
    assert context.waiters.count == 0
    assert not await stage.sql("SELECT 1 FROM sandledger.engine_requests")


async def test_a_tenant_with_too_many_open_reads_is_told_when_to_ask_again(http: httpx.AsyncClient, stage: Stage):
    """No worker answers here, so all of them stay open."""
    worker = stage.worker()
    sandbox_id = await stage.running(worker)
    requests = EngineRequests(stage.database)
    for _ in range(MAX_OPEN):
        assert await requests.ask(logs_question("default", sandbox_id, Arguments()), "default")
    for kind in ("logs?scope=container", "logs", "inspect", "summary"):
        answer = await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/{kind}")
        assert (answer.status_code, answer.json()["code"]) == (503, "ENGINE::TOO_MANY_QUESTIONS")
        assert int(answer.headers["retry-after"]) > 0
    assert (await http.get(f"/v1/sandboxes/{sandbox_id}/diagnostics/events?scope=runtime")).status_code == 200
    assert len(await stage.sql("SELECT 1 FROM sandledger.engine_requests")) == MAX_OPEN
