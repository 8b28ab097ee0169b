"""Sandboxes whose address is leased: the program itself is asked, and the agent only when nothing accepts there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import UUID

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.address import AGENT_PORT, Way
from app.domain.sandbox.observed import Address, Observed, Part, Power
from app.domain.tenants import ANY_TENANT
from app.proxy.options import Options
from tests.api.conftest import WORKER, MakeContext
from tests.proxy import rig as parts
from tests.proxy.rig import TOKEN_KEY, Agent, Rig, answer, request, say, serving
from tests.proxy.test_links import cookie, link

NETWORK = "sandledger-0198f000"
HERE = Way(own_network=NETWORK, stands_on=lambda network: network == NETWORK)
ELSEWHERE = Way(own_network=NETWORK)
NOT_PROVEN = (502, "PROXY::ADDRESS_NOT_PROVEN")
FAILED = (502, "BACKEND_CONNECTION_FAILED")


@pytest.fixture
async def near(make_context: MakeContext) -> AsyncIterator[Rig]:
    async with serving(make_context(api_key=None), way=HERE) as made:
        yield made


@pytest.fixture
def ip() -> str:
    """An address of the loopback that no other test has."""
    return ".".join(["127", *(str(random.randint(1, 254)) for _ in range(3))])


@pytest.fixture
async def agent(ip: str) -> AsyncIterator[Agent]:
    """At its own port of the sandbox's own address."""
    async with parts.agent(AGENT_PORT, ip) as made:
        yield made


@pytest.fixture
async def program(ip: str) -> AsyncIterator[Agent]:
    """What the user runs: it wants no token."""
    async with parts.agent(host=ip) as made:
        yield made


async def leased(rig: Rig, ip: str, agent: Agent | None) -> UUID:
    """A running sandbox at this address. Its agent is published, as on a real engine."""
    sandbox = await rig.pending()
    ports = {} if agent is None else {"44772": agent.address, "8080": "127.0.0.1:1"}
    if agent is not None:
        agent.token = parts.agent_token(TOKEN_KEY, sandbox, 1)
    shown = Observed(
        sandbox,
        (Part("main", f"rt-{sandbox}", f"sandbox-{sandbox}"),),
        Power.RUNNING,
        address=Address(NETWORK, ip, ports),
    )
    await rig.service.execute(sandbox, ANY_TENANT, cmd.RecordSeen(shown), WORKER)
    return sandbox


def port_of(agent: Agent) -> int:
    return int(agent.address.rpartition(":")[2])


def asked(agent: Agent) -> list[parts.Request]:
    """What an agent was asked, beside whose the address is."""
    assert [each.target for each in agent.requests[:1]] in ([], ["/ping"])
    return agent.requests[1:]


async def ask(rig: Rig, sandbox: UUID, port: int, *headers: str, path: str = "a", **named: str) -> parts.Reply:
    return await say(rig.port, request(f"/v1/sandboxes/{sandbox}/proxy/{port}/{path}", *headers, **named))


async def test_the_program_itself_is_asked(near: Rig, ip: str, agent: Agent, program: Agent):
    sandbox = await leased(near, ip, agent)
    got = await ask(
        near,
        sandbox,
        port_of(program),
        "X-EXECD-ACCESS-TOKEN: given",
        "X_EXECD-ACCESS-TOKEN: too",
        path="a%2Fb//c?d=%41",
    )
    assert got.status == 200
    (request_,) = program.requests
    assert request_.target == "/a%2Fb//c?d=%41", "the agent would make a slash of %2F"
    assert request_.all("x-execd-access-token") == request_.all("x_execd-access-token") == []
    assert agent.token.encode() not in request_.head
    assert request_.all("accept-encoding") == [], "nobody in between who would decompress"
    assert request_.one("x-forwarded-prefix") == f"/v1/sandboxes/{sandbox}/proxy/{port_of(program)}"
    assert asked(agent) == []
    await ask(near, sandbox, port_of(program))
    assert len(agent.requests) == 1, "once a minute"


async def test_the_agent_of_another_sandbox_at_the_address(near: Rig, ip: str, agent: Agent, program: Agent):
    """A restored database has the leases of another day. The naive way trusts them."""
    sandbox = await leased(near, ip, agent)
    agent.token = "of-another"
    got = await ask(near, sandbox, port_of(program))
    assert (got.status, got.code) == NOT_PROVEN
    assert program.connections == 0


async def test_an_agent_that_has_ended_disowns_nobody(near: Rig, ip: str, agent: Agent, program: Agent):
    sandbox = await leased(near, ip, agent)
    await agent.stop()
    assert (await ask(near, sandbox, port_of(program))).status == 200


async def test_a_program_that_comes_later_is_asked_itself(near: Rig, ip: str, agent: Agent, program: Agent):
    """Clients ask again and again until it listens. The naive way remembers for a minute that it does not."""
    port = port_of(program)
    await program.stop()

    async def nothing(_: parts.Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        marks = "Content-Type: text/plain; charset=utf-8\r\nX-Content-Type-Options: nosniff\r\n"
        writer.write(answer(b"Bad Gateway\n", "502 Bad Gateway", marks))

    agent.handlers[f"/proxy/{port}/a"] = nothing
    sandbox = await leased(near, ip, agent)
    got = await ask(near, sandbox, port)
    assert (got.status, got.code) == FAILED
    await program.start(port, ip)
    assert (await ask(near, sandbox, port)).status == 200
    assert len(program.requests) == 1


async def test_without_an_agent_it_works_too(near: Rig, ip: str, program: Agent):
    sandbox = await leased(near, ip, None)
    assert (await ask(near, sandbox, port_of(program))).status == 200
    refused = await ask(near, sandbox, 1)
    assert (refused.status, refused.code) == FAILED
    assert b"listen on 0.0.0.0" in refused.body
    asked = await ask(near, sandbox, 44772)
    assert (asked.status, asked.code) == NOT_PROVEN, "there is no agent"


async def test_its_own_401_is_passed_on(near: Rig, ip: str, agent: Agent, program: Agent):
    async def refuses(_: parts.Request, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"mine", "401 Unauthorized"))

    program.handlers["/a"] = refuses
    sandbox = await leased(near, ip, agent)
    got = await ask(near, sandbox, port_of(program))
    assert (got.status, got.body) == (401, b"mine")
    assert asked(agent) == [], "it is not asked again"


async def test_what_listens_inside_only_is_reached_through_the_agent(near: Rig, ip: str, agent: Agent, program: Agent):
    """Once, whatever the method, since nothing was sent before; and remembered, also when something listens later."""
    port = port_of(program)
    await program.stop()
    sandbox = await leased(near, ip, agent)
    sent = request(f"/v1/sandboxes/{sandbox}/proxy/{port}/a", "Content-Length: 4", method="POST") + b"body"
    assert (await say(near.port, sent)).status == 200
    (first,) = asked(agent)
    assert (first.method, first.target, first.body) == ("POST", f"/proxy/{port}/a", b"body")
    assert first.all("x-execd-access-token") == [agent.token]
    await program.start(port, ip)
    assert (await ask(near, sandbox, port)).status == 200
    assert [each.target for each in asked(agent)] == [f"/proxy/{port}/a"] * 2
    assert program.connections == 0
    async with AsyncExitStack() as stack:
        other = await stack.enter_async_context(parts.agent(host=ip))
        assert (await ask(near, sandbox, port_of(other))).status == 200
        assert len(other.requests) == 1, "another port of it"


async def test_a_server_that_does_not_stand_there_uses_the_agent(
    make_context: MakeContext, ip: str, agent: Agent, program: Agent
):
    """The same address may be somebody else's where this server stands. The naive way asks whoever has it."""
    async with serving(make_context(api_key=None), way=ELSEWHERE) as far:
        sandbox = await leased(far, ip, agent)
        assert (await ask(far, sandbox, port_of(program))).status == 200
        assert len(agent.requests) == 1
        bare = await leased(far, ip, None)
        got = await ask(far, bare, port_of(program))
        assert (got.status, got.code) == NOT_PROVEN
    assert program.connections == 0


async def test_on_an_open_server_what_a_link_reaches_does_not_see_the_token(
    make_context: MakeContext, ip: str, agent: Agent, program: Agent
):
    """A visitor who reads it there could do with it what the link does not allow. Others bring a token of their own."""
    options = Options(parts.VIA, adds_token=False, links=parts.LINKS)
    async with serving(make_context(), is_open=True, options=options, way=ELSEWHERE, way_of_links=HERE) as opened:
        sandbox = await leased(opened, ip, agent)
        value = await link(opened, sandbox, port_of(program))
        assert (await ask(opened, sandbox, port_of(program), cookie(value))).status == 200
        assert asked(agent) == []
        assert agent.token.encode() not in program.requests[-1].head


async def test_on_another_network_nothing_is_leased(near: Rig, agent: Agent, program: Agent):
    sandbox = await near.running(agent)
    assert (await ask(near, sandbox, port_of(program))).status == 200
    assert (len(agent.requests), program.connections) == (1, 0)
