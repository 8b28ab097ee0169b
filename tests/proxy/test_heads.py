"""The table of headers, row by row, in both directions; the last tests send them through sockets."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.proxy.heads import Passage, confined, relocated, to_client, to_sandbox
from app.proxy.refusals import Refusal
from tests.proxy import rig as parts
from tests.proxy.rig import VIA, Agent, Request, Rig, answer, request, say

PREFIX = "/v1/sandboxes/0198f000-0000-7000-8000-00000000aaaa/proxy/3000"
PASSAGE = Passage(
    PREFIX, 3000, "ours", False, b"api.example:8080", "127.0.0.1:32768", "192.0.2.7", "http", "request-1", VIA
)
Pairs = list[tuple[str, str]]


def sent(*headers: tuple[str, str], passage: Passage = PASSAGE) -> Pairs:
    """What the sandbox gets."""
    found = to_sandbox([(name.encode(), value.encode()) for name, value in headers], passage)
    return [(name.decode(), value.decode()) for name, value in found]


def got(*headers: tuple[str, str], status: int = 200, passage: Passage = PASSAGE) -> Pairs:
    """What the client gets."""
    found = to_client(status, [(name.encode(), value.encode()) for name, value in headers], passage)
    return [(name.decode(), value.decode()) for name, value in found]


def values(pairs: Pairs, name: str) -> list[str]:
    return [value for each, value in pairs if each == name]


@pytest.mark.parametrize(
    "name",
    [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "open-sandbox-api-key",
        "opensandbox-secure-access",
        "opensandbox-access-renew",
        "sandledger-generation",
        "sandledger-anything",
        "opensandbox-egress-auth",
        "authorization",
        "cookie",
        "expect",
        "x-forwarded-port",
        "x-forwarded-anything",
    ],
)
def test_never_reaches_the_sandbox(name: str):
    for written in (name, name.replace("-", "_")):
        assert values(sent((written, "theirs"), ("x-a", "1")), written) == []


@pytest.mark.parametrize("name", ["accept", "content-type", "content-encoding", "origin", "range", "user-agent", "x-a"])
def test_everything_else_does(name: str):
    assert values(sent((name, "theirs"), (name, "again")), name) == ["theirs", "again"]


def test_what_connection_names_is_for_the_next_hop_only():
    pairs = sent(("connection", "close, X-Secret"), ("x-secret", "s"), ("x_secret", "s"), ("x-other", "o"))
    assert [name for name, _ in pairs if "secret" in name] == []
    assert values(pairs, "x-other") == ["o"]
    pairs = sent(("connection", "Host, X-Forwarded-For, Via, X-Request-ID, X-EXECD-ACCESS-TOKEN"))
    for name in ("host", "x-forwarded-for", "via", "x-request-id", "x-execd-access-token"):
        assert len(values(pairs, name)) == 1, "ours is not the caller's to take away"
    assert values(got(("connection", "X-Secret"), ("x-secret", "s")), "x-secret") == []


def test_the_token_is_ours_and_the_callers_is_not_passed_on():
    assert values(sent(("x-execd-access-token", "theirs")), "x-execd-access-token") == ["ours"]
    assert values(sent(("x_execd_access_token", "theirs")), "x_execd_access_token") == []


def test_an_open_proxy_adds_no_token_and_passes_the_callers_on():
    is_open = replace(PASSAGE, token=None)
    assert values(sent(("x-execd-access-token", "theirs"), passage=is_open), "x-execd-access-token") == ["theirs"]
    assert values(sent(passage=is_open), "x-execd-access-token") == []


@pytest.mark.parametrize(("port", "kept"), [(18080, ["e"]), (3000, []), (44772, [])])
def test_the_token_of_the_sidecar_goes_to_its_port_only(port: int, kept: list[str]):
    pairs = sent(("opensandbox-egress-auth", "e"), passage=replace(PASSAGE, port=port))
    assert values(pairs, "opensandbox-egress-auth") == kept


def test_host_is_the_clients():
    assert values(sent(("host", "api.example:8080")), "host") == ["api.example:8080"]
    assert values(sent(passage=replace(PASSAGE, host=b"")), "host") == ["127.0.0.1:32768"]


def test_forwarding_headers_are_ours():
    names = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "x-forwarded-prefix", "x-real-ip", "forwarded"]
    pairs = sent(*[(name, "forged") for name in names], *[(name.replace("-", "_"), "forged") for name in names[:5]])
    assert [values(pairs, name) for name in names] == [
        ["192.0.2.7"],
        ["http"],
        ["api.example:8080"],
        [PREFIX],
        ["192.0.2.7"],
        ['for=192.0.2.7;host="api.example:8080";proto=http'],
    ]
    assert "forged" not in str(pairs)


@pytest.mark.parametrize(
    ("host", "client", "expected"),
    [
        (b"a", "::1", 'for="[::1]";host="a";proto=http'),
        (b'a";for=9.9.9.9', "1.2.3.4", "for=1.2.3.4;proto=http"),
        (b"a\\", "1.2.3.4", "for=1.2.3.4;proto=http"),
        (b"", "1.2.3.4", "for=1.2.3.4;proto=http"),
    ],
)
def test_forwarded_cannot_be_forged_by_the_host(host: bytes, client: str, expected: str):
    pairs = sent(passage=replace(PASSAGE, host=host, client=client))
    assert values(pairs, "forwarded") == [expected]


def test_encodings_are_the_clients_but_the_agent_must_not_decompress():
    assert values(sent(("accept-encoding", "br")), "accept-encoding") == ["br"]
    assert values(sent(), "accept-encoding") == ["identity"]
    assert values(sent(passage=replace(PASSAGE, to_agent=True)), "accept-encoding") == []


def test_the_request_id_is_one():
    assert values(sent(("x-request-id", "theirs")), "x-request-id") == ["request-1"]
    assert values(got(), "x-request-id") == ["request-1"]
    assert values(got(("X-Request-ID", "the program's")), "x-request-id") == ["the program's"]


def test_via_grows_and_four_passages_are_a_loop():
    assert values(sent(("via", "1.1 other, 1.0 fred")), "via") == ["1.1 other, 1.0 fred", f"1.1 {VIA}"]
    three = ("via", f"1.1 {VIA}, 1.1 {VIA},1.1 {VIA} (comment)")
    assert len(values(sent(three), "via")) == 2
    with pytest.raises(Refusal) as refused:
        sent(three, ("via", f"1.1 {VIA}"))
    assert (refused.value.status, refused.value.code) == (508, "PROXY::LOOP")


def test_a_value_that_is_no_text_is_refused():
    with pytest.raises(Refusal) as refused:
        to_sandbox([(b"x-a", b"\xff\xfe")], PASSAGE)
    assert refused.value.status == 400
    assert to_sandbox([(b"x-a", "grün".encode())], PASSAGE)[1] == (b"x-a", "grün".encode())


@pytest.mark.parametrize(
    "name", ["Connection", "Keep-Alive", "Transfer-Encoding", "Trailer", "Upgrade", "Server", "Sandledger-Error"]
)
def test_never_reaches_the_client(name: str):
    assert values(got((name, "x")), name.lower()) == []


def test_a_length_is_kept_where_the_body_has_it():
    assert values(got(("Content-Length", "5")), "content-length") == ["5"]
    assert values(got(("Content-Length", "5"), ("Transfer-Encoding", "chunked")), "content-length") == []
    for status in (204, 304):
        assert values(got(("Content-Length", "5"), status=status), "content-length") == []


def test_the_rest_of_an_answer_stays():
    given_ = [("content-encoding", "gzip"), ("etag", '"a"'), ("access-control-allow-origin", "*"), ("date", "now")]
    assert got(*given_)[: len(given_)] == given_


@pytest.mark.parametrize("value", [b"a\rb", b"a\x00b", b"a\x7f", b"a\nb"])
def test_control_characters_are_no_answer(value: bytes):
    with pytest.raises(Refusal) as refused:
        to_client(200, [(b"x-a", value)], PASSAGE)
    assert (refused.value.status, refused.value.code) == (502, "BACKEND_RESPONSE_FAILED")


@pytest.mark.parametrize(
    ("cookie", "expected"),
    [
        ("a=b", "a=b"),
        ("a=b; Path=/", f"a=b; Path={PREFIX}/"),
        ("a=b; path=/app; HttpOnly", f"a=b; Path={PREFIX}/app; HttpOnly"),
        ("a=b; Domain=example.com; Secure", "a=b; Secure"),
        ("a=b;DOMAIN=.x;PATH=/", f"a=b; Path={PREFIX}/"),
        (f"a=b; Path={PREFIX}/x", f"a=b; Path={PREFIX}/x"),
        (f"a=b; Path={PREFIX}0", f"a=b; Path={PREFIX}{PREFIX}0"),
        ("a=b; Path=x", "a=b"),
        ("a=b; Path=; Path=/y", f"a=b; Path={PREFIX}/y"),
        ("a=b; Expires=Wed, 21 Oct 2026 07:28:00 GMT", "a=b; Expires=Wed, 21 Oct 2026 07:28:00 GMT"),
    ],
)
def test_a_cookie_is_confined(cookie: str, expected: str):
    assert confined(cookie.encode(), PREFIX) == expected.encode()


def test_repeated_cookies_stay_in_order():
    pairs = got(("Set-Cookie", "a=1"), ("X-A", "x"), ("Set-Cookie", "b=2; Path=/"), ("Set-Cookie", "a=3"))
    assert values(pairs, "set-cookie") == ["a=1", f"b=2; Path={PREFIX}/", "a=3"]


BASE = "http://api.example:8080"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/", f"{PREFIX}/"),
        ("/login?next=/a", f"{PREFIX}/login?next=/a"),
        ("login", "login"),
        ("../up", "../up"),
        ("?page=2", "?page=2"),
        ("//other/x", "//other/x"),
        ("http://other/x", "http://other/x"),
        ("https://other/x", "https://other/x"),
        (f"{PREFIX}/knows", f"{PREFIX}/knows"),
        (f"{PREFIX}?a", f"{PREFIX}?a"),
        ("http://127.0.0.1:3000/x", f"{BASE}{PREFIX}/x"),
        ("http://localhost:3000", f"{BASE}{PREFIX}/"),
        ("http://LOCALHOST:3000?a", f"{BASE}{PREFIX}/?a"),
        ("http://127.0.0.1:32768/x", f"{BASE}{PREFIX}/x"),
        ("http://127.0.0.1:3001/x", "http://127.0.0.1:3001/x"),
        (f"{BASE}/x#y", f"{BASE}{PREFIX}/x#y"),
        (f"{BASE}{PREFIX}/x", f"{BASE}{PREFIX}/x"),
        (f"{BASE}.evil/x", f"{BASE}.evil/x"),
        ("ftp://127.0.0.1:3000/x", "ftp://127.0.0.1:3000/x"),
        ("", ""),
    ],
)
def test_a_redirect_stays_under_the_prefix(location: str, expected: str):
    assert relocated(location.encode(), PASSAGE) == expected.encode()


NAMES = st.sampled_from(
    [
        b"connection",
        b"cookie",
        b"x-forwarded-for",
        b"x_real_ip",
        b"host",
        b"te",
        b"x-a",
        b"x-b",
        b"sandledger-x",
        b"via",
    ]
) | st.from_regex(rb"[a-z_-]{1,12}", fullmatch=True)
VALUES = st.sampled_from([b"close", b"x-a, x-b", b"", b"evil"]) | st.from_regex(rb"[!-~]{0,20}", fullmatch=True)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=30))
def test_no_head_of_any_kind_forges_what_is_ours(headers: list[tuple[bytes, bytes]]):
    pairs = to_sandbox(headers, PASSAGE)
    names = [name.replace(b"_", b"-") for name, _ in pairs]
    for name, value in (
        (b"host", PASSAGE.host),
        (b"x-forwarded-for", b"192.0.2.7"),
        (b"x-real-ip", b"192.0.2.7"),
        (b"x-execd-access-token", b"ours"),
        (b"x-request-id", b"request-1"),
    ):
        assert names.count(name) == 1
        assert pairs[names.index(name)][1] == value
    for name in (b"cookie", b"authorization", b"content-length", b"transfer-encoding", b"connection", b"te"):
        assert name not in names


async def test_through_sockets_nothing_is_added_and_nothing_lost(rig: Rig, agent: Agent, sandbox: UUID):
    theirs = ["X-B: 2", "X-A: 1", "X-B: 1", "Cookie: c=1", "Authorization: Basic eA==", "X-Forwarded-For: 9.9.9.9"]
    assert (await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/a", *theirs, host="localhost"))).status == 200
    got_ = agent.requests[-1]
    assert [
        (name.decode(), value.decode()) for name, value in got_.pairs if name.startswith(b"x-") and len(name) == 3
    ] == [
        ("x-b", "2"),
        ("x-a", "1"),
        ("x-b", "1"),
    ]
    ours = "host accept-encoding x-execd-access-token x-forwarded-for x-forwarded-proto x-forwarded-host"
    ours += " x-forwarded-prefix x-real-ip forwarded via x-request-id"
    ours += " connection" if parts.through == "nginx" else ""
    assert sorted(name.decode() for name, _ in got_.pairs) == sorted(["x-a", "x-b", "x-b", *ours.split()])
    assert (got_.one("host"), got_.one("x-forwarded-for")) == ("localhost", "127.0.0.1")


async def test_an_answer_arrives_with_its_own_headers_only(rig: Rig, agent: Agent, sandbox: UUID):
    async def handler(_request: Request, _reader: object, writer: object) -> None:
        headers = "Date: then\r\nServer: theirs\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nX-A: \xe9\r\n"
        writer.write(answer(b"hi", headers=headers).decode().encode("latin-1"))  # type: ignore[attr-defined]

    agent.handlers["/proxy/3000/a"] = handler
    reply = await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/a"))
    assert [pair for pair in reply.pairs if pair[0] != "x-request-id"] == [
        ("content-length", "2"),
        ("date", "then"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("x-a", "\xe9"),
        (POLICY, SANDBOX),
    ]


async def test_a_cookie_of_one_sandbox_never_reaches_another(rig: Rig, agent: Agent, sandbox: UUID):
    async def sets(_request: Request, _reader: object, writer: object) -> None:
        writer.write(answer(headers="Set-Cookie: secret=A; Path=/\r\n"))  # type: ignore[attr-defined]

    async with parts.agent() as other:
        another = await rig.running(other)
        agent.handlers["/proxy/3000/set"] = other.handlers["/proxy/3000/set"] = sets
        for _ in range(3):
            assert (await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/set"))).one("set-cookie")
            await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/set", "Cookie: theirs=1", method="POST"))
            await say(rig.port, request(f"/sandboxes/{another}/proxy/3000/get"))
            await say(rig.port, request(f"/sandboxes/{another}/proxy/3000/get", method="POST"))
        assert len(agent.requests) == len(other.requests) == 6
        for each in (*agent.requests, *other.requests):
            assert each.all("cookie") == []
            assert b"secret" not in each.head


async def test_a_redirect_is_not_followed(rig: Rig, agent: Agent, sandbox: UUID):
    async def redirects(_request: Request, _reader: object, writer: object) -> None:
        writer.write(answer(b"", "302 Found", "Location: /b\r\n"))  # type: ignore[attr-defined]

    agent.handlers["/proxy/3000/a"] = redirects
    reply = await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/a"))
    assert (reply.status, reply.one("location")) == (302, f"/sandboxes/{sandbox}/proxy/3000/b")
    assert len(agent.requests) == 1


async def test_a_body_is_not_decompressed(rig: Rig, agent: Agent, sandbox: UUID):
    packed = b"\x1f\x8b\x08\x00not really gzip"

    async def compressed(_request: Request, _reader: object, writer: object) -> None:
        writer.write(answer(packed, headers="Content-Encoding: gzip\r\n"))  # type: ignore[attr-defined]

    agent.handlers["/proxy/3000/a"] = compressed
    reply = await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/a"))
    assert (reply.body, reply.one("content-encoding")) == (packed, "gzip")


SANDBOX = "sandbox allow-scripts allow-forms allow-popups allow-downloads"
POLICY = "content-security-policy"


@pytest.mark.parametrize(
    "kind",
    ["text/html", "TEXT/HTML; charset=utf-8", " text/html", "application/xhtml+xml", "image/svg+xml", "text/xml"],
)
def test_a_page_has_no_part_in_our_origin(kind: str):
    assert values(got(("content-type", kind)), POLICY) == [SANDBOX]
    assert values(got(("content-type", kind), (POLICY, "default-src 'self'")), POLICY) == [
        "default-src 'self'",
        SANDBOX,
    ]


def test_what_has_no_type_may_be_taken_for_a_page():
    assert values(got(), POLICY) == [SANDBOX]
    for status in (101, 204, 304):
        assert values(got(status=status), POLICY) == []


@pytest.mark.parametrize("kind", ["*/*", "html", "", "unknown/unknown", "text/plain, text/html", "application/json"])
def test_what_a_browser_may_take_for_a_page_is_not_told_by_its_type(kind: str):
    assert values(got(("content-type", kind)), POLICY) == [SANDBOX]


OF_AN_ORIGIN = [
    ("strict-transport-security", "max-age=1"),
    ("clear-site-data", '"*"'),
    ("alt-svc", "h3=:1"),
    ("nel", "{}"),
    ("report-to", "{}"),
    ("reporting-endpoints", 'a="/x"'),
    ("service-worker-allowed", "/"),
]


@pytest.mark.parametrize(("name", "value"), OF_AN_ORIGIN)
def test_what_holds_for_an_origin_is_not_one_programs_to_say(name: str, value: str):
    assert values(got((name, value)), name) == []
    assert values(got((name, value), passage=replace(PASSAGE, prefix="")), name) == [value]


def test_a_server_in_front_takes_no_orders_from_a_sandbox():
    for passage in (PASSAGE, replace(PASSAGE, prefix="")):
        for name in ("x-accel-redirect", "x-accel-expires", "x-sendfile"):
            assert values(got((name, "/internal/secret"), passage=passage), name) == []
        assert values(got(("x-accel-buffering", "no"), passage=passage), "x-accel-buffering") == ["no"]


def test_a_page_with_an_origin_of_its_own_stays_as_it_is():
    for passage in (replace(PASSAGE, prefix=""), replace(PASSAGE, same_origin_pages=True)):
        assert values(got(("content-type", "text/html"), passage=passage), POLICY) == []


def test_in_the_form_with_the_host_the_origin_is_the_programs():
    own = replace(PASSAGE, prefix="")
    pairs = sent(("cookie", "a=1"), ("authorization", "Basic x"), ("x-forwarded-prefix", "/forged"), passage=own)
    assert (values(pairs, "cookie"), values(pairs, "authorization")) == (["a=1"], ["Basic x"])
    assert values(pairs, "x-forwarded-prefix") == []
    cookies = [("set-cookie", "a=1; Domain=d; Path=/x; Secure"), ("set-cookie", "b=2; path=relative")]
    assert values(got(*cookies, passage=own), "set-cookie") == ["a=1; Path=/x; Secure", "b=2"]
    for location in ("/login", "//other/x", "https://other/x", "relative"):
        assert values(got(("location", location), passage=own), "location") == [location]
    assert values(got(("location", "http://localhost:3000/x"), passage=own), "location") == [
        "http://api.example:8080/x"
    ]
