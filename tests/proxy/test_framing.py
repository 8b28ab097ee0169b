"""One request in is one request out; one answer in is one answer out. Whatever is not clear is refused."""

from __future__ import annotations

import asyncio
from uuid import UUID

from app.proxy.client import MAX_HEAD_BYTES
from tests.proxy import rig as rig_
from tests.proxy.rig import Agent, Request, Rig, answer, calling, request, say

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n"
PATH = "/sandboxes/{}/proxy/3000/a"


def post(sandbox: UUID, *headers: str, body: bytes = b"", method: str = "POST") -> bytes:
    return request(PATH.format(sandbox), *headers, method=method) + body


SMUGGLED: dict[str, tuple[tuple[str, ...], bytes]] = {
    "length and chunked": (("Content-Length: 4", "Transfer-Encoding: chunked"), b"0\r\n\r\n" + HIDDEN),
    "chunked and length": (("Transfer-Encoding: chunked", "Content-Length: 4"), b"0\r\n\r\n" + HIDDEN),
    "two lengths": (("Content-Length: 0", "Content-Length: 34"), HIDDEN),
    "two equal lengths": (("Content-Length: 2", "Content-Length: 2"), b"ab"),
    "a list of lengths": (("Content-Length: 2, 2",), b"ab"),
    "a signed length": (("Content-Length: +2",), b"ab"),
    "a length in hex": (("Content-Length: 0x2",), b"ab"),
    "a huge length": (("Content-Length: 99999999999999999999",), b"ab"),
    "an obsolete fold": (("X-A: b", " Content-Length: 34"), HIDDEN),
    "a folded coding": (("Transfer-Encoding:", " chunked"), b"0\r\n\r\n" + HIDDEN),
    "a space before the colon": (("Content-Length : 34",), HIDDEN),
    "a tab before the colon": (("Transfer-Encoding\t: chunked",), b"0\r\n\r\n"),
    "a coding that is not known": (("Transfer-Encoding: xchunked",), b"0\r\n\r\n" + HIDDEN),
    "a coding before chunked": (("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n"),
    "a coding behind chunked": (("Transfer-Encoding: chunked, identity",), b"0\r\n\r\n"),
    "chunked twice": (("Transfer-Encoding: chunked, chunked",), b"0\r\n\r\n"),
    "chunked in two headers": (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
    "two hosts": (("Host: b", "Content-Length: 0"), b""),
    "a control character": (("X-A: a\x0bb",), b""),
}


async def test_what_two_servers_could_read_differently_is_refused(rig: Rig, agent: Agent, sandbox: UUID):
    for name, (headers, body) in SMUGGLED.items():
        reply = await say(rig.port, post(sandbox, *headers, body=body))
        # nginx says 501 to codings that it does not know.
        assert reply.status in ((400, 501) if rig_.through == "nginx" else (400,)), name
        assert agent.requests == [], name


async def test_a_line_that_ends_with_lf_alone_is_refused(rig: Rig, agent: Agent, sandbox: UUID):
    for sent in (
        post(sandbox, "X-A: b").replace(b"\r\n", b"\n"),
        post(sandbox, "X-A: b\nContent-Length: 34", body=HIDDEN),
        post(sandbox, "X-A: b\rContent-Length: 34", body=HIDDEN),
        post(sandbox, "Transfer-Encoding: chunked", body=b"2\nab\n0\n\n"),
    ):
        reply = await say(rig.port, sent)
        assert reply.status in (400, 502), sent
    assert not [each for each in agent.requests if "hidden" in each.target]
    assert len(agent.requests) <= 1


async def test_a_chunk_of_a_wrong_kind_is_no_end_of_a_request(rig: Rig, agent: Agent, sandbox: UUID):
    """The head has gone to the sandbox already: the request there must stay unfinished, and the connection is closed."""
    for body in (
        b"zz\r\n",
        b"-1\r\n",
        b"2;a=\nb\r\nab\r\n0\r\n\r\n",
        b"2\r\nabc\r\n0\r\n\r\n",
        b"2 \r\nab\r\n0\r\n\r\n",
    ):
        async with calling(rig.port) as caller:
            caller.writer.write(post(sandbox, "Transfer-Encoding: chunked", body=body))
            assert (await caller.reply()).status == 400, body
    assert agent.requests == []


async def test_a_body_stays_a_body(rig: Rig, agent: Agent, sandbox: UUID):
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
    async with calling(rig.port) as caller:
        for method in ("POST", "PUT", "DELETE", "GET", "OPTIONS"):
            caller.writer.write(post(sandbox, f"Content-Length: {len(HIDDEN)}", body=HIDDEN, method=method))
            assert (await caller.reply()).status == 200
            caller.writer.write(post(sandbox, "Transfer-Encoding: chunked", body=chunked, method=method))
            assert (await caller.reply()).status == 200
    assert [(each.target, each.body) for each in agent.requests] == [("/proxy/3000/a", HIDDEN)] * 10


async def test_requests_in_one_piece_are_as_many_requests(rig: Rig, agent: Agent, sandbox: UUID):
    async with calling(rig.port) as caller:
        caller.writer.write(
            post(sandbox, "Content-Length: 2", body=b"ab")
            + request(PATH.format(sandbox))
            + post(sandbox, "Transfer-Encoding: chunked", body=b"1\r\nc\r\n0\r\n\r\n")
            + request("/health")
        )
        replies = [await caller.reply() for _ in range(4)]
    assert [each.status for each in replies] == [200] * 4
    assert [each.body for each in agent.requests] == [b"ab", b"", b"c"]


BROKEN = {
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "nothing": b"",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "bare LF in one line": b"HTTP/1.1 200 OK\r\nX-A: b\nX-C: d\r\nContent-Length: 0\r\n\r\n",
    "bare CR": b"HTTP/1.1 200 OK\r\nX-A: b\rX-C: d\r\nContent-Length: 0\r\n\r\n",
    "a fold": b"HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    "a NUL": b"HTTP/1.1 200 OK\r\nX-A: b\x00\r\nContent-Length: 0\r\n\r\n",
    "length and chunked": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 1\r\n\r\na",
    "two answers": answer(b"a") + answer(b"b"),
    "more than its length": answer(b"a") + b"GARBAGE\r\n\r\n",
    "switching": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a status beyond": b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
    "a huge head": b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
    "a head of many lines": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (MAX_HEAD_BYTES // 6) + b"\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * (MAX_HEAD_BYTES // 3),
}


async def test_what_is_no_answer_is_502(rig: Rig, agent: Agent, sandbox: UUID):
    """And the connection that it came on is not used again, or the next request would get the second half."""
    for name, raw in BROKEN.items():

        async def handler(_request: Request, _reader: object, writer: asyncio.StreamWriter, raw: bytes = raw) -> None:
            writer.write(raw)
            await writer.drain()
            if not raw or not raw.endswith(b"\r\n\r\n"):
                writer.close()

        agent.handlers["/proxy/3000/broken"] = handler
        for method in ("GET", "POST"):
            reply = await say(rig.port, request(f"/sandboxes/{sandbox}/proxy/3000/broken", method=method))
            if name in ("two answers", "more than its length") and reply.status == 200:
                assert reply.body == b"a"
            else:
                assert (reply.status, reply.code) == (502, "BACKEND_RESPONSE_FAILED"), name
            after = await say(rig.port, request(PATH.format(sandbox)))
            assert after.body == b'{"target": "/proxy/3000/a"}', name


async def test_a_head_of_nearly_the_bound_is_an_answer(rig: Rig, agent: Agent, sandbox: UUID):
    async def handler(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        whole = answer(b"a", headers="X-A: " + "a" * (MAX_HEAD_BYTES - 200) + "\r\n")
        for at in range(0, len(whole), 1000):
            writer.write(whole[at : at + 1000])
            await asyncio.sleep(0)

    agent.handlers["/proxy/3000/a"] = handler
    assert (await say(rig.port, request(PATH.format(sandbox)))).status == 200


async def test_interim_answers_are_passed_over(rig: Rig, agent: Agent, sandbox: UUID):
    async def handler(_request: Request, _reader: object, writer: asyncio.StreamWriter) -> None:
        for piece in (
            b"HTTP/1.1 100 Continue\r\n",
            b"\r\n",
            b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n",
            answer(b"x"),
        ):
            writer.write(piece)
            await asyncio.sleep(0)

    agent.handlers["/proxy/3000/a"] = handler
    reply = await say(rig.port, request(PATH.format(sandbox)))
    assert (reply.status, reply.body, reply.all("link")) == (200, b"x", [])


async def test_answers_without_a_body(rig: Rig, agent: Agent, sandbox: UUID):
    for status, headers in (("204 No Content", "Content-Length: 0\r\n"), ("304 Not Modified", "Content-Length: 7\r\n")):

        async def handler(
            _request: Request,
            _reader: object,
            writer: asyncio.StreamWriter,
            status: str = status,
            headers: str = headers,
        ) -> None:
            writer.write(f"HTTP/1.1 {status}\r\nETag: a\r\n{headers}\r\n".encode())

        agent.handlers["/proxy/3000/b"] = handler
        async with calling(rig.port) as caller:
            for _ in range(2):
                caller.writer.write(request(f"/sandboxes/{sandbox}/proxy/3000/b"))
                reply = await caller.reply()
                assert (reply.status, reply.one("etag")) == (int(status[:3]), "a")
