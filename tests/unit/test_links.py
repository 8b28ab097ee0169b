"""Signed links without sockets: what a value proves, where it stands in a request, and whose pages may send it."""

from __future__ import annotations

from datetime import timedelta
from urllib.parse import urljoin, urlsplit
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.links import Link, LinkKey, milliseconds, read
from app.domain.sandbox.state import Phase, Sandbox
from app.errors import Conflict, Forbidden, NotFound
from app.proxy.admit import Admitted, ByLinks, admit, by_links, check_page
from app.proxy.heads import to_sandbox
from app.proxy.links import first_visit, in_cookies, location, sets_link, taken, taken_from, without_link
from app.proxy.refusals import Refusal
from app.proxy.route import route
from tests.proxy.test_heads import PASSAGE
from tests.support.stream import BEGIN, ID, in_phase

KEY = LinkKey(b"k" * 32)
HOUR = timedelta(hours=1)
links = st.builds(
    Link, st.uuids(), st.integers(1, 65535), st.integers(0, 2**31), st.integers(0, 2**31), st.integers(1, 10**14 - 1)
)


def running() -> Sandbox:
    return in_phase(Phase.RUNNING).sandbox


def link_to(sandbox: Sandbox, port: int = 3000) -> Link:
    return Link(sandbox.id, port, sandbox.generation, sandbox.link_number, milliseconds(BEGIN + HOUR))


def shown(*values: str, port: int = 3000, key: LinkKey | None = KEY) -> ByLinks:
    return by_links(values, port, key, is_first_visit=False)


def refused(sandbox: Sandbox | None, *values: str, port: int = 3000, after: timedelta = timedelta()) -> tuple[int, str]:
    with pytest.raises(Refusal) as caught:
        admit(sandbox, port, shown(*values, port=port), KEY, BEGIN + after)
    return caught.value.status, caught.value.code


INVALID = (401, "PROXY::LINK_INVALID")
EXPIRED = (401, "PROXY::LINK_EXPIRED")
REPLACED = (410, "SANDBOX::ENDPOINT_REPLACED")


# Values


@given(links)
def test_what_was_signed_is_read_again(link: Link):
    value = KEY.sign(link)
    sent = read(value)
    assert sent is not None
    assert (sent.key_id, sent.expiry_ms) == (KEY.id, link.expiry_ms)
    assert KEY.signed(link, sent)
    assert value.rpartition(".")[2] not in repr((sent, link, KEY)), "a traceback may show them"


@given(links, st.data())
def test_any_changed_character_makes_it_worthless(link: Link, data: st.DataObject):
    value = KEY.sign(link)
    at = data.draw(st.integers(0, len(value) - 1))
    other = data.draw(st.characters().filter(lambda one: one != value[at]))
    changed = value[:at] + other + value[at + 1 :]
    sent = read(changed)
    assert sent is None or sent.key_id != KEY.id or not KEY.signed(replace(link, expiry_ms=sent.expiry_ms), sent)


@given(links, links)
def test_it_is_for_one_thing_only(link: Link, other: Link):
    for one in (
        replace(link, sandbox_id=other.sandbox_id),
        replace(link, port=other.port),
        replace(link, generation=other.generation),
        replace(link, number=other.number),
        replace(link, expiry_ms=other.expiry_ms),
        # What one word loses and the next one gains must not look the same.
        replace(link, port=link.port * 10, generation=link.generation % 10),
    ):
        sent = read(KEY.sign(link))
        assert sent is not None
        assert KEY.signed(one, sent) is (one == link)
        assert (KEY.sign(one) == KEY.sign(link)) is (one.id == link.id) is (one == link)


@pytest.mark.parametrize("value", ["", "v1", "v2.a.b.c", f"v1.{KEY.id}.01.{'0' * 32}", f"v1.{KEY.id}.1.{'A' * 32}"])
def test_what_is_no_value(value: str):
    assert read(value) is None


def test_another_key_signs_otherwise_and_has_another_name():
    other, link = LinkKey(b"x" * 32), link_to(running())
    assert KEY.id != other.id
    assert KEY.sign(link).rpartition(".")[2] != other.sign(link).rpartition(".")[2]
    assert KEY.secret.hex() not in KEY.sign(link)


# Commands


def test_a_link_is_an_event_and_a_revocation_raises_the_number():
    stream = in_phase(Phase.RUNNING)
    (made,) = stream.do(cmd.CreateLink(3000, 60))
    assert isinstance(made, ev.LinkCreated)
    link = Link(ID, 3000, 1, 0, milliseconds(made.expires_at))
    assert (made.link_id, made.port) == (link.id, 3000)
    assert timedelta(seconds=60) - (made.expires_at - stream.now) < timedelta(milliseconds=1)
    assert stream.sandbox.link_number == 0
    assert stream.do(cmd.RevokeLinks()) == (ev.LinksRevoked(1),)
    assert stream.do(cmd.RevokeLinks()) == (ev.LinksRevoked(2),)
    assert stream.sandbox.link_number == 2


def test_where_there_is_no_object_there_is_no_link():
    for phase, kind in (
        (Phase.PENDING, NotFound),
        (Phase.FAILED, Conflict),
        (Phase.TERMINATED, Conflict),
        (Phase.STOPPING, NotFound),
    ):
        with pytest.raises(kind):
            in_phase(phase).do(cmd.CreateLink(3000, 60))
    for phase in (Phase.RUNNING, Phase.PAUSING, Phase.PAUSED, Phase.RESUMING):
        assert in_phase(phase).do(cmd.CreateLink(3000, 60))
    for port in (44772, 18080):
        with pytest.raises(Forbidden, match="PROXY::PORT_NOT_ALLOWED"):
            in_phase(Phase.RUNNING).do(cmd.CreateLink(port, 60))


# Admission


def test_what_holds_is_let_in_as_the_owner():
    sandbox = replace(running(), tenant="owner")
    link = link_to(sandbox)
    value = KEY.sign(link)
    assert admit(sandbox, 3000, shown(value), KEY, BEGIN) == Admitted("owner", link, value)
    assert value not in repr(Admitted("owner", link, value))


def test_what_does_not_hold_says_no_more_than_its_holder_knew():
    stream = in_phase(Phase.RUNNING)
    sandbox = stream.sandbox
    link = link_to(sandbox)
    value = KEY.sign(link)
    assert refused(None, value) == INVALID
    assert refused(sandbox, value, port=3001) == INVALID
    assert refused(replace(sandbox, id=UUID(int=1)), value) == INVALID
    assert refused(sandbox, value, after=HOUR) == EXPIRED
    assert refused(replace(sandbox, generation=2), value) == REPLACED
    assert refused(replace(sandbox, generation=2, link_number=1), value) == INVALID
    assert refused(stream.fork().after(cmd.RevokeLinks()).sandbox, value) == INVALID
    assert refused(stream.fork().after(cmd.Terminate()).sandbox, value) == REPLACED
    ended = stream.fork().after(cmd.RevokeLinks(), cmd.Terminate()).sandbox
    assert refused(ended, value) == INVALID, "that it has ended is nobody's business who has no link"
    forged = f"{value[:-1]}{'0' if value[-1] != '0' else '1'}"
    assert refused(sandbox, forged) == refused(sandbox, forged, after=HOUR) == INVALID


def test_before_any_row_is_read():
    value = KEY.sign(link_to(running()))
    for values in ((), ("",), ("x",), (LinkKey(b"x" * 32).sign(link_to(running())),)):
        with pytest.raises(Refusal, match="401 PROXY::LINK_INVALID"):
            shown(*values)
    with pytest.raises(Refusal, match="401 PROXY::LINK_INVALID"):
        shown(value, key=None)
    for port in (44772, 18080):
        with pytest.raises(Refusal, match="403 PROXY::PORT_NOT_ALLOWED"):
            shown(value, port=port)


def test_of_several_the_right_one_counts_and_else_the_one_that_says_most():
    sandbox = running()
    good = KEY.sign(link_to(sandbox))
    late = KEY.sign(replace(link_to(sandbox), expiry_ms=milliseconds(BEGIN)))
    old = KEY.sign(replace(link_to(sandbox), generation=sandbox.generation))
    wrong = KEY.sign(replace(link_to(sandbox), port=1))
    assert admit(sandbox, 3000, shown(wrong, late, good), KEY, BEGIN).value == good
    assert refused(sandbox, wrong, late, wrong) == EXPIRED
    assert refused(replace(sandbox, generation=2), wrong, old) == REPLACED


def test_an_earlier_object_is_known_as_far_back_as_is_looked():
    sandbox = replace(running(), generation=1)
    value = KEY.sign(link_to(sandbox))
    assert refused(replace(sandbox, generation=17), value) == REPLACED
    assert refused(replace(sandbox, generation=10**6), value) == INVALID


# Pages


@pytest.mark.parametrize(
    ("headers", "may"),
    [
        ({"host": "a.test"}, True),
        ({"host": "a.test", "origin": "https://a.test"}, True),
        ({"host": "A.test:81", "origin": "http://a.test:81"}, True),
        ({"host": "a.test", "origin": "https://IDE.test"}, True),
        ({"host": "a.test", "origin": "https://ide.test:1"}, False),
        ({"host": "a.test", "origin": "https://b.a.test"}, False),
        ({"host": "a.test", "origin": "null"}, False),
        ({"host": "", "origin": "null"}, False),
        ({"origin": "null"}, False),
        ({"host": "a.test", "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, False),
        ({"host": "a.test", "sec-fetch-site": "cross-site"}, False),
        ({"host": "a.test", "sec-fetch-site": "same-site", "sec-fetch-mode": "navigate"}, True),
        ({"host": "a.test", "sec-fetch-site": "same-origin", "sec-fetch-mode": "no-cors"}, True),
        ({"host": "a.test", "sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, True),
    ],
)
def test_whose_pages_may_send_a_cookie(headers: dict[str, str], may: bool):
    if may:
        check_page(headers, {"https://ide.test"})
    else:
        with pytest.raises(Refusal, match="403 PROXY::ORIGIN_NOT_ALLOWED"):
            check_page(headers, {"https://ide.test"})


# In requests


@pytest.mark.parametrize(
    ("rest", "kept", "found"),
    [
        (b"/a", b"/a", ()),
        (b"/a?", b"/a?", ()),
        (b"/a?sandledger_link=v", b"/a", ("v",)),
        (b"?sandledger_link=v", b"", ("v",)),
        (b"/a?b=%41&&sandledger_link=v&c?d", b"/a?b=%41&&c?d", ("v",)),
        (b"/a?sandledger%5Flink=v&b", b"/a?b", ("v",)),
        (b"/a?sandledger_link", b"/a", ("",)),
        (b"/a?sandledger_link=v&sandledger_link=w#f?sandledger_link=x", b"/a#f?sandledger_link=x", ("v", "w")),
        (b"/a#b?sandledger_link=v", b"/a#b?sandledger_link=v", ()),
        (b"/a?xsandledger_link=v", b"/a?xsandledger_link=v", ()),
    ],
)
def test_a_link_is_taken_out_of_the_query_and_nothing_else(rest: bytes, kept: bytes, found: tuple[str, ...]):
    assert taken_from(rest) == (kept, found)
    target = f"/v1/sandboxes/{ID}/proxy/3000".encode() + rest
    there = route(target)
    assert there is not None
    assert (there.rest, there.links) == (kept, found)
    assert "sandledger" not in repr(there)


@given(st.binary())
def test_any_other_query_stays_as_it_is(query: bytes):
    kept, found = taken(query)
    assert found or kept == query
    assert taken(kept) == (kept, ())


def test_cookies_of_ours_are_found_and_taken_out():
    headers = [(b"cookie", b'a=1; sandledger-link="v"; b=2'), (b"x", b"y"), (b"cookie", b"__Host-sandledger-link=w")]
    assert in_cookies(headers) == ("w",), "the name that no other host can set"
    assert in_cookies(headers[:1]) == ("v",)
    assert without_link(b"a=1; sandledger-link=v; b=2") == b"a=1; b=2"
    assert without_link(b"__Host-sandledger-link=w;c=3") == b"c=3"
    assert without_link(b"sandledger-link=v") == b""
    assert without_link(b"xsandledger-link=v") == b"xsandledger-link=v"
    assert in_cookies([(b"cookie", b"; ".join([b"sandledger-link=v"] * 100))]) == ("v",) * 8
    assert sets_link(b"sandledger-link=v; Path=/")
    assert not sets_link(b"a=sandledger-link")


def test_nothing_of_it_reaches_the_sandbox():
    value = KEY.sign(link_to(running()))
    headers = [
        (b"cookie", f"a=1; __Host-sandledger-link={value}".encode()),
        (b"cookie", f"sandledger-link={value}".encode()),
        (b"referer", f"http://h/a?sandledger_link={value}".encode()),
        (b"x-other", b"y"),
    ]
    for prefix in ("", f"/sandboxes/{ID}/proxy/3000"):
        sent = to_sandbox(headers, replace(PASSAGE, prefix=prefix))
        assert value.encode() not in b"".join(each for _, each in sent)
        assert (b"x-other", b"y") in sent
        assert ((b"cookie", b"a=1") in sent) is (prefix == "")


# The first visit


def test_the_cookie_is_as_narrow_as_its_form_allows():
    def cookie(prefix: str, *, secure: bool) -> bytes:
        return dict(first_visit("v", 60, prefix, b"/a", secure=secure))[b"set-cookie"]

    assert cookie("", secure=True) == (b"__Host-sandledger-link=v; Max-Age=60; Path=/; HttpOnly; Secure; SameSite=Lax")
    assert cookie("", secure=False) == b"sandledger-link=v; Max-Age=60; Path=/; HttpOnly; SameSite=Lax"
    assert cookie("/x/sandboxes/1/proxy/3000", secure=True) == (
        b"sandledger-link=v; Max-Age=60; Path=/x/sandboxes/1/proxy/3000; HttpOnly; Secure; SameSite=Lax"
    )


@given(st.text(st.sampled_from("/\\\t\n\r.aé?#@:%2f"), max_size=8).map(lambda rest: "/" + rest))
def test_no_first_visit_leads_to_another_host(rest: str):
    """As browsers read it: they drop tabs and line ends, and take a backslash for a slash."""
    seen = location("", rest.encode()).decode()
    seen = seen.translate({ord("\t"): None, ord("\n"): None, ord("\r"): None}).replace("\\", "/")
    assert not seen.startswith("//")
    assert urlsplit(urljoin("http://own.test/x", seen)).netloc == "own.test"


def test_an_ordinary_path_stays_as_it_is():
    for rest in (b"/", b"/?a", b"/a//b", b"/%2F", b"/.x", b"/~u/"):
        assert location("", rest) == rest
    assert location("", b"//evil.test/") == b"/.//evil.test/"
    assert location("/v1/sandboxes/1/proxy/3000", b"//a") == b"/v1/sandboxes/1/proxy/3000//a"
