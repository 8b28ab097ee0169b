"""nginx in front: it asks our server for each request, carries the bytes itself, and hands over what it may not carry."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID

import pytest
from msgspec.structs import replace

from app.cli.nginx import Wanted, plan_of
from app.domain.sandbox import commands as cmd
from app.domain.tenants import ANY_TENANT
from app.errors import SettingsError
from app.proxy.decide import OURS, PATH
from app.proxy.nginx import configuration
from app.runtime.fake import FakeDriver, FakeEngine
from app.settings import ProxySettings, Settings
from app.settings.schema import ServerSettings
from tests.api.conftest import INSTALLATION, KEY, WORKER, MakeContext
from tests.proxy import rig as parts
from tests.proxy.nginx_pass import CORE, EXCEPTIONS, REFUSED_PATHS
from tests.proxy.rig import SECRET, Agent, Holding, Request, Rig, answer, calling, request, say, serving
from tests.proxy.test_states import Counting
from tests.proxy.websockets import HIDDEN, echo_back, echoes, ended, handshake, opened
from tests.support import nginx, tls

EVENTS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n"


@pytest.fixture
async def keyed(make_context: MakeContext) -> AsyncIterator[Rig]:
    async with serving(make_context()) as made:
        yield made


@pytest.fixture
def front(keyed: Rig) -> Iterator[nginx.Nginx]:
    with nginx.running(keyed.port, SECRET) as made:
        yield made


def get(sandbox: UUID, path: str = "a", *headers: str, method: str = "GET") -> bytes:
    return request(f"/v1/sandboxes/{sandbox}/proxy/3000/{path}", *headers, method=method, key=KEY)


def asks(uri: str, *headers: str, secret: str = SECRET) -> bytes:
    """The question that nginx asks."""
    said = {"Secret": secret, "Uri": uri, "Method": "GET", "Host": "127.0.0.1", "Client": "192.0.2.1", "Form": "path"}
    return request(PATH, *(f"X-Sandledger-{name}: {value}" for name, value in said.items()), *headers)


async def test_bytes_do_not_pass_our_server(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """An answer, an upload, an open stream and a WebSocket."""
    sandbox = await keyed.running(agent)
    agent.handlers["/proxy/3000/events"] = Holding(EVENTS)
    agent.handlers["/proxy/3000/ws"] = echoes
    keyed.relay.streams.enter = None  # type: ignore[assignment,method-assign]  # whatever it carried would fail
    assert (await say(front.port, get(sandbox))).status == 200
    sent = get(sandbox, "a", "Content-Length: 4", method="POST") + b"body"
    assert (await say(front.port, sent)).status == 200
    assert agent.requests[-1].body == b"body"
    async with calling(front.port) as reading, calling(front.port) as caller:
        reading.writer.write(get(sandbox, "events"))
        await reading.head()
        await opened(caller, handshake(sandbox, key=KEY))
        await echo_back(caller, b"x")
        assert len(agent.open) == 2
    await agent.until(lambda: not agent.open)


async def test_what_a_client_forges_counts_for_nothing(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """Under every name that passes between nginx and our server, on both ways; and no token comes back."""
    names = "Secret Client Scheme Method Uri Host Upgrade Length Protocol Form Target Path Prefix Port Policy"
    names += " Set-Host Set-Accept-Encoding Set-X-Execd-Access-Token Set-X-Forwarded-For Set-Via Set-Forwarded"
    async with parts.agent() as other:
        sandbox = await keyed.running(agent)
        values = {"Target": other.address, "Set-Host": "evil", "Client": "203.0.113.9", "Secret": "0" * 60}
        forged = [f"X-Sandledger-{name}: {values.get(name, 'forged')}" for name in names.split()]
        for headers in (forged, [*forged, "X-Sandledger-New: forged"], ["Sandledger-New: forged"]):
            for port in (front.port, keyed.port):
                for method in ("GET", "POST"):
                    reply = await say(port, get(sandbox, "a", *headers, method=method))
                    assert reply.status == 200
                    assert not [name for name, _ in reply.pairs if "sandledger" in name]
                    assert agent.token not in str(reply.pairs)
                    asked = agent.requests[-1]
                    assert b"forged" not in asked.head
                    assert not [name for name, _ in asked.pairs if b"sandledger-" in name]
                    assert asked.one("x-forwarded-for") == "127.0.0.1"
                    assert asked.one("x-execd-access-token") == agent.token
        assert other.connections == 0


async def test_who_has_the_secret_is_believed(keyed: Rig, agent: Agent):
    sandbox = await keyed.running(agent)
    for secret, expected in ((SECRET, ("203.0.113.9", "https")), ("0" * 60, ("127.0.0.1", "http"))):
        hop = (f"X-Sandledger-Secret: {secret}", "X-Sandledger-Client: 203.0.113.9", "X-Sandledger-Scheme: https")
        await say(keyed.port, get(sandbox, "a", *hop))
        asked = agent.requests[-1]
        assert (asked.one("x-forwarded-for"), asked.one("x-forwarded-proto")) == expected
        assert SECRET.encode() not in asked.head


async def test_without_the_secret_there_is_no_question(keyed: Rig, agent: Agent):
    sandbox = await keyed.running(agent)
    uri, key = f"/sandboxes/{sandbox}/proxy/3000/a", f"OPEN-SANDBOX-API-KEY: {KEY}"
    assert (await say(keyed.port, asks(uri, key), bodiless=True)).status == 204
    for secret in ("", "0" * 60, SECRET[:-1]):
        reply = await say(keyed.port, asks(uri, key, secret=secret))
        assert (reply.status, [name for name, _ in reply.pairs if name.startswith(OURS.decode())]) == (404, [])
    twice = asks(uri, key, f"X-Sandledger-Secret: {SECRET}")
    assert (await say(keyed.port, twice)).status == 404


async def test_a_client_of_nginx_cannot_ask(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """nginx shows its secret with all that it passes on, so the question of a client would be answered."""
    sandbox = await keyed.running(agent)
    uri = f"/v1/sandboxes/{sandbox}/proxy/3000/a"
    key = f"OPEN-SANDBOX-API-KEY: {KEY}"
    assert (await say(keyed.port, asks(uri, key))).status == 204
    for path in (PATH, PATH.replace("d", "%64"), f"/x/..{PATH}", f"{PATH}?", f"{PATH}/", PATH.replace("/p", "//p")):
        reply = await say(front.port, asks(uri, key, secret="").replace(PATH.encode(), path.encode(), 1))
        assert reply.status in (400, 404), path
        assert agent.address not in str(reply.pairs)


async def test_a_question_costs_no_row_and_no_engine_and_never_waits(make_context: MakeContext, agent: Agent):
    engine = FakeEngine()
    context = make_context(api_key=None, driver=FakeDriver(engine, INSTALLATION))
    view = Counting(context.database)
    async with serving(context, view=view) as rig:
        sandbox, pending = await rig.running(agent), await rig.pending()
        async with calling(rig.port) as caller:
            for _ in range(300):
                caller.writer.write(asks(f"/sandboxes/{sandbox}/proxy/3000/a"))
                reply = await caller.reply(bodiless=True)
                assert (reply.status, reply.one("x-sandledger-target")) == (204, agent.address)
            assert view.reads < 60
            caller.writer.write(asks(f"/sandboxes/{pending}/proxy/3000/a"))
            assert (await caller.reply()).status == 401, "the relay waits for it"
    assert agent.connections == 0
    assert not engine.calls


async def test_a_decision_holds_for_one_request(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """On one connection, without waiting for answers; and not for the next request when the sandbox has ended."""
    async with parts.agent() as other:
        sandboxes = {await keyed.running(agent): agent, await keyed.running(other): other}
        for each in sandboxes.values():
            said = each.token.encode()

            async def tells(
                _request: Request, _reader: object, writer: asyncio.StreamWriter, said: bytes = said
            ) -> None:
                writer.write(answer(said))

            each.handlers["/proxy/3000/a"] = tells
        async with calling(front.port) as caller:
            order = [*sandboxes] * 40
            caller.writer.write(b"".join(get(each) for each in order))
            for each in order:
                assert (await caller.reply()).body.decode() == sandboxes[each].token
            first = order[0]
            await keyed.service.execute(first, ANY_TENANT, cmd.Terminate(), WORKER)
            caller.writer.write(get(first) + get(order[1]))
            reply = await caller.reply()
            assert (reply.status, reply.code) == (404, "DOCKER::SANDBOX_NOT_FOUND")
            assert (await caller.reply()).status == 200


async def test_refusals_are_our_servers(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """For a body that is refused too: the same request goes to our server."""
    sandbox = await keyed.running(agent)
    path = f"/v1/sandboxes/{sandbox}/proxy/3000/a"
    body = b"x" * 100_000
    for headers, expected in (
        ((), (401, "MISSING_API_KEY")),
        ((f"OPEN-SANDBOX-API-KEY: {KEY}", "Sandledger-Generation: 7"), (410, "SANDBOX::ENDPOINT_REPLACED")),
    ):
        for sent in (
            request(path, *headers),
            request(path, *headers, f"Content-Length: {len(body)}", method="POST") + body,
        ):
            reply = await say(front.port, sent)
            assert (reply.status, reply.code) == expected
    assert agent.requests == []


async def test_what_may_act_is_sent_once(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """A read whose answer does not come is asked again by our server. And what nginx says is true."""

    async def ends(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    sandbox = await keyed.running(agent)
    agent.handlers["/proxy/3000/a"] = ends
    reply = await say(front.port, get(sandbox, "a", "Content-Length: 2", method="POST") + b"ab")
    assert (reply.status, reply.code) == (502, "BACKEND_RESPONSE_FAILED")
    assert "may have acted" in json.loads(reply.body)["message"]
    assert [each.method for each in agent.requests] == ["POST"]
    assert (await say(front.port, get(sandbox))).code == "BACKEND_RESPONSE_FAILED"
    assert [each.method for each in agent.requests] == ["POST", "GET", "GET"]
    await agent.stop()
    for method in ("POST", "GET"):
        reply = await say(front.port, get(sandbox, method=method))
        assert (reply.status, reply.code) == (502, "BACKEND_CONNECTION_FAILED")


async def test_a_program_does_not_steer_nginx(keyed: Rig, agent: Agent, front: nginx.Nginx):
    async def steers(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        headers = "X-Accel-Redirect: /.sandledger/decide\r\nX-Accel-Limit-Rate: 1\r\nStrict-Transport-Security: x\r\n"
        writer.write(answer(b"mine" * 1000, headers=f"{headers}Sandledger-Error: forged\r\nX-Sandledger-Secret: f\r\n"))

    sandbox = await keyed.running(agent)
    agent.handlers["/proxy/3000/a"] = steers
    reply = await say(front.port, get(sandbox))
    assert (reply.status, reply.body) == (200, b"mine" * 1000)
    names = {name for name, _ in reply.pairs}
    assert not {"x-accel-redirect", "strict-transport-security", "sandledger-error", "x-sandledger-secret"} & names


async def test_a_401_of_another_agent_is_found_out(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """Where the request may be repeated. What may act was refused by that agent before it did anything."""
    sandbox = await keyed.running(agent)
    agent.token = "of-another"
    for method in ("GET", "OPTIONS"):
        reply = await say(front.port, get(sandbox, method=method))
        assert (reply.status, reply.code) == (502, "PROXY::ADDRESS_NOT_PROVEN")
    assert (await say(front.port, get(sandbox, method="POST"))).status == 401


async def test_nginx_is_started_again(keyed: Rig, agent: Agent, front: nginx.Nginx):
    sandbox = await keyed.running(agent)
    assert (await say(front.port, get(sandbox))).status == 200
    front.stop()
    front.start()
    assert (await say(front.port, get(sandbox))).status == 200


async def test_paths_that_nginx_itself_refuses(keyed: Rig, agent: Agent, front: nginx.Nginx):
    sandbox = await keyed.running(agent)
    for rest in REFUSED_PATHS:
        reply = await say(front.port, get(sandbox, rest[1:]))
        assert reply.status == 400, rest
    assert agent.requests == []


async def test_what_nginx_reads_leniently_is_one_request_all_the_same(keyed: Rig, agent: Agent, front: nginx.Nginx):
    """Lines that end with LF alone, extensions and blanks of chunks: whatever passes has one framing, which is its own."""
    sandbox = await keyed.running(agent)
    chunked = get(sandbox, "a", "Transfer-Encoding: chunked", method="POST")
    for sent in (
        get(sandbox, "a", "X-A: b", method="POST").replace(b"\r\n", b"\n") + HIDDEN,
        get(sandbox, "a", "X-A: b\nContent-Length: 33", method="POST") + HIDDEN,
        get(sandbox, "a", "X-A: b\rContent-Length: 33", method="POST") + HIDDEN,
        chunked + b"2\nab\n0\n\n",
        chunked + b"2 \r\nab\r\n0\r\n\r\n",
        chunked + b"2;a=b\r\nab\r\n0\r\n\r\n",
        chunked + b"2;a=\nb\r\nab\r\n0\r\n\r\n",
        chunked + b"2\r\nabc\r\n0\r\n\r\n",
    ):
        agent.requests.clear()
        async with calling(front.port) as caller:
            caller.writer.write(sent)
            caller.writer.write_eof()
            await ended(caller)
        await agent.until(lambda: not agent.open)
        assert [each.target for each in agent.requests] in ([], ["/proxy/3000/a"]), sent
        assert not agent.requests or agent.requests[0].body in (b"", b"ab", HIDDEN), sent


def test_the_list_of_what_is_not_run_through_nginx_is_up_to_date():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert [name for name in (*EXCEPTIONS, *CORE) if f"def {name}(" not in text] == []
    assert not CORE & EXCEPTIONS.keys()


# The configuration


SERVER = ServerSettings(api_key=KEY)
KEYED = Settings(server=SERVER, proxy=ProxySettings(wildcard="*.Boxes.test:8443"))


def planned(settings: Settings = KEYED, secret_file: str = "/s", **options: object) -> str:
    return configuration(plan_of(settings, Wanted(**options), secret_file))  # type: ignore[arg-type]


def test_nginx_takes_it():
    with nginx.listening() as (listener, address):
        for domain in ("", "boxes.test"):
            config = configuration(nginx.plan(address, 1, domain))
            with nginx.made(config, SECRET, listener) as made:
                code, said = made.check()
                assert (code, "[warn]" in said) == (0, False), said
                (made.folder / "secret.conf").unlink()
                assert made.check()[0] == 1, "without the secret it does not start"


async def test_tls_ends_at_nginx(keyed: Rig, agent: Agent):
    sandbox, authority = await keyed.running(agent), tls.Authority("test")
    with nginx.listening() as (listener, address):
        pair = ("@folder@/front.crt", "@folder@/front.key")
        config = configuration(replace(nginx.plan(address, keyed.port), tls=pair))

        def prepare(folder: Path) -> None:
            for made, named in zip(authority.issue("front", folder), pair, strict=True):
                made.rename(named.replace("@folder@", str(folder)))

        with nginx.made(config, SECRET, listener, prepare) as front:
            front.start()
            context = ssl.create_default_context(cadata=authority.certificate.decode())
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port, ssl=context)
            for method in ("GET", "POST"):
                writer.write(get(sandbox, method=method))
                assert (await parts.Caller(reader, writer).reply()).status == 200
                assert agent.requests[-1].one("x-forwarded-proto") == "https"
            writer.close()


@pytest.mark.parametrize(
    "options",
    [
        {"listen": "80; include /etc/passwd"},
        {"listen": "80\n"},
        {"listen": "0"},
        {"listen": "65536"},
        {"listen": "host:80"},
        {"listen": "unix:/x"},
        {"listen": "[::1:80"},
        {"listen": "1.2.3:80"},
        {"listen": ""},
        {"domain": "evil.test"},
        {"domain": 'boxes.test"; x'},
        {"domain": "boxes.test\n"},
        {"tls": ("/c", "relative")},
        {"tls": ('/c"; x', "/k")},
        {"tls": ("/c", "/k$host")},
        {"tls": ("/c\n", "/k")},
        {"tls": ("/c\\", "/k")},
        {"proxy": "evil.test:80"},
        {"proxy": "8081"},
        {"proxy": "*:80"},
        {"proxy": "127.0.0.1:80 down"},
        {"secret_file": '/s"; x'},
        {"secret_file": "/s;{}"},
    ],
)
def test_an_option_writes_nothing_else_than_its_value(options: dict[str, object]):
    with pytest.raises(SettingsError, match="must be"):
        planned(**options)


def test_options_and_what_they_write():
    text = planned(listen="[::1]:443", tls=("/etc/a b/c.pem", "/k"), proxy="127.0.0.1:8081", domain="*.boxes.test")
    assert text.count("listen [::1]:443 ssl") == 2
    assert text.count('ssl_certificate "/etc/a b/c.pem";') == 2
    assert "server_name *.boxes.test;" in text
    assert text.count("server 127.0.0.1:8081;") == 2
    assert text.count("server 127.0.0.1:8080;") == 1
    assert "@" not in text.replace("@sandledger", "").replace("@away", "").replace("@unreachable", "").replace(
        "@undecided", ""
    )
    assert planned(Settings(server=SERVER)).count("\nserver {") == 1


@pytest.mark.parametrize(
    ("settings", "listen", "said"),
    [
        (Settings(), "0.0.0.0:80", "no API key"),
        (Settings(), "80", "no API key"),
        (Settings(), "[::]:80", "no API key"),
        (Settings(server=replace(SERVER, port=0)), "80", "server.port = 0"),
    ],
)
def test_a_server_without_a_key_is_not_opened_to_others(settings: Settings, listen: str, said: str):
    with pytest.raises(SettingsError, match=said):
        planned(settings, listen=listen)
    assert planned(Settings(), listen="127.0.0.1:80")
