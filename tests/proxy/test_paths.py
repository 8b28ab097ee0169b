"""The target of a request reaches the sandbox byte by byte."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from app.proxy.route import Route, route
from tests.proxy.nginx_pass import passed
from tests.proxy.rig import Agent, Rig, calling, request, say

IDENTITY = "0198f000-0000-7000-8000-00000000aaaa"
RESTS = [
    "/",
    "/a",
    "/a/",
    "/a//b",
    "//",
    "///a",
    "/a%2Fb",
    "/a%2fb//c/../d?x=%41&y",
    "/%2e%2e/%2e%2e/health",
    "/../../../health",
    "/./a/.",
    "/a%00b",
    "/a;b=c;d",
    "/caf%C3%A9",
    "/%ff%fe",
    "/a%20b",
    "/a+b",
    "/a%",
    "/a%zz",
    "/a?",
    "/?",
    "/a??b",
    "/a?b?c=d?",
    "/a?x=/../y",
    "/a?x=%2F&x=%2f",
    "/a?next=http://other/",
    "/a%23b",
    "/a#b",
    "/a|b{c}^d~",
    "/proxy/3000/x",
    "/" + "a" * 60_000,
    "/a?" + "b" * 60_000,
]
"""What stands behind the port."""


@pytest.mark.parametrize("mount", ["", "/v1"])
async def test_the_rest_of_the_path_arrives_as_it_was_sent(rig: Rig, agent: Agent, sandbox: UUID, mount: str):
    rests = passed(RESTS)
    for rest in rests:
        for port, path in (("44772", ""), ("3000", "/proxy/3000")):
            reply = await say(rig.port, request(f"{mount}/sandboxes/{sandbox}/proxy/{port}{rest}"))
            assert reply.status == 200, reply.body
            assert agent.requests[-1].target == path + rest
    assert len(agent.requests) == 2 * len(rests)


async def test_without_a_path_the_root_is_asked_for(rig: Rig, agent: Agent, sandbox: UUID):
    for rest, sent in (("", "/"), ("?a=b", "/?a=b"), ("?", "/?")):
        assert (await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000{rest}"))).status == 200
        assert agent.requests[-1].target == f"/proxy/3000{sent}"


async def test_a_target_of_the_absolute_form_is_the_same(rig: Rig, agent: Agent, sandbox: UUID):
    whole = f"http://127.0.0.1:{rig.port}/v1/sandboxes/{sandbox}/proxy/3000//a%2Fb?"
    assert (await say(rig.port, request(whole))).status == 200
    assert agent.requests[-1].target == "/proxy/3000//a%2Fb?"


async def test_bytes_beyond_ascii_are_refused(rig: Rig, agent: Agent, sandbox: UUID):
    async with calling(rig.port) as caller:
        caller.writer.write(b"GET /sandboxes/%b/proxy/3000/\xe9 HTTP/1.1\r\nHost: a\r\n\r\n" % str(sandbox).encode())
        assert (await caller.reply()).status == 400
    assert agent.requests == []


async def test_every_method_is_passed_on(rig: Rig, agent: Agent, sandbox: UUID):
    for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"):
        sent = request(f"/sandboxes/{sandbox}/proxy/3000/a", method=method)
        reply = await say(rig.port, sent, bodiless=method == "HEAD")
        assert reply.status == 200
        assert agent.requests[-1].method == method
        assert int(reply.one("content-length") or 0) > 0
    assert len(agent.requests) == 9


async def test_what_is_no_port_is_400(rig: Rig, sandbox: UUID):
    for port in ("0", "65536", "99999", "100000", "-1", "+80", "080", "8o", "%38%30", "http", "1.0"):
        reply = await say(rig.port, request(f"/v1/sandboxes/{sandbox}/proxy/{port}/a"))
        assert (reply.status, reply.code) == (400, "DOCKER::INVALID_PORT"), port


async def test_other_paths_are_the_routers(rig: Rig, agent: Agent, sandbox: UUID):
    for path in (
        "/sandboxes/x/proxy/3000/",
        "/sandboxes/{0}/proxy",
        "/sandboxes/{0}/proxy/",
        "/sandboxes/{0}0/proxy/3000",
        "/sandboxes/%30{0}/proxy/3000",
        "/v2/sandboxes/{0}/proxy/3000",
        "/v1/v1/sandboxes/{0}/proxy/3000",
        "//sandboxes/{0}/proxy/3000",
        "/x/../sandboxes/{0}/proxy/3000",
        "/sandboxes//{0}/proxy/3000",
        "/sandboxes/{0}//proxy/3000",
        "/sandboxes/{0}%2Fproxy/3000",
        "/sandboxes/{0}/Proxy/3000",
        "/health?/sandboxes/{0}/proxy/3000",
    ):
        reply = await say(rig.port, request(path.format(sandbox)))
        assert reply.status == (200 if path.startswith("/health") else 404)
        assert reply.one("sandledger-error") is None
    assert agent.requests == []


def test_ids_are_compared_as_text_of_a_uuid():
    found = route(f"/sandboxes/{IDENTITY.upper()}/proxy/80/a".encode())
    assert found == Route(UUID(IDENTITY), 80, f"/sandboxes/{IDENTITY.upper()}/proxy/80", b"/a")
    assert route(f"/sandboxes/{uuid4().hex}/proxy/80/a".encode()) is None
