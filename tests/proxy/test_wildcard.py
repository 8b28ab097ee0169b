"""Each port of a sandbox with a host of its own: `{port}-{id}.<domain>`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.proxy.route import Route, route
from app.settings import ProxySettings, Settings
from tests.api.conftest import KEY, WORKER, MakeContext
from tests.proxy.nginx_pass import passed
from tests.proxy.rig import Agent, Reply, Request, Rig, answer, calling, request, say, serving
from tests.proxy.test_paths import RESTS
from tests.proxy.test_states import PRINCIPALS
from tests.proxy.websockets import echoes, handshake, opened, refused

IDENTITY = "0198f000-0000-7000-8000-00000000aaaa"
WILDCARD = Settings(proxy=ProxySettings(wildcard="*.Boxes.test:8443"))


def host_of(sandbox: UUID, port: int = 3000) -> str:
    return f"{port}-{sandbox}.boxes.test"


@pytest.fixture
async def wild(make_context: MakeContext) -> AsyncIterator[Rig]:
    async with serving(make_context(api_key=None), settings=WILDCARD) as made:
        yield made


async def ask(rig: Rig, sandbox: UUID, target: str = "/a", *headers: str, port: int = 3000, **named: str) -> Reply:
    return await say(rig.port, request(target, *headers, host=host_of(sandbox, port), **named))


def by_host(host: str, target: bytes = b"/a") -> Route | None:
    return route(target, host.encode(), b"boxes.test")


@pytest.mark.parametrize("host", ["{}.boxes.test", "{}.BOXES.test", "{}.boxes.test:8443", "{}.boxes.test."])
def test_a_host_names_sandbox_and_port(host: str):
    named = f"80-{IDENTITY}"
    expected = Route(UUID(IDENTITY), 80, "", b"/a")
    assert by_host(host.format(named)) == by_host(host.format(named.upper())) == expected


def test_a_host_wins_over_the_path_and_an_absolute_target_over_the_host():
    other = f"/sandboxes/{uuid4()}/proxy/1/x".encode()
    assert by_host(f"80-{IDENTITY}.boxes.test", other) == Route(UUID(IDENTITY), 80, "", other)
    whole = f"http://80-{IDENTITY}.boxes.test:1/a?b".encode()
    assert by_host("elsewhere.test", whole) == Route(UUID(IDENTITY), 80, "", b"/a?b")
    assert by_host(f"80-{IDENTITY}.boxes.test", b"http://elsewhere.test/a") is None


@pytest.mark.parametrize(
    "host",
    [
        "boxes.test",
        "80.boxes.test",
        f"{IDENTITY}.boxes.test",
        f"{IDENTITY}-80.boxes.test",
        f"80-{IDENTITY}",
        f"80-{IDENTITY}.boxes.test.evil.test",
        f"80-{IDENTITY}.xboxes.test",
        f"80-{IDENTITY}.x.boxes.test",
        f"x.80-{IDENTITY}.boxes.test",
        f"80-{IDENTITY}0.boxes.test",
        f"80-{IDENTITY}.boxes.test:x",
        f"user@80-{IDENTITY}.boxes.test",
        "",
    ],
)
def test_other_hosts_name_none(host: str):
    assert by_host(host) is None


def test_without_a_domain_no_host_does():
    assert route(b"/a", f"80-{IDENTITY}.boxes.test".encode()) is None
    assert route(b"/a", f"80-{IDENTITY}.".encode()) is None


async def test_all_paths_are_the_programs(wild: Rig, agent: Agent):
    sandbox = await wild.running(agent)
    for rest in [*passed(RESTS, by_host=True), "/v1/sandboxes", "/health", f"/sandboxes/{uuid4()}/proxy/1/x"]:
        for port, path in ((44772, ""), (3000, "/proxy/3000")):
            reply = await ask(wild, sandbox, rest, port=port)
            assert reply.status == 200, reply.body
            assert agent.requests[-1].target == path + rest


async def test_both_forms_and_the_api_are_served(wild: Rig, agent: Agent):
    sandbox = await wild.running(agent)
    assert (await say(wild.port, request(f"/sandboxes/{sandbox}/proxy/3000/b"))).status == 200
    assert (await say(wild.port, request("/v1/sandboxes"))).status == 200
    assert [each.target for each in agent.requests] == ["/proxy/3000/b"]


async def test_the_origin_is_the_sandboxs_own(wild: Rig, agent: Agent):
    """Its cookies and passwords are its own, and so are its paths. Only a domain would reach its siblings."""

    async def sets(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        headers = (
            "Set-Cookie: a=1; Path=/x; Domain=boxes.test; HttpOnly\r\nSet-Cookie: b=2\r\n"
            "Location: /login\r\nSandledger-Error: forged\r\n"
        )
        writer.write(answer(b"", "302 Found", headers))

    sandbox = await wild.running(agent)
    agent.handlers["/proxy/3000/a"] = sets
    reply = await ask(wild, sandbox, "/a", "Cookie: c=3", "Authorization: Basic x", "X-Forwarded-Host: evil.test")
    asked = agent.requests[-1]
    assert (asked.one("cookie"), asked.one("authorization")) == ("c=3", "Basic x")
    assert asked.one("host") == asked.one("x-forwarded-host") == host_of(sandbox)
    assert asked.all("x-forwarded-prefix") == []
    assert asked.one("x-execd-access-token") == agent.token
    assert reply.all("set-cookie") == ["a=1; Path=/x; HttpOnly", "b=2"]
    assert (reply.one("location"), reply.one("sandledger-error")) == ("/login", None)


@pytest.mark.parametrize(("own", "client"), [("http://127.0.0.1:3000/l?m", True), ("http://elsewhere.test/l", False)])
async def test_a_redirect_to_the_programs_own_address(wild: Rig, agent: Agent, own: str, client: bool):
    sandbox = await wild.running(agent)

    async def leads(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"", "302 Found", f"Location: {own}\r\n"))

    agent.handlers["/proxy/3000/a"] = leads
    reply = await ask(wild, sandbox)
    assert reply.one("location") == (f"http://{host_of(sandbox)}/l?m" if client else own)


async def test_refusals_are_the_same(make_context: MakeContext, agent: Agent):
    async with serving(make_context(authenticate=PRINCIPALS.get), settings=WILDCARD) as rig:
        sandbox = await rig.running(agent, tenant="tenant-owner")
        gone = await rig.pending("tenant-owner")
        await rig.service.execute(gone, ANY_TENANT, cmd.Terminate(), WORKER)
        for given, port, headers, named, expected in (
            (sandbox, 3000, (), {}, (401, "MISSING_API_KEY")),
            (sandbox, 3000, (), {"key": "stranger"}, (404, "DOCKER::SANDBOX_NOT_FOUND")),
            (gone, 3000, (), {"key": "owner"}, (404, "DOCKER::SANDBOX_NOT_FOUND")),
            (sandbox, 0, (), {"key": "owner"}, (400, "DOCKER::INVALID_PORT")),
            (sandbox, 65536, (), {"key": "owner"}, (400, "DOCKER::INVALID_PORT")),
            (sandbox, 3000, ("Host: b",), {"key": "owner"}, (400, "GENERAL::INVALID_HEADER")),
            (sandbox, 3000, ("Sandledger-Generation: 2",), {"key": "owner"}, (410, "SANDBOX::ENDPOINT_REPLACED")),
        ):
            reply = await ask(rig, given, "/a", *headers, port=port, **named)
            assert (reply.status, reply.code) == expected
        assert agent.requests == []
        assert (await ask(rig, sandbox, key="owner")).status == 200


async def test_without_a_key_only_its_own_pages(wild: Rig, agent: Agent):
    """The page of one sandbox is not that of another, nor of the API."""
    sandbox, other = await wild.running(agent), await wild.pending()
    for origin in (f"http://{host_of(other)}", f"http://{host_of(sandbox, 3001)}", "http://localhost"):
        reply = await ask(wild, sandbox, "/a", f"Origin: {origin}")
        assert (reply.status, reply.code) == (403, "SANDLEDGER::ORIGIN_NOT_ALLOWED")
    reply = await say(
        wild.port, request("/v1/sandboxes", f"Origin: http://{host_of(sandbox)}", "Content-Length: 0", method="POST")
    )
    assert reply.status == 403
    reply = await say(wild.port, request("/v1/sandboxes", host="other.boxes.test"))
    assert reply.status == 403, "names under the domain that name no sandbox are no names of the API"
    assert agent.requests == []
    assert (await ask(wild, sandbox, "/a", f"Origin: http://{host_of(sandbox)}")).status == 200


async def test_a_websocket_by_host(make_context: MakeContext, agent: Agent):
    async with serving(make_context(), settings=WILDCARD) as rig:
        sandbox = await rig.running(agent)
        agent.handlers["/proxy/3000/ws"] = echoes
        sent = handshake(sandbox, key=KEY, host=host_of(sandbox)).replace(
            f"/sandboxes/{sandbox}/proxy/3000/ws".encode(), b"/ws"
        )
        assert await refused(rig, sent.replace(KEY.encode(), b"wrong")) == (401, "INVALID_API_KEY")
        async with calling(rig.port) as caller:
            await opened(caller, sent)
            caller.writer.write(b"x")
            assert await caller.reader.readexactly(1) == b"x"
