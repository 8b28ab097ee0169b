"""Lookups of endpoints: what they answer, how they wait, and that the token is in no other answer."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from litestar import Litestar
from msgspec.structs import replace

from app.agent import agent_token
from app.api.app import create_app
from app.api.context import ApiContext, EndpointParts
from app.api.waiters import Waiters
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.endpoints import Network
from app.domain.sandbox.links import LinkKey
from app.domain.sandbox.observed import Address
from app.domain.tenants import ANY_TENANT
from app.server.protocol import HttpProtocol
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.signal import Signal
from app.store.tables import metadata
from tests.api.conftest import ADDRESS, KEY, WORKER, MakeContext, client, create, seen
from tests.api.test_pinned import HEALTH
from tests.api.test_review_listener import _parsed, listening, say
from tests.conftest import as_server

AGENT_KEY = b"k" * 32
LINK_KEY = LinkKey(b"l" * 32)
AGENT = EndpointParts(AGENT_KEY, LINK_KEY, Network(agent=True), wait_seconds=60)
HASTY = EndpointParts(AGENT_KEY, LINK_KEY, Network(agent=True), wait_seconds=0.05)
NOT_YET = "KUBERNETES::POD_IP_NOT_AVAILABLE"


@pytest.fixture
def context(make_context: MakeContext) -> ApiContext:
    """Of a server that gives sandboxes an agent, and waits long."""
    return make_context(endpoints=AGENT)


async def up(service: Service, sandbox_id: str, address: Address | None = ADDRESS) -> None:
    """Record that it runs, with an agent."""
    shown = replace(seen(sandbox_id), address=address)
    await service.execute(UUID(sandbox_id), ANY_TENANT, cmd.RecordSeen(shown), WORKER)


def token_of(sandbox_id: str, generation: int = 1) -> str:
    return agent_token(AGENT_KEY, UUID(sandbox_id), generation)


async def waiting(context: ApiContext, count: int = 1) -> None:
    """Until so many requests wait."""
    async with asyncio.timeout(20):
        while context.waiters.count < count:
            await asyncio.sleep(0.01)


class TestForms:
    async def test_the_agent_and_a_port_behind_it(self, http: httpx.AsyncClient, service: Service):
        made = await create(http)
        await up(service, made["id"])
        for mount in ("", "/v1"):
            answer = await http.get(f"{mount}/sandboxes/{made['id']}/endpoints/44772")
            assert answer.status_code == 200
            assert answer.json() == {
                "endpoint": "127.0.0.1:32768/proxy/44772",
                "headers": {"Sandledger-Generation": "1", "X-EXECD-ACCESS-TOKEN": token_of(made["id"])},
            }
            assert answer.headers["cache-control"] == "no-store"
        behind = (await http.get(f"/v1/sandboxes/{made['id']}/endpoints/3000")).json()
        assert behind["endpoint"] == "127.0.0.1:32768/proxy/3000"

    async def test_the_published_port(self, http: httpx.AsyncClient, service: Service):
        made = await create(http)
        await up(service, made["id"])
        answer = await http.get(f"/v1/sandboxes/{made['id']}/endpoints/8080")
        assert answer.json() == {"endpoint": "127.0.0.1:32769", "headers": {"Sandledger-Generation": "1"}}

    @pytest.mark.parametrize("mount", ["", "/v1"])
    async def test_through_this_server(self, http: httpx.AsyncClient, service: Service, mount: str):
        made = await create(http)
        await up(service, made["id"])
        path = f"{mount}/sandboxes/{made['id']}/endpoints/44772?use_server_proxy=true"
        for host in ("api.test", "10.1.2.3:8443", "[fd00::1]:80"):
            answer = await http.get(path, headers={"Host": host})
            assert answer.json() == {
                "endpoint": f"{host}{mount}/sandboxes/{made['id']}/proxy/44772",
                "headers": {"Sandledger-Generation": "1"},
            }
        direct = await http.get(path.replace("true", "false"))
        assert direct.json()["endpoint"] == "127.0.0.1:32768/proxy/44772"

    async def test_a_host_that_is_none_is_not_repeated(self, http: httpx.AsyncClient, service: Service):
        made = await create(http)
        await up(service, made["id"])
        path = f"/v1/sandboxes/{made['id']}/endpoints/44772?use_server_proxy=true"
        for host in ("evil.test/a", "a b", 'a"b'):
            assert (await http.get(path, headers={"Host": host})).status_code == 400, host
        for host in ("", "user@evil.test", "h:x", "h:999999", "[x]", "a,b"):
            answer = await http.get(path, headers={"Host": host})
            # The address of the connection.
            assert answer.json()["endpoint"] == f"api.test/v1/sandboxes/{made['id']}/proxy/44772", host

    async def test_the_operators_addresses_win(self, make_context: MakeContext, service: Service):
        parts = replace(AGENT, network=Network(agent=True, eip="edge.test/x", public_address="proxy.test"))
        async with client(create_app(make_context(endpoints=parts)), **{"open-sandbox-api-key": KEY}) as http:
            made = await create(http)
            await up(service, made["id"])
            path = f"/v1/sandboxes/{made['id']}/endpoints/3000"
            assert (await http.get(path)).json()["endpoint"] == "edge.test:32768/proxy/3000"
            proxied = (await http.get(f"{path}?use_server_proxy=true")).json()["endpoint"]
            assert proxied == f"proxy.test/sandboxes/{made['id']}/proxy/3000"

    async def test_head_and_options(self, http: httpx.AsyncClient, service: Service):
        made = await create(http)
        await up(service, made["id"])
        path = f"/v1/sandboxes/{made['id']}/endpoints/8080"
        head, full = await http.head(path), await http.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == full.headers["content-length"]
        assert (await http.options(path)).headers["allow"] == "GET, HEAD, OPTIONS"
        assert (await http.post(path)).status_code == 405

    async def test_without_an_agent(self, make_context: MakeContext, service: Service):
        bare = EndpointParts(AGENT_KEY, LINK_KEY, wait_seconds=60)
        async with client(create_app(make_context(endpoints=bare)), **{"open-sandbox-api-key": KEY}) as http:
            made = await create(http)
            path = f"/v1/sandboxes/{made['id']}/endpoints"
            at_once = await http.get(f"{path}/44772")  # Pending: nobody waits for what will not come
            assert (at_once.status_code, at_once.json()["code"]) == (501, "SANDBOX::AGENT_NOT_AVAILABLE")
            await up(service, made["id"], Address("bridge", "172.17.0.2"))
            other = await http.get(f"{path}/3000")
            assert (other.status_code, other.json()["code"]) == (501, "SANDBOX::AGENT_NOT_AVAILABLE")
            assert "runtime.execd_image" in other.json()["message"]
            assert (await http.get(f"{path}/3000?use_server_proxy=true")).status_code == 200


class TestBadInput:
    @pytest.mark.parametrize(
        ("port", "status", "code"),
        [
            *[(port, 400, "DOCKER::INVALID_PORT") for port in ("0", "65536", "-1", "00", "9" * 3000)],
            *[
                (port, 422, "GENERAL::VALIDATION_ERROR")
                for port in ("x", "80.0", "8e1", "+80", "0x50", "80%20", "%31%C2%B2", "%D9%A1", "%00", "9" * 5000, "-")
            ],
        ],
    )
    async def test_ports(self, http: httpx.AsyncClient, port: str, status: int, code: str):
        for sandbox_id in ((await create(http))["id"], uuid4()):
            answer = await http.get(f"/v1/sandboxes/{sandbox_id}/endpoints/{port}")
            assert (answer.status_code, answer.json()["code"]) == (status, code)
            assert "port" in answer.json()["message"]

    @pytest.mark.parametrize(
        ("query", "status", "code"),
        [
            ("expires=1900000000", 400, "SANDBOX::API_NOT_SUPPORTED"),
            ("expires=-1", 400, "SANDBOX::API_NOT_SUPPORTED"),
            (f"expires={2**64}", 400, "SANDBOX::API_NOT_SUPPORTED"),
            ("expires=1900000000&use_server_proxy=false", 400, "SANDBOX::API_NOT_SUPPORTED"),
            ("expires=1900000000&use_server_proxy=true", 400, "SANDBOX::INVALID_PARAMETER"),
            ("expires=soon", 422, "GENERAL::VALIDATION_ERROR"),
            ("expires=", 422, "GENERAL::VALIDATION_ERROR"),
            ("expires=1.5", 422, "GENERAL::VALIDATION_ERROR"),
            ("expires=1e9", 422, "GENERAL::VALIDATION_ERROR"),
            ("expires=1&expires=2", 422, "GENERAL::VALIDATION_ERROR"),
            ("use_server_proxy=maybe", 422, "GENERAL::VALIDATION_ERROR"),
            ("use_server_proxy=", 422, "GENERAL::VALIDATION_ERROR"),
            ("use_server_proxy=2", 422, "GENERAL::VALIDATION_ERROR"),
            ("use_server_proxy=%20true", 422, "GENERAL::VALIDATION_ERROR"),
            ("use_server_proxy=yes&expires=1900000000", 400, "SANDBOX::INVALID_PARAMETER"),
            ("use_server_proxy=true&use_server_proxy=true", 422, "GENERAL::VALIDATION_ERROR"),
        ],
    )
    async def test_queries(self, http: httpx.AsyncClient, service: Service, query: str, status: int, code: str):
        made = await create(http)
        await up(service, made["id"])
        answer = await http.get(f"/v1/sandboxes/{made['id']}/endpoints/8080?{query}")
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        named = [field for field in ("expires", "use_server_proxy") if field in answer.json()["message"]]
        assert named, answer.text

    async def test_sandboxes_that_are_not_there(self, http: httpx.AsyncClient):
        for sandbox_id in (uuid4(), "x", "0198f000"):
            answer = await http.get(f"/v1/sandboxes/{sandbox_id}/endpoints/44772")
            assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")
        assert (await http.get(f"/v1/sandboxes/{uuid4()}/endpoints/")).status_code == 404

    @pytest.mark.parametrize("name", ["EXECD", "EXECD_ENVS", "EXECD_ACCESS_TOKEN", "EXECD_INIT", "OPENSANDBOX_ID"])
    async def test_what_the_agent_reads_is_not_the_clients(
        self, http: httpx.AsyncClient, make_context: MakeContext, name: str
    ):
        sent = {
            "image": {"uri": "busybox:1"},
            "entrypoint": ["sleep", "60"],
            "resourceLimits": {},
            "env": {"A": "1", name: "canary"},
        }
        answer = await http.post("/v1/sandboxes", json=sent)
        assert (answer.status_code, answer.json()["code"]) == (400, "SANDBOX::INVALID_PARAMETER")
        assert f"env.{name} " in answer.json()["message"]
        assert "canary" not in answer.text
        sent["env"] = {"EXECD_BOOTSTRAP_PRE_SCRIPT": "/pre.sh", "BOOTSTRAP_SHELL": "/bin/sh", name: None}
        assert (await http.post("/v1/sandboxes", json=sent)).status_code == 202
        async with client(create_app(make_context()), **{"open-sandbox-api-key": KEY}) as without_agent:
            sent["env"] = {name: "1"}
            assert (await without_agent.post("/v1/sandboxes", json=sent)).status_code == 202


class TestWaits:
    @pytest.mark.parametrize("query", ["", "?use_server_proxy=true"])
    async def test_a_pending_one_is_waited_for(
        self, http: httpx.AsyncClient, service: Service, context: ApiContext, query: str
    ):
        made = await create(http)
        asked = asyncio.create_task(http.get(f"/v1/sandboxes/{made['id']}/endpoints/44772{query}"))
        await waiting(context)
        assert not asked.done()
        await up(service, made["id"])
        assert (await asked).status_code == 200
        assert context.waiters.count == 0

    async def test_the_end_of_the_wait_says_what_the_sandbox_waits_for(
        self, make_context: MakeContext, service: Service
    ):
        async with client(create_app(make_context(endpoints=HASTY)), **{"open-sandbox-api-key": KEY}) as http:
            made = await create(http)
            path = f"/v1/sandboxes/{made['id']}"
            for pulling in (False, True):
                if pulling:
                    waits = cmd.RecordWaiting("fetch", "IMAGE_PULLING", "Image busybox:1 is being pulled.")
                    await service.execute(UUID(made["id"]), ANY_TENANT, waits, WORKER)
                answer = await http.get(f"{path}/endpoints/44772")
                status = (await http.get(path)).json()["status"]
                assert (answer.status_code, answer.json()["code"]) == (404, NOT_YET)
                expected = f"The sandbox is Pending ({status['reason']}): {status['message']}"
                assert answer.json()["message"] == expected
            assert "is being pulled" in expected

    async def test_a_failure_ends_the_wait_with_its_reason(
        self, http: httpx.AsyncClient, service: Service, context: ApiContext
    ):
        made = await create(http)
        path = f"/v1/sandboxes/{made['id']}/endpoints/44772"
        asked = asyncio.create_task(http.get(path))
        await waiting(context)
        failure = cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "manifest for busybox:1 not found")
        await service.execute(UUID(made["id"]), ANY_TENANT, failure, WORKER)
        for answer in (await asked, await http.get(path)):
            assert (answer.status_code, answer.json()["code"]) == (409, "DOCKER::SANDBOX_NOT_RUNNING")
            assert (
                answer.json()["message"] == "The sandbox is Failed (IMAGE_NOT_FOUND): manifest for busybox:1 not found"
            )

    async def test_a_delete_ends_the_wait_and_says_when_and_by_whom(self, http: httpx.AsyncClient, context: ApiContext):
        made = await create(http)
        path = f"/v1/sandboxes/{made['id']}"
        asked = asyncio.create_task(http.get(f"{path}/endpoints/44772"))
        await waiting(context)
        assert (await http.delete(path)).status_code == 204
        for answer in (await asked, await http.get(f"{path}/endpoints/8080")):
            assert (answer.status_code, answer.json()["code"]) == (404, "DOCKER::SANDBOX_NOT_FOUND")
            assert "deleted by api_key default at 20" in answer.json()["message"]

    async def test_a_paused_one_keeps_its_endpoints(self, http: httpx.AsyncClient, service: Service):
        made = await create(http)
        await up(service, made["id"])
        path = f"/v1/sandboxes/{made['id']}"
        before = (await http.get(f"{path}/endpoints/44772")).json()
        await http.post(f"{path}/pause", headers={"Prefer": "respond-async"})
        assert (await http.get(f"{path}/endpoints/44772")).json() == before

    async def test_a_client_that_leaves_ends_its_wait(
        self, app: Litestar, http: httpx.AsyncClient, context: ApiContext
    ):
        made = await create(http)
        gone = asyncio.Event()
        told: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if not told and not gone.is_set():
                await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            told.append(message)

        path = f"/v1/sandboxes/{made['id']}/endpoints/44772"
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"open-sandbox-api-key", KEY.encode())],
            "client": None,
            "server": ("x", 80),
        }
        asked = asyncio.create_task(app(scope, receive, send))  # pyright: ignore[reportArgumentType]
        await waiting(context)
        gone.set()
        await asyncio.wait_for(asked, 30)
        assert context.waiters.count == 0
        assert not context.signal._by_id, "the subscription is gone too"

    async def test_a_stop_of_the_server_ends_waits(self, http: httpx.AsyncClient, context: ApiContext):
        made = await create(http)
        asked = asyncio.create_task(http.get(f"/v1/sandboxes/{made['id']}/endpoints/44772"))
        await waiting(context)
        context.stopping.set()
        assert (await asked).json()["code"] == NOT_YET


class TestManyWaits:
    async def test_they_take_no_place_from_other_requests(
        self, app: Litestar, http: httpx.AsyncClient, context: ApiContext
    ):
        made = await create(http)
        head = f"GET /v1/sandboxes/{made['id']}/endpoints/44772 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        sent = f"{head}OPEN-SANDBOX-API-KEY: {KEY}\r\n\r\n".encode()
        protocol = type("Protocol", (HttpProtocol,), {"waiters": context.waiters})
        async with listening(app, protocol, limit_concurrency=3) as port:
            asked: list[asyncio.Task[bytes]] = []
            for count in range(1, 11):
                asked.append(asyncio.create_task(say(port, sent)))
                await waiting(context, count)
            for _ in range(3):
                assert _parsed(await say(port, HEALTH + b"Connection: close\r\n\r\n"))[0] == 200
            context.stopping.set()
            assert {_parsed(heard)[0] for heard in await asyncio.gather(*asked)} == {404}

    async def test_beyond_their_own_limit_they_are_answered_at_once(self, make_context: MakeContext):
        context = make_context(endpoints=AGENT, waiters=Waiters(2))
        async with client(create_app(context), **{"open-sandbox-api-key": KEY}) as http:
            made = await create(http)
            path = f"/v1/sandboxes/{made['id']}/endpoints/44772"
            asked = [asyncio.create_task(http.get(path)) for _ in range(2)]
            await waiting(context, 2)
            third = await asyncio.wait_for(http.get(path), 30)
            assert (third.status_code, third.json()["code"]) == (404, NOT_YET)
            context.stopping.set()
            await asyncio.gather(*asked)


class Counting(Database):
    """Counts its statements."""

    count = 0

    async def fetch(self, statement: Statement, **values: Any) -> Any:
        self.count += 1
        return await super().fetch(statement, **values)


async def test_a_lookup_is_one_statement_and_no_call_of_the_engine(
    dsn: str, make_context: MakeContext, service: Service, signal: Signal
):
    database = Counting(as_server(dsn))
    context = make_context(database=database, service=Service(database, signal), endpoints=AGENT)
    async with client(create_app(context), **{"open-sandbox-api-key": KEY}) as http:
        made = await create(http)
        await up(service, made["id"])
        before = database.count
        for port in (44772, 8080, 3000):
            for query in ("", "?use_server_proxy=true"):
                assert (await http.get(f"/v1/sandboxes/{made['id']}/endpoints/{port}{query}")).status_code == 200
        assert database.count - before == 6
        driver: Any = context.driver
        assert not driver.engine.calls
    await database.close()


async def test_the_token_is_nowhere_else(
    http: httpx.AsyncClient, service: Service, dsn: str, context: ApiContext, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.DEBUG):
        made = await create(http)
        await up(service, made["id"])
        path = f"/v1/sandboxes/{made['id']}"
        token = token_of(made["id"])
        assert token in (await http.get(f"{path}/endpoints/44772")).text
        for other in ("", "/events", "?includeTerminal=true", "/endpoints/8080", "/endpoints/1?use_server_proxy=true"):
            answer = await http.get(path + other)
            assert answer.status_code == 200
            assert token not in answer.text + str(answer.headers)
    assert not [line for line in caplog.records if token in line.getMessage()]
    assert AGENT_KEY.decode() not in repr(context)
    connection = await asyncpg.connect(dsn)
    try:
        for table in metadata.sorted_tables:
            rows = await connection.fetch(f"SELECT to_jsonb(each)::text AS row FROM sandledger.{table.name} AS each")
            assert not [row for row in rows if token in row["row"]], table.name
        events = await connection.fetch("SELECT data FROM sandledger.events")
        assert any("32768" in json.dumps(row["data"]) for row in events), "the address is in the log"
    finally:
        await connection.close()
