"""The relay: one HTTP request to a sandbox, and its answer, both as streams. Plain ASGI.

A WebSocket begins as such a request, so it has the same admission, limits, headers and refusals. When the program
accepts it, the two connections are joined (`app.proxy.splice`) and the request is over; its place stays taken. Any
other answer of the program is passed on, and then the connection is closed.

A stream goes through these steps: admit (who calls), frame (what the body is), limits, target, send, copy. Nothing is
buffered beyond what both sides' sockets hold: the client's is not read while the sandbox does not read, and the other
way round.

* **The client leaves**: the connection to the sandbox is given up. A handler that only waits for the sandbox would
  never notice, and a thousand readers of events who left would hold a thousand connections.
* **The sandbox ends in the middle**: the client's connection is aborted. A clean end would make half a body look like
  a whole one.
* **The answer comes before the body has**: it is passed on at once, while the body goes on. The connection is closed
  after it, since the rest of the body would stand where the next request begins.
* **Time**: until the head of the answer something must move every `idle_seconds`: a piece of the body, or the answer.
  After that an event stream may be silent for hours, or for `stream_idle_seconds` where the operator wants it.
* **The sandbox ends, or is started again**: its streams are cut (`app.proxy.watch`).
* **A link** that let a stream in ends, or is revoked: the stream is cut. Its first visit is answered here.
* **The server stops**: streams get `drain_seconds`, and those that are left are cut.
* **Nothing listens** at a leased address: then, before anything was sent, the request goes through the agent, which
  reaches also what listens on the sandbox's loopback only. The agent says first whose the address is (`ports`).
* **401** through the agent: it says that of a token that is not its own, so another sandbox may have the address by
  now. But the program in the sandbox may say it too. So the agent is asked by `/ping`, with the token, before such an
  answer is passed on.
* **502** in the agent's words says that nothing listens on the port (`app.proxy.agent`). The caller gets our own words.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from math import ceil
from typing import Final, cast
from uuid import UUID

from msgspec.structs import replace

from app.agent.token import TOKEN_HEADER
from app.domain.sandbox.links import Link
from app.proxy.activity import Activity
from app.proxy.admit import Admitted, ByKey, ByLinks, Credentials, admit
from app.proxy.agent import nothing_listens
from app.proxy.client import Answer, AnswerFailed, Client, ConnectFailed, Cut, Outgoing
from app.proxy.cors import PREFLIGHT, is_preflight, readable
from app.proxy.heads import Headers, Passage, to_client, to_sandbox
from app.proxy.inbound import Exchange, Inbound, Receive, Scope, Send
from app.proxy.limits import Stream, Streams
from app.proxy.links import first_visit
from app.proxy.options import Identify, Options, passage_of, prefix_of
from app.proxy.pace import Pace, Passing
from app.proxy.refusals import (
    ERROR_HEADER,
    Refusal,
    invalid_port,
    link_invalid,
    no_answer,
    not_connected,
    not_proven,
    too_slow,
)
from app.proxy.resolve import Resolver, Target, generation_of
from app.proxy.splice import splice
from app.proxy.watch import watch

_PROVE_SECONDS: Final = 2.0
_UNAUTHORISED: Final = 401
_OK: Final = 200
_ANOTHERS: Final = "What answers at the sandbox's address does not know its token: the address is another's."
_NOBODY: Final = "Nothing listens on port {} inside the sandbox, or only on its loopback: listen on 0.0.0.0."
_CLOSE: Final = (b"connection", b"close")
_EMPTY: Final = (b"content-length", b"0")
_LOG = logging.getLogger(__name__)


class Relay:
    """Of one process. Made inside the event loop."""

    def __init__(self, identify: Identify, resolver: Resolver, options: Options, activity: Activity) -> None:
        """`close` closes the activity."""
        self._identify = identify
        self.resolver = resolver
        self.options = options
        self.client = Client()
        self.activity = activity
        self.pace = Pace()
        self.streams = Streams(options.limits)
        watching = watch(self.streams, resolver.rows, options.stream_idle_seconds)
        self._watch = asyncio.create_task(watching, name="proxy-watch")

    async def drain(self, seconds: float) -> None:
        """Wait for the streams to end, and cut those that are left then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.streams.none()
        self.streams.cut()

    async def close(self) -> None:
        """End all connections to sandboxes."""
        self._watch.cancel()
        self.streams.cut()
        self.resolver.rows.close()
        await self.client.close()
        await self.activity.close()

    async def __call__(self, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = exchange.route
        inbound = Inbound(exchange, scope, receive, Passing(self.activity, self.pace, route.sandbox_id))
        if self.options.cors and is_preflight(scope["method"], inbound.headers):
            await _answer(204, PREFLIGHT, b"", inbound, send)
            return
        try:
            shown = self._identify(scope["headers"], route)
            if (port := route.port) is None:
                raise invalid_port()
            inbound.frame()
            generation = generation_of(scope["headers"])
            admitted = await self._admit(shown, route.sandbox_id, port)
            tenant, link = admitted.tenant, admitted.link
            if isinstance(shown, ByLinks) and shown.is_first_visit and inbound.is_read:
                await self._remember(admitted, inbound, send)
                return
            place = self.streams.enter(tenant, route.sandbox_id, None if link is None else link.number)
            stream = _Stream(self, place, inbound, send)
            try:
                if link is not None:
                    stream.by_link(link, self.resolver.rows.now())
                    generation = link.generation if generation is None else generation
                find = partial(self.resolver.target, route.sandbox_id, tenant, port, generation)
                await stream.run(partial(find, by_link=link is not None))
            finally:
                if not stream.spliced:
                    place.leave()
        except Refusal as refusal:
            await _refuse(refusal, inbound, send, cors=self.options.cors)

    async def _admit(self, shown: Credentials, sandbox_id: UUID, port: int) -> Admitted:
        """Who sends it. Only a link needs the row for that."""
        if isinstance(shown, ByKey):
            return Admitted(shown.tenant)
        sandbox, key = await self.resolver.unproven(sandbox_id), self.options.links
        if sandbox is None or key is None:
            raise link_invalid()
        return admit(sandbox, port, shown, key, self.resolver.rows.now())

    async def _remember(self, admitted: Admitted, inbound: Inbound, send: Send) -> None:
        """Have the browser keep the link, and come again without it in the address."""
        link, options, route = admitted.link, self.options, inbound.exchange.route
        assert link is not None, "without a link it is no first visit"
        seconds = max(1, ceil((link.expires_at - self.resolver.rows.now()).total_seconds()))
        prefix = prefix_of(route, options.external_path)
        secure = options.secure or inbound.scope["scheme"] == "https"
        headers = [*first_visit(admitted.value, seconds, prefix, route.rest, secure=secure), _EMPTY]
        await _answer(303, headers, b"", inbound, send)


class _Stream:
    """One admitted request."""

    def __init__(self, relay: Relay, place: Stream, inbound: Inbound, send: Send) -> None:
        self._client = relay.client
        self._options = relay.options
        self._resolver = relay.resolver
        self._route = inbound.exchange.route
        self._place = place
        self._passing = inbound.passing
        self._inbound = inbound
        self._send = send
        self._answer: Answer | None = None
        self.spliced = False
        """Whether the place is given back by the joined connections."""
        self._adds_token = relay.options.adds_token

    def by_link(self, link: Link, now: datetime) -> None:
        """A link let it in: it ends with the link. Browsers do not have the agent's token, so it is added for them."""
        self._adds_token = True
        self._place.end_in((link.expires_at - now).total_seconds(), self._inbound.exchange.abort)

    async def run(self, find: Callable[[], Awaitable[Target]]) -> None:
        """From the target to the last byte. Returns too when the client has left.

        Raises:
            Refusal: before anything was answered.
        """
        inbound, idle = self._inbound, self._options.idle_seconds
        exchange = inbound.exchange
        try:
            async with asyncio.timeout(idle) as clock:
                exchange.on_left = lambda: _within(clock, 0)
                if exchange.gone:
                    return
                target = await find()
                self._place.generation, self._place.run = target.generation, target.run
                if inbound.has_body:
                    inbound.on_move = lambda: _within(clock, idle)
                answer, passage = await self._asked(target)
                inbound.on_move = self._place.touch
                clock.reschedule(None)
                if exchange.gone:
                    return
                if answer.switched:
                    self._splice(answer, passage)
                else:
                    self._place.cut = exchange.abort
                    await self._copy(answer, passage)
        except TimeoutError:
            if not exchange.gone:
                raise too_slow(idle) from None
        finally:
            exchange.on_left = None
            inbound.still()
            if self._answer is not None:
                self._answer.abort()

    async def _asked(self, target: Target) -> tuple[Answer, Passage]:
        """Ask the program itself where that may be done, else the agent."""
        self._passing.asked()
        if not target.leased:
            return await self._ask_agent(target)
        ports, place, agent = self._resolver.ports, target.place, target.through_agent
        if agent is not None and place.whole not in ports.owned:
            if await self._ping(agent) == _UNAUTHORISED:
                raise not_proven(_ANOTHERS)
            ports.owned.add(place.whole)
        try:
            found = await self._ask(target)
        except ConnectFailed as error:
            ports.accepting.discard(place)
            if not error.refused:
                raise not_connected("The sandbox does not answer at its address; it may have ended.") from None
            if agent is None:
                raise not_connected(_NOBODY.format(target.port_inside)) from None
            found = await self._ask_agent(agent)
            ports.inside.add(place)
        else:
            ports.accepting.add(place)
        return found

    async def _ask_agent(self, target: Target) -> tuple[Answer, Passage]:
        try:
            return await self._ask(target)
        except ConnectFailed:
            raise not_connected("The sandbox's agent does not accept connections; it may have ended.") from None

    async def _ask(self, target: Target) -> tuple[Answer, Passage]:
        """Raises `ConnectFailed`, and `Refusal`."""
        inbound, route, scope = self._inbound, self._route, self._inbound.scope
        passage = passage_of(
            self._options,
            route,
            target,
            adds_token=self._adds_token,
            host=inbound.one(b"host"),
            client=scope["client"][0] if scope.get("client") else "unknown",
            scheme=scope["scheme"],
            request_id=inbound.request_id,
        )
        outgoing = Outgoing(
            scope["method"],
            target,
            route.path,
            to_sandbox(inbound.headers, passage),
            inbound.body() if inbound.has_body else None,
            inbound.length,
            inbound.exchange.upgrade,
        )
        answer = self._answer = await self._sent(outgoing)
        self._passing.answered()
        if answer.status == _UNAUTHORISED and not target.leased and await self._ping(target) != _OK:
            raise not_proven(_ANOTHERS)
        try:
            silent = bool(target.path) and await nothing_listens(answer)
        except Cut:
            raise no_answer("The sandbox ended its answer in the middle.") from None
        if silent:
            raise not_connected(
                f"Nothing answers on port {passage.port} inside the sandbox: no program listens there, or it closed "
                "the connection without an answer."
            )
        return answer, passage

    async def _sent(self, outgoing: Outgoing) -> Answer:
        try:
            return await self._client.send(outgoing)
        except AnswerFailed as error:
            if self._inbound.exchange.gone:
                raise TimeoutError from None
            _LOG.info("request %s: no answer of HTTP from a sandbox: %s", self._inbound.request_id, error)
            raise no_answer("The sandbox closed the connection, or sent what is no answer of HTTP/1.1.") from None

    async def _ping(self, target: Target) -> int:
        """What the agent says to the sandbox's token. 0 = nothing."""
        headers = [(b"host", target.address.encode()), (TOKEN_HEADER.lower().encode(), target.token.encode())]
        agent = replace(target, path="")
        status = 0
        with suppress(TimeoutError, ConnectFailed, AnswerFailed):
            async with asyncio.timeout(_PROVE_SECONDS):
                ping = await self._client.send(Outgoing("GET", agent, "/ping", headers))
                status = ping.status
                ping.abort()
        return status

    def _splice(self, answer: Answer, passage: Passage) -> None:
        """Join the two connections. The rest happens without this request."""
        exchange = self._inbound.exchange
        headers = [
            *to_client(answer.status, answer.headers, passage),
            (b"connection", b"Upgrade"),
            (b"upgrade", cast("bytes", exchange.upgrade)),
        ]
        head = b"".join(b"%b: %b\r\n" % header for header in headers)
        exchange.on_left = None
        client = exchange.switch(b"HTTP/1.1 101 Switching Protocols\r\n%b\r\n" % head)
        self.spliced = True
        self._place.cut = client[0].abort
        options = self._options
        splice(
            client,
            answer.take(),
            self._passing,
            self._place.leave,
            half_closed_seconds=options.half_closed_seconds,
            stall_seconds=options.idle_seconds,
            moved=self._place.touch,
        )

    async def _copy(self, answer: Answer, passage: Passage) -> None:
        """Pass the answer on."""
        inbound, send = self._inbound, self._send
        headers = to_client(answer.status, answer.headers, passage)
        if self._options.cors:
            headers += readable(inbound.headers, headers)
        if not inbound.ended:
            headers.append(_CLOSE)
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        try:
            while piece := await answer.read():
                self._place.touch()
                await self._passing.out(len(piece))
                if answer.ended and inbound.ended:
                    await send({"type": "http.response.body", "body": piece, "more_body": False})
                    return
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                if inbound.exchange.gone:
                    return
        except Cut as cut:
            self._cut(cut)
            return
        if not inbound.ended:
            answer.abort()
            await inbound.linger()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _cut(self, cut: Cut) -> None:
        exchange = self._inbound.exchange
        if not exchange.gone:
            _LOG.info("request %s: the sandbox ended its answer in the middle: %s", self._inbound.request_id, cut)
            exchange.abort()


async def _refuse(refusal: Refusal, inbound: Inbound, send: Send, *, cors: bool) -> None:
    """A whole error answer."""
    body = refusal.body
    headers = [
        *((name.encode(), value.encode()) for name, value in refusal.headers),
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (ERROR_HEADER, refusal.code.encode()),
        *(readable(inbound.headers, ()) if cors else ()),
    ]
    await _answer(refusal.status, headers, body, inbound, send)


async def _answer(status: int, headers: Headers, body: bytes, inbound: Inbound, send: Send) -> None:
    """A whole answer of ours. What is left of the request's body is thrown away."""
    headers = [*inbound.exchange.own_headers, *headers, (b"x-request-id", inbound.request_id.encode())]
    if not inbound.ended:
        headers.append(_CLOSE)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if not inbound.ended:
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await inbound.linger()
        body = b""
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _within(clock: asyncio.Timeout, seconds: float) -> None:
    """Let the clock run out then. A clock that has run out already stays so."""
    with suppress(RuntimeError):
        clock.reschedule(asyncio.get_running_loop().time() + seconds)
