"""Signed links over sockets: the first visit, the cookie, what does not hold, and the end of what it let in."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import pytest

from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Sandbox
from app.domain.tenants import ANY_TENANT, AnyTenant
from app.errors import StoreUnavailable
from app.proxy.limits import Limits, Streams
from app.proxy.links import in_cookies
from app.proxy.options import Options
from app.proxy.refusals import Refusal
from app.service.sandboxes import Service
from app.settings import LogSettings, ProxySettings, Settings
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.views.current import CurrentView
from tests.api.conftest import KEY, WORKER, MakeContext
from tests.conftest import as_server
from tests.log.test_signal import ready
from tests.proxy.rig import LINKS, VIA, Agent, Caller, Holding, Reply, Rig, calling, request, say, serving
from tests.proxy.test_states import streams_are
from tests.proxy.test_wildcard import WILDCARD, host_of
from tests.proxy.websockets import echo_back, echoes, ended, handshake, opened

INVALID = (401, "PROXY::LINK_INVALID")
EXPIRED = (401, "PROXY::LINK_EXPIRED")
REPLACED = (410, "SANDBOX::ENDPOINT_REPLACED")
NOT_ALLOWED = (403, "PROXY::PORT_NOT_ALLOWED")
FOREIGN = (403, "PROXY::ORIGIN_NOT_ALLOWED")
BEGUN = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nbegun\r\n"


@pytest.fixture
async def keyed(make_context: MakeContext) -> AsyncIterator[Rig]:
    """A server with a key, in both forms."""
    async with serving(make_context(), settings=WILDCARD) as made:
        yield made


@pytest.fixture
async def sandbox(keyed: Rig, agent: Agent) -> UUID:
    return await keyed.running(agent)


async def link(rig: Rig, sandbox: UUID, port: int = 3000, seconds: int = 60) -> str:
    """Its value, as the API gives it."""
    body = json.dumps({"expiresIn": seconds})
    head = request(
        f"/v1/sandboxes/{sandbox}/endpoints/{port}/links",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        method="POST",
        key=KEY,
    )
    reply = await say(rig.port, head + body.encode())
    assert reply.status == 201, reply.body
    return json.loads(reply.body)["url"].partition("sandledger_link=")[2]


async def revoke(rig: Rig, sandbox: UUID) -> None:
    head = request(f"/v1/sandboxes/{sandbox}/links", method="DELETE", key=KEY)
    assert (await say(rig.port, head, bodiless=True)).status == 204


async def ask(rig: Rig, sandbox: UUID, *headers: str, rest: str = "/a", port: int = 3000, **named: str) -> Reply:
    return await say(rig.port, request(f"/v1/sandboxes/{sandbox}/proxy/{port}{rest}", *headers, **named))


async def by_host(rig: Rig, sandbox: UUID, *headers: str, rest: str = "/a", port: int = 3000) -> Reply:
    return await say(rig.port, request(rest, *headers, host=host_of(sandbox, port)))


def cookie(value: str) -> str:
    return f"Cookie: a=1; sandledger-link={value}"


def refused(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.code


# The first visit and the cookie


async def test_by_path_the_first_visit_leads_to_the_page_and_the_cookie_opens_it(
    keyed: Rig, agent: Agent, sandbox: UUID
):
    value = await link(keyed, sandbox)
    for method in ("GET", "HEAD"):
        reply = await ask(keyed, sandbox, rest=f"/a%2Fb//?x=%41&sandledger_link={value}&y", method=method)
        prefix = f"/v1/sandboxes/{sandbox}/proxy/3000"
        assert (reply.status, reply.body, reply.one("location")) == (303, b"", f"{prefix}/a%2Fb//?x=%41&y")
        (set_cookie,) = reply.all("set-cookie")
        pair, age, *attributes = set_cookie.split("; ")
        assert pair == f"sandledger-link={value}"
        assert 1 <= int(age.removeprefix("Max-Age=")) <= 60
        assert attributes == [f"Path={prefix}", "HttpOnly", "SameSite=Lax"]
        assert (reply.one("referrer-policy"), reply.one("cache-control")) == ("no-referrer", "no-store")
        assert value not in str([pair for pair in reply.pairs if pair[0] != "set-cookie"])
    assert agent.requests == []
    reply = await ask(keyed, sandbox, f"Cookie: {pair}", rest="/a%2Fb//?x=%41&y")
    assert reply.status == 200
    asked = agent.requests[-1]
    assert asked.target == "/proxy/3000/a%2Fb//?x=%41&y"
    assert asked.one("x-execd-access-token") == agent.token, "a browser does not have it"
    assert value.encode() not in asked.head
    assert refused(await ask(keyed, sandbox)) == (401, "MISSING_API_KEY")


async def test_by_host_all_paths_are_open_and_the_programs_cookies_stay(keyed: Rig, agent: Agent, sandbox: UUID):
    value = await link(keyed, sandbox)
    reply = await by_host(keyed, sandbox, rest=f"/?sandledger_link={value}")
    assert (reply.status, reply.one("location")) == (303, "/")
    assert "Path=/;" in (reply.one("set-cookie") or "")
    reply = await by_host(keyed, sandbox, rest=f"//evil.test/?sandledger_link={value}")
    assert reply.one("location") == "/.//evil.test/", "no browser is sent to another host"
    reply = await by_host(keyed, sandbox, cookie(value), f"Referer: http://x/?sandledger_link={value}", rest="/b")
    assert reply.status == 200
    asked = agent.requests[-1]
    assert (asked.target, asked.one("cookie"), asked.one("referer")) == ("/proxy/3000/b", "a=1", None)
    assert refused(await by_host(keyed, sandbox, cookie(value), port=3001)) == INVALID


def test_cookies_that_a_sibling_has_set_do_not_hide_the_right_one():
    """Under TLS. A page can set the plain name for the whole domain, with paths that put them first."""
    cookies = "; ".join([*(f"sandledger-link=x{number}" for number in range(20)), "__Host-sandledger-link=right"])
    assert in_cookies([(b"cookie", cookies.encode())]) == ("right",)


def test_links_take_a_share_of_the_places():
    """Whoever has a link to one port could otherwise keep the owner out of the whole sandbox."""
    streams, sandbox = Streams(Limits(8, 8, 8)), UUID(int=1)
    guests = [streams.enter("default", sandbox, 0) for _ in range(2)]
    with pytest.raises(Refusal, match="PROXY::BUSY"):
        streams.enter("default", sandbox, 0)
    owner = [streams.enter("default", sandbox) for _ in range(6)]
    for each in (*owner, guests[0]):
        each.leave()
    streams.enter("default", sandbox, 0).leave()
    guests[1].leave()
    assert not streams._guests


async def test_behind_tls_the_cookie_is_of_this_host_alone(make_context: MakeContext, agent: Agent):
    options = Options(VIA, links=LINKS, secure=True, external_path="/edge")
    async with serving(make_context(), settings=WILDCARD, options=options) as rig:
        sandbox = await rig.running(agent)
        value = await link(rig, sandbox)
        reply = await by_host(rig, sandbox, rest=f"/a?sandledger_link={value}")
        assert (reply.one("set-cookie") or "").startswith(f"__Host-sandledger-link={value}; ")
        assert (reply.one("set-cookie") or "").endswith("; Path=/; HttpOnly; Secure; SameSite=Lax")
        assert (await by_host(rig, sandbox, f"Cookie: __Host-sandledger-link={value}")).status == 200
        reply = await ask(rig, sandbox, rest=f"?sandledger_link={value}")
        prefix = f"/edge/sandboxes/{sandbox}/proxy/3000"
        assert reply.one("location") == prefix
        assert f"; Path={prefix}; HttpOnly; Secure; " in (reply.one("set-cookie") or "")


async def test_what_keeps_no_cookies_sends_the_link_with_each_request(keyed: Rig, agent: Agent, sandbox: UUID):
    value = await link(keyed, sandbox)
    reply = await ask(keyed, sandbox, "Content-Length: 0", rest=f"/a?b&sandledger_link={value}", method="POST")
    assert reply.status == 200
    assert (agent.requests[-1].method, agent.requests[-1].target) == ("POST", "/proxy/3000/a?b")
    agent.handlers["/proxy/3000/ws"] = echoes
    async with calling(keyed.port) as caller:
        await opened(caller, handshake(sandbox, f"ws?sandledger_link={value}"))
        await echo_back(caller, b"x")
    assert agent.requests[-1].target == "/proxy/3000/ws"


async def test_with_a_key_a_link_counts_for_nothing_and_still_does_not_reach_the_sandbox(
    keyed: Rig, agent: Agent, sandbox: UUID
):
    reply = await ask(keyed, sandbox, cookie("v1.x"), rest="/a?sandledger_link=v1.x", key=KEY)
    assert reply.status == 200
    assert agent.requests[-1].target == "/proxy/3000/a"
    assert refused(await ask(keyed, sandbox, cookie(await link(keyed, sandbox)), key="wrong")) == (
        401,
        "INVALID_API_KEY",
    )


async def test_a_program_cannot_set_our_cookie(keyed: Rig, agent: Agent, sandbox: UUID):
    async def sets(_request: object, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nSet-Cookie: sandledger-link=x\r\nSet-Cookie: a=1; Path=/\r\n\r\n"
        )

    agent.handlers["/proxy/3000/a"] = sets
    value = await link(keyed, sandbox)
    reply = await by_host(keyed, sandbox, cookie(value))
    assert reply.all("set-cookie") == ["a=1; Path=/"]


async def test_without_keys_the_address_of_a_link_works_too(rig: Rig, agent: Agent):
    sandbox = await rig.running(agent)
    value = await link(rig, sandbox)
    reply = await ask(rig, sandbox, rest=f"/a?sandledger_link={value}")
    assert reply.status == 303
    for sent in (cookie(value), cookie("v1.old")):
        assert (await ask(rig, sandbox, sent)).status == 200, "a cookie that has expired locks nobody out"


async def test_on_an_open_server_a_link_brings_the_token(make_context: MakeContext, agent: Agent):
    async with serving(make_context(), is_open=True) as rig:
        sandbox = await rig.running(agent)
        assert (await ask(rig, sandbox)).body == b"secret of another sandbox"
        assert (await ask(rig, sandbox, cookie(await link(rig, sandbox)))).status == 200


# What does not hold


async def test_what_does_not_hold(keyed: Rig, agent: Agent, sandbox: UUID):
    value = await link(keyed, sandbox)
    assert (await ask(keyed, sandbox, cookie(value))).status == 200
    agent.requests.clear()
    other = await keyed.pending()
    changed = value[:-1] + ("0" if value[-1] != "0" else "1")
    for rest, sent in ((f"/a?sandledger_link={value}", ()), ("/a", (cookie(value),))):
        for port in (3001, 8080):
            assert refused(await ask(keyed, sandbox, *sent, rest=rest, port=port)) == INVALID
        for port in (44772, 18080):
            assert refused(await ask(keyed, sandbox, *sent, rest=rest, port=port)) == NOT_ALLOWED
            assert refused(await by_host(keyed, sandbox, *sent, rest=rest, port=port)) == NOT_ALLOWED
        for id_ in (other, uuid4()):
            assert refused(await ask(keyed, id_, *sent, rest=rest)) == INVALID
        assert refused(await ask(keyed, sandbox, *sent, rest=rest, port=0)) == (400, "DOCKER::INVALID_PORT")
    for wrong in (changed, "", "x", value.replace("v1", "v2"), value + "x", f"v1.{LINKS.id}.1.{'0' * 32}"):
        assert refused(await ask(keyed, sandbox, cookie(wrong))) == INVALID
        assert refused(await ask(keyed, sandbox, rest=f"/a?sandledger_link={wrong}")) == INVALID
    assert agent.requests == []
    assert (await ask(keyed, sandbox, cookie(changed), cookie(value))).status == 200, "the right one of two counts"


async def test_another_object_of_the_sandbox_and_its_end(keyed: Rig, agent: Agent, sandbox: UUID):
    value = await link(keyed, sandbox)
    await keyed.runs(sandbox, {"44772": agent.address}, generation=2)
    assert refused(await ask(keyed, sandbox, cookie(value))) == REPLACED
    again = await link(keyed, sandbox)
    await keyed.service.execute(sandbox, ANY_TENANT, cmd.Terminate(), WORKER)
    reply = await ask(keyed, sandbox, cookie(again))
    assert refused(reply) == REPLACED
    assert b"has ended" in reply.body
    assert b"default" not in reply.body, "who ended it is not for whoever has a link"
    assert refused(await ask(keyed, sandbox, cookie(again[:-1] + "x"))) == INVALID
    assert agent.requests == []


async def test_a_page_of_another_origin_does_not_act_by_the_cookie(make_context: MakeContext, agent: Agent):
    agent.handlers["/proxy/3000/ws"] = echoes
    async with serving(make_context(), settings=WILDCARD, allowed_origins=["https://ide.test"]) as rig:
        sandbox, sibling = await rig.running(agent), uuid4()
        value = await link(rig, sandbox)
        own = host_of(sandbox)
        foreign = ("https://evil.test", f"http://{host_of(sibling)}", f"http://{host_of(sandbox, 3001)}", "null")
        for origin, status in [*((one, 403) for one in foreign), (f"http://{own}", 200), ("https://IDE.test", 200)]:
            reply = await by_host(rig, sandbox, cookie(value), f"Origin: {origin}")
            assert reply.status == status, origin
            if status == 403:
                assert refused(reply) == FOREIGN
            sent = handshake(sandbox, "ws", cookie(value), f"Origin: {origin}", host=own)
            async with calling(rig.port) as caller:
                caller.writer.write(sent.replace(f"/sandboxes/{sandbox}/proxy/3000".encode(), b""))
                head, _ = await caller.head()
                assert head.startswith(b"HTTP/1.1 %d" % (101 if status == 200 else 403)), origin
        for site, mode, status in (("same-site", "no-cors", 403), ("cross-site", "navigate", 200)):
            sent = (cookie(value), f"Sec-Fetch-Site: {site}", f"Sec-Fetch-Mode: {mode}")
            assert (await by_host(rig, sandbox, *sent)).status == status


# Ends


async def streams(stack: AsyncExitStack, rig: Rig, sandbox: UUID, value: str) -> list[Caller]:
    """A response and a WebSocket, in both forms."""
    made: list[Caller] = []
    for host in ("127.0.0.1", host_of(sandbox)):
        caller = await stack.enter_async_context(calling(rig.port))
        path = "/sse" if host != "127.0.0.1" else f"/sandboxes/{sandbox}/proxy/3000/sse"
        caller.writer.write(request(path, cookie(value), host=host))
        await caller.head()
        assert await caller.chunk() == b"begun"
        made.append(caller)
        caller = await stack.enter_async_context(calling(rig.port))
        sent = handshake(sandbox, "ws", cookie(value), host=host)
        await opened(
            caller, sent.replace(b"/sandboxes/%b/proxy/3000" % str(sandbox).encode(), b"", host != "127.0.0.1")
        )
        await echo_back(caller, b"x")
        made.append(caller)
    return made


async def ends_soon(stack: AsyncExitStack, rig: Rig, sandbox: UUID) -> tuple[str, list[Caller]]:
    """Streams by a link that ends so soon that they had just the time to begin."""
    for seconds in (1, 4, 16, 64):
        value = await link(rig, sandbox, seconds=seconds)
        try:
            return value, await streams(stack, rig, sandbox, value)
        except (AssertionError, asyncio.IncompleteReadError):
            continue  # it ended before all of them had begun
    pytest.fail("no stream ever began")


def stands(agent: Agent) -> None:
    agent.handlers["/proxy/3000/ws"] = echoes
    agent.handlers["/proxy/3000/sse"] = Holding(BEGUN)


async def test_streams_end_with_the_link_also_while_the_database_is_away(
    make_context: MakeContext, agent: Agent, database: Database
):
    class Away(CurrentView):
        away = False

        async def load(self, sandbox_id: UUID, tenant: str | AnyTenant) -> Any:
            if self.away:
                raise StoreUnavailable("away")
            return await super().load(sandbox_id, tenant)

    stands(agent)
    view = Away(database)
    async with serving(make_context(), settings=WILDCARD, view=view) as rig, AsyncExitStack() as stack:
        sandbox = await rig.running(agent)
        lasting = await streams(stack, rig, sandbox, await link(rig, sandbox))
        short, ending = await ends_soon(stack, rig, sandbox)
        view.away = True
        for caller in ending:
            assert await ended(caller) == b"", "cut, without a clean end"
        await streams_are(rig, 4)
        for caller in lasting[1::2]:
            await echo_back(caller, b"still there")
        view.away = False
        assert refused(await ask(rig, sandbox, cookie(short))) == EXPIRED
        reply = await ask(rig, sandbox, rest=f"/a?sandledger_link={short}")
        assert refused(reply) == EXPIRED
        assert reply.all("set-cookie") == []


async def test_a_revocation_ends_streams_on_every_server(
    make_context: MakeContext, agent: Agent, dsn: str, signal: Signal
):
    """Those that a link let in, at every server. Those with a key go on, and links that are made after it hold."""
    stands(agent)
    database = Database(as_server(dsn))
    remote = Signal(database)
    hearing = asyncio.create_task(remote.run())
    parts = {"service": Service(database, remote), "signal": remote, "database": database}
    try:
        await ready(signal, remote)
        async with (
            serving(make_context(), settings=WILDCARD) as here,
            serving(make_context(**parts), settings=WILDCARD) as there,
            AsyncExitStack() as stack,
        ):
            sandbox = await here.running(agent)
            value = await link(here, sandbox)
            opened_by_link = [
                *await streams(stack, here, sandbox, value),
                *await streams(stack, there, sandbox, value),
            ]
            agent.handlers["/proxy/3000/hang"] = Holding(b"")
            hanging = await stack.enter_async_context(calling(there.port))
            hanging.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/hang", cookie(value)))
            await agent.until(lambda: agent.requests[-1].target.endswith("hang"))
            opened_by_link.append(hanging)
            by_key = await stack.enter_async_context(calling(there.port))
            await opened(by_key, handshake(sandbox, key=KEY))
            await revoke(here, sandbox)
            assert refused(await ask(here, sandbox, cookie(value))) == INVALID
            async with asyncio.timeout(20):
                for caller in opened_by_link:
                    assert await ended(caller) == b""
            assert refused(await ask(there, sandbox, cookie(value))) == INVALID
            await echo_back(by_key, b"still there")
            await streams_are(there, 1)
            assert (await ask(there, sandbox, cookie(await link(here, sandbox)))).status == 200
    finally:
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
        await database.close()


async def test_a_restart_keeps_links(make_context: MakeContext, agent: Agent):
    async with serving(make_context()) as first:
        sandbox = await first.running(agent)
        value = await link(first, sandbox)
        assert (await ask(first, sandbox, cookie(value))).status == 200
    async with serving(make_context(stopping=asyncio.Event())) as second:
        assert (await ask(second, sandbox, cookie(value))).status == 200


# Cost, strangers, and the canary


class Counted(CurrentView):
    """Counts reads, and holds them back."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.reads = self.at_once = self.most = 0
        self.go = asyncio.Event()
        self.go.set()

    async def load(self, sandbox_id: UUID, tenant: str | AnyTenant) -> tuple[Sandbox, Any] | None:
        self.reads += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.go.wait()
            return await super().load(sandbox_id, tenant)
        finally:
            self.at_once -= 1


async def test_a_link_costs_no_query_of_its_own(make_context: MakeContext, agent: Agent, database: Database):
    view = Counted(database)
    async with serving(make_context(), view=view) as rig:
        sandbox = await rig.running(agent)
        value = await link(rig, sandbox)
        for _ in range(100):
            assert (await ask(rig, sandbox, cookie(value))).status == 200
        assert view.reads < 50, "one for each second, and none for each request"


async def test_strangers_do_not_use_up_the_database(make_context: MakeContext, agent: Agent, database: Database):
    """Each asks for another sandbox, with a value that is well-formed: none of them can be refused without a read."""
    view = Counted(database)
    async with serving(make_context(), view=view) as rig, AsyncExitStack() as stack:
        sandbox = await rig.running(agent)
        value = await link(rig, sandbox)
        view.go.clear()
        callers = [await stack.enter_async_context(calling(rig.port)) for _ in range(300)]
        for caller in callers:
            caller.writer.write(request(f"/sandboxes/{uuid4()}/proxy/3000/a", cookie(value)))
        replies = [asyncio.create_task(caller.reply()) for caller in callers]
        done: set[asyncio.Task[Reply]] = set()
        async with asyncio.timeout(30):
            while len(done) < 300 - 256:
                done, _ = await asyncio.wait(replies, return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
        assert {refused(one.result()) for one in done} == {(503, "PROXY::BUSY")}
        view.go.set()
        rest = [await one for one in replies if one not in done]
        assert {refused(one) for one in rest} == {INVALID}
        assert view.most <= 4
        assert (await ask(rig, sandbox, cookie(value))).status == 200


async def test_the_link_is_in_no_line_of_the_log(
    make_context: MakeContext, agent: Agent, caplog: pytest.LogCaptureFixture
):
    """The access log has the target of each request, also of those that are refused or lead nowhere."""
    settings = Settings(log=LogSettings(level="DEBUG"), proxy=ProxySettings(wildcard="*.boxes.test"))
    with caplog.at_level(logging.DEBUG):
        async with serving(make_context(), settings=settings) as rig:
            sandbox = await rig.running(agent)
            value = await link(rig, sandbox)
            query = f"?b=1&sandledger_link={value}"
            for rest in (f"/a{query}", f"/a?sandledger%5flink={value}"):
                assert (await ask(rig, sandbox, rest=rest)).status == 303
                assert (await by_host(rig, sandbox, rest=rest)).status == 303
            assert (await ask(rig, sandbox, cookie(value))).status == 200
            for target in (f"/v1/sandboxes{query}", f"/nowhere{query}", f"/v1/sandboxes/{sandbox}/proxy/x{query}"):
                reply = await say(rig.port, request(target))
                assert reply.status in (400, 401, 404)
                assert value.encode() not in reply.body
    lines = [record.getMessage() for record in caplog.records]
    assert any("/proxy/3000/a?b=1" in line for line in lines), "requests are logged"
    assert not [line for line in lines if value.rpartition(".")[2] in line]
