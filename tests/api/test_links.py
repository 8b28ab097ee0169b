"""Links are made and revoked: what is answered, refused and written, and that the value stands nowhere else."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app.api.app import create_app
from app.api.auth import Principal
from app.api.context import ApiContext, EndpointParts
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.endpoints import Network
from app.domain.sandbox.links import Link, LinkKey, milliseconds, read
from app.domain.stream import Actor, ActorKind
from app.domain.tenants import ANY_TENANT
from app.service.sandboxes import Service
from app.store.tables import metadata
from tests.api.conftest import ENDPOINTS, KEY, WORKER, MakeContext, client, create
from tests.api.test_endpoints import up, waiting
from tests.support.sql import connected

HOUR = {"expiresIn": 3600}


async def running(http: httpx.AsyncClient, service: Service) -> str:
    made = await create(http)
    await up(service, made["id"])
    return made["id"]


async def link(http: httpx.AsyncClient, sandbox: str, port: int = 3000, body: Any = None, **headers: str) -> Any:
    path = f"/v1/sandboxes/{sandbox}/endpoints/{port}/links"
    return await http.post(path, json=HOUR if body is None else body, headers=headers)


async def events(http: httpx.AsyncClient, sandbox: str) -> list[dict[str, Any]]:
    return (await http.get(f"/v1/sandboxes/{sandbox}/events")).json()["items"]


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


async def test_a_link_is_made_and_the_log_says_by_whom_and_until_when(http: httpx.AsyncClient, service: Service):
    sandbox = await running(http, service)
    answer = await link(http, sandbox)
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    url, _, value = made["url"].partition("?sandledger_link=")
    assert url == f"http://api.test/v1/sandboxes/{sandbox}/proxy/3000/"
    until, sent = datetime.fromisoformat(made["expiresAt"]), read(value)
    assert timedelta(minutes=59) < until - datetime.now(UTC) < timedelta(minutes=61)
    assert sent is not None
    meant = Link(UUID(sandbox), 3000, 1, 0, milliseconds(until))
    assert ENDPOINTS.link_key.signed(meant, sent)
    assert UUID(made["linkId"]) == meant.id
    last = (await events(http, sandbox))[-1]
    assert (last["type"], last["actor"]["name"]) == ("sandbox.link_created", "default")
    assert last["data"]["link_id"] == made["linkId"]
    assert last["data"]["port"] == 3000
    assert datetime.fromisoformat(last["data"]["expires_at"]) == until
    assert answer.headers["etag"] == f'"{last["version"]}"'


async def test_a_revocation_ends_those_before_it_and_none_after_it(http: httpx.AsyncClient, service: Service):
    sandbox = await running(http, service)
    for number in (1, 2):
        answer = await http.delete(f"/v1/sandboxes/{sandbox}/links")
        assert (answer.status_code, answer.content) == (204, b"")
        last = (await events(http, sandbox))[-1]
        assert (last["type"], last["data"]) == ("sandbox.links_revoked", {"link_number": number})
        assert answer.headers["etag"] == f'"{last["version"]}"'
    made = (await link(http, sandbox)).json()
    sent = read(made["url"].partition("=")[2])
    assert sent is not None
    until = milliseconds(datetime.fromisoformat(made["expiresAt"]))
    assert ENDPOINTS.link_key.signed(Link(UUID(sandbox), 3000, 1, 2, until), sent)


@pytest.mark.parametrize(
    ("port", "status", "code"),
    [
        *[(port, 400, "DOCKER::INVALID_PORT") for port in ("0", "65536", "-1", "9" * 3000)],
        *[(port, 422, "GENERAL::VALIDATION_ERROR") for port in ("x", "80.0", "+80", "80%20", "%00", "-")],
        *[(port, 403, "PROXY::PORT_NOT_ALLOWED") for port in ("44772", "18080", "044772")],
    ],
)
async def test_wrong_ports(http: httpx.AsyncClient, service: Service, port: str, status: int, code: str):
    sandbox = await running(http, service)
    answer = await http.post(f"/v1/sandboxes/{sandbox}/endpoints/{port}/links", json=HOUR)
    assert refused(answer) == (status, code)
    assert "ort" in answer.json()["message"]
    assert (await events(http, sandbox))[-1]["type"] != "sandbox.link_created"


@pytest.mark.parametrize(
    "body",
    [
        *[{"expiresIn": wrong} for wrong in (0, -1, 604801, 2**70, 1.5, "60", None, True, [60], {})],
        {},
        [],
        "60",
        60,
    ],
)
async def test_wrong_times(http: httpx.AsyncClient, service: Service, body: Any):
    sandbox = await running(http, service)
    answer = await link(http, sandbox, body=body)
    assert refused(answer) == (422, "GENERAL::VALIDATION_ERROR")
    assert answer.json()["detail"][0]["loc"][0] == "body"
    assert (await link(http, sandbox, body={"expiresIn": 1})).status_code == 201
    assert (await link(http, sandbox, body={"expires_in": 604800})).status_code == 201


async def test_bodies_that_are_none(http: httpx.AsyncClient, service: Service):
    path = f"/v1/sandboxes/{await running(http, service)}/endpoints/3000/links"
    assert (await http.post(path)).status_code in (415, 422)
    assert (await http.post(path, content=b"{", headers={"content-type": "application/json"})).status_code == 422
    assert (await http.post(path, content=b'{"expiresIn": 60}', headers={"content-type": "a/b"})).status_code == 415
    assert (await http.get(path)).status_code == 405
    assert (await http.options(path)).headers["allow"] == "OPTIONS, POST"


async def test_sandboxes_that_are_not_there_have_ended_or_do_not_run(http: httpx.AsyncClient, service: Service):
    gone = await running(http, service)
    assert (await http.delete(f"/v1/sandboxes/{gone}")).status_code == 204
    for sandbox in (str(uuid4()), "x", gone):
        for answer in (await link(http, sandbox), await http.delete(f"/v1/sandboxes/{sandbox}/links")):
            assert refused(answer) == (404, "DOCKER::SANDBOX_NOT_FOUND")
    failed = (await create(http))["id"]
    failure = cmd.RecordFailure("fetch", "IMAGE_NOT_FOUND", "no such image")
    await service.execute(UUID(failed), ANY_TENANT, failure, WORKER)
    assert refused(await link(http, failed)) == (409, "DOCKER::SANDBOX_NOT_RUNNING")
    assert (await http.delete(f"/v1/sandboxes/{failed}/links")).status_code == 204


async def test_a_pending_one_is_waited_for(make_context: MakeContext, service: Service):
    patient = EndpointParts(b"k" * 32, ENDPOINTS.link_key, wait_seconds=60)
    context = make_context(endpoints=patient)
    async with client(create_app(context), **{"open-sandbox-api-key": KEY}) as http:
        sandbox = (await create(http))["id"]
        asked = asyncio.create_task(link(http, sandbox))
        await waiting(context)
        await up(service, sandbox)
        assert (await asked).status_code == 201


async def test_one_that_stays_pending_is_asked_for_again(http: httpx.AsyncClient):
    sandbox = (await create(http))["id"]
    answer = await link(http, sandbox)
    assert refused(answer) == (404, "KUBERNETES::POD_IP_NOT_AVAILABLE")
    assert len(await events(http, sandbox)) == 2


async def test_only_at_the_version_that_was_named(http: httpx.AsyncClient, service: Service):
    sandbox = await running(http, service)
    version = (await events(http, sandbox))[-1]["version"]
    stale = {"If-Match": f'"{version - 1}"'}
    assert refused(await link(http, sandbox, **stale)) == (412, "SANDLEDGER::VERSION_MISMATCH")
    path = f"/v1/sandboxes/{sandbox}/links"
    assert refused(await http.delete(path, headers=stale)) == (412, "SANDLEDGER::VERSION_MISMATCH")
    assert (await link(http, sandbox, **{"If-Match": f'"{version}"'})).status_code == 201
    assert (await http.delete(path, headers={"If-Match": f'"{version + 1}"'})).status_code == 204


async def test_another_tenants_sandbox_does_not_exist(make_context: MakeContext, service: Service):
    keys = {
        name: Principal(f"tenant-{name}", Actor(ActorKind.API_KEY, f"id-{name}", name))
        for name in ("owner", "stranger")
    }
    app = create_app(make_context(authenticate=keys.get))
    async with client(app, **{"open-sandbox-api-key": "owner"}) as http:
        sandbox = await running(http, service)
        stranger = {"open-sandbox-api-key": "stranger"}
        before = await events(http, sandbox)
        assert refused(await link(http, sandbox, **stranger)) == (404, "DOCKER::SANDBOX_NOT_FOUND")
        answer = await http.delete(f"/v1/sandboxes/{sandbox}/links", headers=stranger)
        assert refused(answer) == (404, "DOCKER::SANDBOX_NOT_FOUND")
        assert await events(http, sandbox) == before


@pytest.mark.parametrize(
    ("network", "begins"),
    [
        (Network(eip="edge.test/x"), "http://edge.test/x/sandboxes/{}/proxy/3000/?"),
        (
            Network(eip="http://a.test", public_address="https://b.test/y/"),
            "https://b.test/y/sandboxes/{}/proxy/3000/?",
        ),
        (Network(wildcard="boxes.test:8443"), "http://3000-{}.boxes.test:8443/?"),
        (Network(wildcard="boxes.test", public_address="https://b.test"), "https://3000-{}.boxes.test/?"),
    ],
)
async def test_its_address_is_the_operators(make_context: MakeContext, service: Service, network: Network, begins: str):
    parts = EndpointParts(b"k" * 32, ENDPOINTS.link_key, network)
    async with client(create_app(make_context(endpoints=parts)), **{"open-sandbox-api-key": KEY}) as http:
        sandbox = await running(http, service)
        assert (await link(http, sandbox)).json()["url"].startswith(begins.format(sandbox) + "sandledger_link=v1.")


async def test_many_at_once_are_all_made(http: httpx.AsyncClient, service: Service):
    sandbox = await running(http, service)
    made = await asyncio.gather(*(link(http, sandbox, 3000 + number) for number in range(20)))
    assert {answer.status_code for answer in made} == {201}
    assert len({answer.json()["linkId"] for answer in made}) == 20


async def test_the_value_is_nowhere_else(
    http: httpx.AsyncClient, service: Service, dsn: str, context: ApiContext, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.DEBUG):
        sandbox = await running(http, service)
        value = (await link(http, sandbox)).json()["url"].partition("=")[2]
        path = f"/v1/sandboxes/{sandbox}"
        shown = ("", "/events", "?includeTerminal=true", "/diagnostics/events", "/endpoints/3000?use_server_proxy=true")
        for other in shown:
            answer = await http.get(path + other)
            assert answer.status_code == 200
            assert value not in answer.text + str(answer.headers)
        await http.delete(path)
    mac = value.rpartition(".")[2]
    assert not [line for line in caplog.records if mac in line.getMessage()]
    assert ENDPOINTS.link_key.secret.decode() not in repr(context)
    async with connected(dsn) as connection:
        for table in metadata.sorted_tables:
            rows = await connection.fetch(f"SELECT to_jsonb(each)::text AS row FROM sandledger.{table.name} AS each")
            assert not [row for row in rows if mac in row["row"]], table.name


def test_keys_are_not_printed():
    assert "secret" not in repr(LinkKey(b"secret")) + str(LinkKey(b"secret"))
