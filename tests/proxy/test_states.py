"""Who may reach which sandbox, and what stands in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from uuid import UUID, uuid4

import pytest

from app.api.auth import Principal
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.address import Way
from app.domain.sandbox.observed import Address, Power
from app.domain.sandbox.state import Sandbox
from app.domain.stream import Actor, ActorKind
from app.domain.tenants import ANY_TENANT, AnyTenant
from app.proxy.refusals import Refusal
from app.proxy.resolve import Access, target_of
from app.runtime.fake import FakeDriver, FakeEngine
from app.views.current import CurrentView
from tests.api.conftest import INSTALLATION, KEY, WORKER, MakeContext
from tests.proxy import rig as parts
from tests.proxy.rig import Agent, Reply, Rig, calling, request, say, serving
from tests.support.stream import Stream as Running

NOT_FOUND = (404, "DOCKER::SANDBOX_NOT_FOUND")
NOT_RUNNING = (409, "DOCKER::SANDBOX_NOT_RUNNING")
NOT_PROVEN = (502, "PROXY::ADDRESS_NOT_PROVEN")
POD_IP = (404, "KUBERNETES::POD_IP_NOT_AVAILABLE")
PRINCIPALS = {
    name: Principal(f"tenant-{name}", Actor(ActorKind.API_KEY, f"id-{name}", name)) for name in ("owner", "stranger")
}


@pytest.fixture
async def keyed(make_context: MakeContext) -> AsyncIterator[Rig]:
    async with serving(make_context()) as made:
        yield made


async def ask(rig: Rig, sandbox: UUID, *headers: str, port: int = 3000, **named: str) -> Reply:
    return await say(rig.port, request(f"/v1/sandboxes/{sandbox}/proxy/{port}/a", *headers, **named))


def refused(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.code


async def test_a_key_is_asked_for(keyed: Rig, agent: Agent):
    sandbox = await keyed.running(agent)
    reply = await ask(keyed, sandbox)
    assert refused(reply) == (401, "MISSING_API_KEY")
    assert reply.one("www-authenticate")
    assert refused(await ask(keyed, sandbox, key="wrong")) == (401, "INVALID_API_KEY")
    assert refused(await ask(keyed, sandbox, port=0)) == (401, "MISSING_API_KEY"), "before anything else is said"
    assert refused(await ask(keyed, uuid4())) == (401, "MISSING_API_KEY")
    assert refused(await ask(keyed, sandbox, f"OPEN-SANDBOX-API-KEY: {KEY}", key=KEY)) == (
        400,
        "GENERAL::INVALID_HEADER",
    )
    assert agent.requests == []
    assert (await ask(keyed, sandbox, key=KEY)).status == 200
    assert agent.requests[-1].all("open-sandbox-api-key") == []


async def test_an_open_proxy_asks_for_none_and_adds_no_token(make_context: MakeContext, agent: Agent):
    async with serving(make_context(), is_open=True) as rig:
        sandbox = await rig.running(agent)
        reply = await ask(rig, sandbox)
        assert (reply.status, reply.body) == (401, b"secret of another sandbox"), "the agent's own, to its own caller"
        assert (await ask(rig, sandbox, f"X-EXECD-ACCESS-TOKEN: {agent.token}")).status == 200
        assert (await ask(rig, sandbox, f"X-EXECD-ACCESS-TOKEN: {agent.token}", port=44772)).status == 200


async def test_without_keys_only_this_machine_and_its_own_pages(rig: Rig, agent: Agent, sandbox: UUID):
    for host in ("localhost", "127.0.0.1:80", "[::1]:8080"):
        assert (await ask(rig, sandbox, host=host)).status == 200
    agent.requests.clear()
    assert refused(await ask(rig, sandbox, host="rebound.example")) == (403, "SANDLEDGER::HOST_NOT_ALLOWED")
    for method in ("GET", "POST", "OPTIONS"):
        for header in ("Origin: http://evil.example", "Sec-Fetch-Site: cross-site"):
            reply = await ask(rig, sandbox, header, method=method)
            assert refused(reply) == (403, "SANDLEDGER::ORIGIN_NOT_ALLOWED"), "a GET may act in the sandbox"
    assert agent.requests == []
    assert (await ask(rig, sandbox, "Origin: http://127.0.0.1")).status == 200


async def test_a_sandbox_of_another_tenant_does_not_exist(make_context: MakeContext, agent: Agent):
    async with serving(make_context(authenticate=PRINCIPALS.get)) as rig:
        sandbox = await rig.running(agent, tenant="tenant-owner")
        assert (await ask(rig, sandbox, key="owner")).status == 200
        foreign, absent = await ask(rig, sandbox, key="stranger"), await ask(rig, uuid4(), key="stranger")
        assert refused(foreign) == refused(absent) == NOT_FOUND
        assert foreign.body.replace(str(sandbox).encode(), b"") == absent.body[: len(absent.body)].replace(
            absent.body.split(b"Sandbox ")[1].split(b" ")[0], b""
        )
        assert len(agent.requests) == 1
        assert (await ask(rig, sandbox, key="owner")).status == 200


async def test_an_end_says_when_and_why(rig: Rig, agent: Agent, sandbox: UUID):
    assert (await ask(rig, sandbox)).status == 200
    await rig.service.execute(sandbox, ANY_TENANT, cmd.Terminate(), WORKER)
    reply = await ask(rig, sandbox)
    assert refused(reply) == NOT_FOUND
    assert b"user_delete" in reply.body or b"deleted" in reply.body
    assert len(agent.requests) == 1, "at once, not when a kept row is a second old"


async def test_what_does_not_run_is_not_connected_to(rig: Rig, agent: Agent, sandbox: UUID):
    await rig.paused(sandbox)
    assert refused(await ask(rig, sandbox)) == NOT_RUNNING
    await rig.runs(sandbox, None, power=parts.Power.RUNNING)
    exited = await rig.running(agent)
    await rig.exits(exited, 3)
    reply = await ask(rig, exited)
    assert refused(reply) == NOT_RUNNING
    assert b"3" in reply.body
    assert agent.requests == []


async def test_an_address_without_an_agent_is_not_used(rig: Rig, agent: Agent):
    for ports in (None, {}, {"8080": agent.address}, {"44772": ""}, {"44772": "127.0.0.1"}):
        sandbox = await rig.pending()
        await rig.runs(sandbox, ports)
        assert refused(await ask(rig, sandbox)) == NOT_PROVEN
        assert refused(await ask(rig, sandbox, port=44772)) == NOT_PROVEN
    assert agent.connections == 0


async def test_an_address_that_means_every_address_is_this_machine(rig: Rig, agent: Agent):
    sandbox = await rig.pending()
    await rig.runs(sandbox, {"44772": agent.address.replace("127.0.0.1", "0.0.0.0")})
    assert (await ask(rig, sandbox)).status == 200


def test_on_the_host_network_the_agent_has_its_own_port():
    sandbox = Running().observe(Power.RUNNING, address=Address("host")).sandbox
    target = target_of(sandbox, 3000, Access(parts.TOKEN_KEY, Way("10.0.0.9"), has_agents=True))
    assert (target.address, target.path) == ("10.0.0.9:44772", "/proxy/3000")
    with pytest.raises(Refusal, match="ADDRESS_NOT_PROVEN"):
        target_of(sandbox, 3000, Access(parts.TOKEN_KEY, Way("10.0.0.9")))


async def test_another_generation_is_gone(rig: Rig, agent: Agent, sandbox: UUID):
    assert (await ask(rig, sandbox, "Sandledger-Generation: 1")).status == 200
    for given in ("0", "2", "17"):
        assert refused(await ask(rig, sandbox, f"Sandledger-Generation: {given}")) == (
            410,
            "SANDBOX::ENDPOINT_REPLACED",
        )
    for given in ("", "x", "-1", "1.0", "1, 1"):
        reply = await ask(rig, sandbox, f"Sandledger-Generation: {given}")
        assert refused(reply) == (400, "GENERAL::INVALID_HEADER")
    assert len(agent.requests) == 1


async def test_the_next_owner_of_an_address_is_found_out(rig: Rig, agent: Agent, sandbox: UUID):
    """Its agent does not take the token. Without the check its 401, body and all, would be the answer."""
    assert (await ask(rig, sandbox)).status == 200
    agent.token = "of-another"
    for port in (3000, 44772):
        for method in ("GET", "POST"):
            reply = await ask(rig, sandbox, port=port, method=method)
            assert refused(reply) == NOT_PROVEN
            assert b"secret" not in reply.body


async def test_the_programs_own_401_is_its_own(rig: Rig, agent: Agent, sandbox: UUID):
    async def asks(_request: object, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(parts.answer(b"log in", "401 Unauthorized", "WWW-Authenticate: Basic\r\n"))

    agent.handlers["/proxy/3000/a"] = asks
    reply = await ask(rig, sandbox)
    assert (reply.status, reply.body, reply.one("www-authenticate")) == (401, b"log in", "Basic")
    assert reply.one("sandledger-error") is None


async def test_nothing_listens(rig: Rig, agent: Agent, sandbox: UUID):
    await agent.stop()
    assert refused(await ask(rig, sandbox)) == (502, "BACKEND_CONNECTION_FAILED")


AGENTS_502 = "Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"


def bad_gateway(body: bytes = b"Bad Gateway\n", headers: str = AGENTS_502, *, whole: bool = True) -> parts.Handler:
    async def answers(request: parts.Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        sent = parts.answer(body, "502 Bad Gateway", headers)
        writer.write(sent[: -len(body)] if request.method == "HEAD" else sent if whole else sent[:-3])
        if not whole:
            writer.close()

    return answers


async def test_nothing_listens_on_the_port(rig: Rig, agent: Agent, sandbox: UUID):
    """The agent says that in words of its own, which no client of the public server knows."""
    agent.handlers["/proxy/3000/a"] = bad_gateway()
    for method in ("GET", "DELETE"):
        reply = await ask(rig, sandbox, method=method)
        assert refused(reply) == (502, "BACKEND_CONNECTION_FAILED")
        assert b"port 3000 inside the sandbox" in reply.body
    head = await say(rig.port, request(f"/v1/sandboxes/{sandbox}/proxy/3000/a", method="HEAD"), bodiless=True)
    assert (head.status, head.one("sandledger-error")) == (502, "BACKEND_CONNECTION_FAILED")


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"Bad gateway\n", AGENTS_502),
        (b"Bad Gateway\n", "Content-Type: text/plain; charset=utf-8\r\n"),
        (b"Bad Gateway\n", "Content-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n"),
        (b"Bad Gateway..", AGENTS_502),
        (b"{}", AGENTS_502),
    ],
)
async def test_the_programs_own_502_is_its_own(rig: Rig, agent: Agent, sandbox: UUID, body: bytes, headers: str):
    agent.handlers["/proxy/3000/a"] = bad_gateway(body, headers)
    reply = await ask(rig, sandbox)
    assert (reply.status, reply.body, reply.one("sandledger-error")) == (502, body, None)


async def test_a_502_that_ends_in_its_middle(rig: Rig, agent: Agent, sandbox: UUID):
    agent.handlers["/proxy/3000/a"] = bad_gateway(whole=False)
    assert refused(await ask(rig, sandbox)) == (502, "BACKEND_RESPONSE_FAILED")


async def test_errors_of_the_proxy_have_the_heads_of_all_our_answers(rig: Rig, agent: Agent, sandbox: UUID):
    ours = await say(rig.port, request("/v1/sandboxes"))
    error = await ask(rig, sandbox, port=0)
    assert error.status == 400
    for name in ("date", "server"):
        assert error.one(name), name
        assert bool(error.one(name)) == bool(ours.one(name))
    passed = await ask(rig, sandbox)
    assert (passed.status, passed.all("date")) == (200, []), "those of a program are its own"


async def test_a_pending_sandbox_is_waited_for(rig: Rig, agent: Agent):
    sandbox = await rig.pending()
    asking = asyncio.create_task(ask(rig, sandbox))
    await streams_are(rig, 1)
    agent.token = parts.agent_token(parts.TOKEN_KEY, sandbox, 1)
    await rig.runs(sandbox, {"44772": agent.address})
    assert (await asking).status == 200


async def test_one_that_stays_pending_is_the_signal_to_ask_again(make_context: MakeContext):
    async with serving(make_context(api_key=None), pending_seconds=0.1) as rig:
        reply = await ask(rig, await rig.pending())
        assert refused(reply) == POD_IP
        assert b"it waits" in reply.body, "it says for what"


async def test_a_wait_ends_when_the_client_leaves(rig: Rig):
    sandbox = await rig.pending()
    async with calling(rig.port) as caller:
        caller.writer.write(request(f"/sandboxes/{sandbox}/proxy/80/"))
        await streams_are(rig, 1)
    await streams_are(rig, 0)


async def test_a_wait_ends_when_the_server_stops(make_context: MakeContext):
    context = make_context(api_key=None)
    async with serving(context) as rig:
        asking = asyncio.create_task(ask(rig, await rig.pending()))
        await streams_are(rig, 1)
        context.stopping.set()
        assert refused(await asking) == POD_IP


async def test_a_failed_one_says_why_at_once(rig: Rig):
    sandbox = await rig.pending()
    asking = asyncio.create_task(ask(rig, sandbox))
    await streams_are(rig, 1)
    failure = cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "there is no such image")
    await rig.service.execute(sandbox, ANY_TENANT, failure, WORKER)
    reply = await asking
    assert refused(reply) == NOT_RUNNING
    assert b"there is no such image" in reply.body


class Counting(CurrentView):
    """Counts its reads."""

    reads = 0

    async def load(self, sandbox_id: UUID, tenant: str | AnyTenant) -> tuple[Sandbox, datetime] | None:
        self.reads += 1
        return await super().load(sandbox_id, tenant)


async def test_a_request_needs_no_engine_and_no_row_of_its_own(make_context: MakeContext, agent: Agent):
    engine = FakeEngine()
    context = make_context(api_key=None, driver=FakeDriver(engine, INSTALLATION))
    view = Counting(context.database)
    async with serving(context, view=view) as rig:
        sandbox = await rig.running(agent)
        async with calling(rig.port) as caller:
            for _ in range(300):
                caller.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/a"))
                assert (await caller.reply()).status == 200
        assert await asyncio.gather(*[ask(rig, sandbox) for _ in range(50)])
    assert len(agent.requests) == 350
    assert view.reads < 60
    assert not engine.calls


async def streams_are(rig: Rig, count: int) -> None:
    async with asyncio.timeout(30):
        while rig.relay.streams.open != count:
            await asyncio.sleep(0.005)
