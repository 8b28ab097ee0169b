"""Pages of other origins: they need a key, and so the browser's question before the call has to be answered."""

from __future__ import annotations

import asyncio
from uuid import UUID, uuid4

import pytest

from tests.api.conftest import KEY, MakeContext
from tests.proxy.rig import Agent, Reply, Request, Rig, answer, request, say, serving

PAGE = "Origin: https://page.example"
ASKS = (PAGE, "Access-Control-Request-Method: PUT", "Access-Control-Request-Headers: open-sandbox-api-key, x-a")


async def ask(rig: Rig, sandbox: UUID, *headers: str, method: str = "GET", **named: str) -> Reply:
    sent = request(f"/v1/sandboxes/{sandbox}/proxy/3000/a", *headers, method=method, **named)
    return await say(rig.port, sent, bodiless=method == "OPTIONS")


def granted(reply: Reply) -> dict[str, str]:
    return {name: value for name, value in reply.pairs if name.startswith("access-control")}


async def test_with_a_key_the_question_is_answered(make_context: MakeContext, agent: Agent):
    """For any sandbox, so that it tells nothing."""
    async with serving(make_context()) as rig:
        for sandbox in (await rig.running(agent), uuid4()):
            reply = await ask(rig, sandbox, *ASKS, method="OPTIONS")
            assert reply.status == 204
            allowed = granted(reply)
            assert allowed["access-control-allow-origin"] == allowed["access-control-allow-methods"] == "*"
            assert "OPEN-SANDBOX-API-KEY" in allowed["access-control-allow-headers"]
            assert "access-control-allow-credentials" not in allowed
            assert reply.one("vary") == "Origin"
        assert agent.requests == []


async def test_the_call_and_its_refusal_can_be_read(make_context: MakeContext, agent: Agent):
    async with serving(make_context()) as rig:
        sandbox = await rig.running(agent)
        refused, served = await ask(rig, sandbox, PAGE), await ask(rig, sandbox, PAGE, key=KEY)
        assert (refused.status, served.status) == (401, 200)
        for reply in (refused, served):
            assert granted(reply) == {
                "access-control-allow-origin": "*",
                "access-control-expose-headers": "Retry-After, Sandledger-Error, X-Request-ID",
            }
        assert granted(await ask(rig, sandbox, key=KEY)) == {}, "no page asked"


async def test_the_program_decides_for_itself(make_context: MakeContext, agent: Agent):
    """And an OPTIONS that is no question, or that has the key, is the program's."""

    async def decides(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", headers="Access-Control-Allow-Origin: https://mine.example\r\n"))

    async with serving(make_context()) as rig:
        sandbox = await rig.running(agent)
        agent.handlers["/proxy/3000/a"] = decides
        mine = {"access-control-allow-origin": "https://mine.example"}
        assert granted(await ask(rig, sandbox, PAGE, key=KEY)) == mine
        assert granted(await ask(rig, sandbox, *ASKS, method="OPTIONS", key=KEY)) == mine
        assert granted(await ask(rig, sandbox, PAGE, method="OPTIONS", key=KEY)) == mine
        assert len(agent.requests) == 3


@pytest.mark.parametrize("is_open", [False, True])
async def test_without_a_key_nothing_is_allowed_by_us(make_context: MakeContext, agent: Agent, is_open: bool):
    """A keyless server refuses the page; an open proxy leaves it to the program."""
    async with serving(make_context() if is_open else make_context(api_key=None), is_open=is_open) as rig:
        sandbox = await rig.running(agent)
        agent.token = ""
        for headers, method in ((ASKS, "OPTIONS"), ((PAGE,), "GET")):
            reply = await ask(rig, sandbox, *headers, method=method)
            assert reply.status == (200 if is_open else 403)
            assert granted(reply) == {}
        assert len(agent.requests) == (2 if is_open else 0)
