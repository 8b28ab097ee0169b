"""Calls to one engine, typed, with every way they fail sorted into two.

* `Refused`: the engine answered 4xx or 5xx. The caller knows what it asked for and gives the verdict.
* `RuntimeUnavailable`: no usable answer: no connection, a cut answer, a time limit, something that is not the engine.

The API version is the engine's own, asked for before the first call. An engine that was replaced by another version
refuses the version that we speak; then we negotiate again and repeat the call once.

The client library gives address resolution, TLS and connections. Its verbs are not used, because they neither pass the
platform at create, nor distinguish a cut stream from a finished one, nor show the headers of a refusal.
"""

from __future__ import annotations

import errno
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TypeVar

import aiodocker
import aiohttp
import msgspec
from msgspec import Struct

from app.domain.text import storable
from app.errors import RuntimeUnavailable
from app.runtime.docker.answers import Version
from app.runtime.docker.options import Times

T = TypeVar("T")
CONNECT_SECONDS = 30.0
NOT_NEGOTIATED = "auto"
_VERSION = re.compile(r"\d+\.\d+\Z")
_GATEWAY = {HTTPStatus.BAD_GATEWAY, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT}
_LATER = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
_GATE = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_ENGINE_WORDS = ("containerd.sock", "transport is closing", "error while dialing", "context deadline exceeded")
_PLUGIN_WORDS = "authorization denied by plugin"


class Refused(Exception):
    """The engine answered with an error. Never leaves the driver: `message` may repeat what we sent."""

    def __init__(self, status: int, message: str, *, is_engine: bool = True, retry_after: float | None = None) -> None:
        super().__init__(f"the engine answered {status}")
        self.status = status
        self.message = message
        self.is_engine = is_engine
        """False: the answer has not the form of an engine's, so something between us and the engine gave it."""
        self.retry_after = retry_after

    @property
    def is_engine_trouble(self) -> bool:
        """True when it says nothing about what we asked for: overload, a gateway, a proxy or plugin that forbids us."""
        if self.is_guarded or self.status in _GATEWAY or self.status in _LATER:
            return True
        return any(words in self.message.lower() for words in _ENGINE_WORDS)

    @property
    def is_guarded(self) -> bool:
        """True when a socket proxy or an authorization plugin forbids us the call. An operator has to change that."""
        return self.status in _GATE


class Silence(RuntimeUnavailable):
    """A time limit has passed. The connection may be dead, or there was nothing to say."""


class Failure(Struct, frozen=True):
    """The body of an engine's refusal."""

    message: str


class Engine:
    """One engine behind one client."""

    def __init__(self, docker: aiodocker.Docker, times: Times) -> None:
        self._docker = docker
        self.times = times

    @property
    def address(self) -> str:
        """For people: the socket or URL, without a password that it might hold."""
        connector = self._docker.connector
        if isinstance(connector, aiohttp.UnixConnector):
            return f"unix://{connector.path}"
        return self._docker.docker_host.rpartition("@")[2]

    async def ask(
        self,
        path: str,
        answer: type[T],
        *,
        params: Mapping[str, str] | None = None,
        limit: float | None = None,
        versioned: bool = True,
    ) -> T:
        """GET something. `limit` in seconds, else that of an inspect call."""
        timeout = self._within(limit or self.times.inspect)
        async with self.open("GET", path, params=params, versioned=versioned, timeout=timeout) as response:
            return self._decode(await response.read(), answer)

    async def create(
        self,
        path: str,
        body: Struct,
        answer: type[T],
        *,
        params: Mapping[str, str] | None = None,
        limit: float | None = None,
    ) -> T:
        """POST a document and read another. `limit` in seconds, else that of a change."""
        timeout, data = self._within(limit or self.times.change), msgspec.json.encode(body)
        async with self.open("POST", path, params=params, body=data, timeout=timeout) as response:
            return self._decode(await response.read(), answer)

    async def command(
        self, method: str, path: str, *, params: Mapping[str, str] | None = None, limit: float | None = None
    ) -> None:
        """Order something; "already so" (304) is success. `limit` in seconds, else that of a change."""
        timeout = self._within(limit or self.times.change)
        async with self.open(method, path, params=params, timeout=timeout) as response:
            await response.read()

    async def negotiate(self) -> Version:
        """Ask the engine for its version, and speak that from now on."""
        version = await self.ask("version", Version, versioned=False)
        if _VERSION.match(version.api_version) is None:
            raise RuntimeUnavailable(f"{self.address} does not answer like a Docker engine: it names no API version")
        self._docker.api_version = f"v{version.api_version}"
        return version

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        *,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        versioned: bool = True,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """An answer to be read inside the block. Leaving the block early closes the connection, which ends a stream."""
        try:
            try:
                response = await self._send(
                    method, path, params=params, body=body, headers=headers, timeout=timeout, versioned=versioned
                )
            except ValueError as error:
                # aiohttp could not make sense of the answer: no engine speaks like that, a proxy might.
                raise RuntimeUnavailable(f"{self.address} does not answer like a Docker engine") from error
            try:
                yield response
            finally:
                response.release()
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise self._unreachable(error) from None

    async def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109
        versioned: bool,
    ) -> aiohttp.ClientResponse:
        another = False
        while True:
            if versioned and self._docker.api_version == NOT_NEGOTIATED:
                await self.negotiate()
            prefix = f"{self._docker.api_version}/" if versioned else ""
            response = await self._docker.session.request(
                method,
                f"{self._docker.docker_host}/{prefix}{path}",
                params=params,
                data=body,
                headers={"Content-Type": "application/json", **(headers or {})},
                timeout=timeout,
                allow_redirects=False,
            )
            if response.status < HTTPStatus.BAD_REQUEST:
                return response
            refused = await _refusal(response)
            if not versioned or not _speaks_another(refused):
                raise refused
            if another:
                raise RuntimeUnavailable(f"{self.address} refuses its own API version: {storable(refused.message)}")
            # The engine was replaced: neither this call nor the sandbox is to blame.
            self._docker.api_version, another = NOT_NEGOTIATED, True

    def _decode(self, body: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=answer)
        except msgspec.DecodeError as error:
            raise RuntimeUnavailable(f"the engine at {self.address} gave an answer we cannot read: {error}") from None

    def _within(self, seconds: float) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=seconds)

    def _unreachable(self, error: BaseException) -> RuntimeUnavailable:
        """Say what the operator can do about it."""
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        number = cause.errno if isinstance(cause, OSError) else None
        place = f"the Docker engine at {self.address}"
        if number in (errno.EACCES, errno.EPERM):
            return RuntimeUnavailable(
                f"no permission for {place}: join the socket's group (usually `docker`), or set DOCKER_HOST"
            )
        if number in (errno.ENOENT, errno.ECONNREFUSED):
            return RuntimeUnavailable(f"{place} is not running: start it, or set DOCKER_HOST to one that is")
        if isinstance(error, TimeoutError):
            return Silence(f"{place} did not answer in time: check its load and its log")
        return RuntimeUnavailable(
            f"the connection to {place} broke ({type(error).__name__}): see whether it is running, and DOCKER_HOST"
        )


def trouble(what: str, refused: Refused, message: str | None = None) -> RuntimeUnavailable:
    """The engine, or what stands before it, is to blame. `message` = the engine's words without secrets."""
    words = storable(refused.message if message is None else message)
    advice = "; let it through the proxy or plugin in front of the engine" if refused.is_guarded else ""
    return RuntimeUnavailable(
        f"the engine would not {what} ({refused.status}): {words}{advice}", retry_after=refused.retry_after
    )


def until_done(*, quiet: float | None = None) -> aiohttp.ClientTimeout:
    """No limit on the whole, for streams; `quiet` = seconds of silence after which the stream counts as dead."""
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=quiet)


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The lines of a stream, of any length (the library's own reader stops at its buffer's size)."""
    rest = b""
    async for chunk in response.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if line.strip():
                yield line
    if rest.strip():
        yield rest


def is_plugin(refused: Refused) -> bool:
    """True when an authorization plugin of the engine answered, in the engine's own form."""
    return _PLUGIN_WORDS in refused.message.lower()


async def _refusal(response: aiohttp.ClientResponse) -> Refused:
    """Read the whole answer, so that the connection can be used again."""
    body = await response.read()
    response.release()
    after = _seconds(response.headers.get("Retry-After", ""))
    try:
        return Refused(response.status, msgspec.json.decode(body, type=Failure).message, retry_after=after)
    except msgspec.DecodeError:
        text = body.decode(errors="replace").strip()
        return Refused(response.status, text, is_engine=_is_version_text(text), retry_after=after)


def _seconds(header: str) -> float | None:
    """`Retry-After` is a number of seconds or a date (RFC 9110, section 10.2.3)."""
    if header.isascii() and header.isdecimal():
        return float(header)
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def _speaks_another(refused: Refused) -> bool:
    return refused.status == HTTPStatus.BAD_REQUEST and _is_version_text(refused.message)


def _is_version_text(text: str) -> bool:
    """The engine has no code for it. "too old" comes as plain text."""
    lowered = text.lower()
    return "client version" in lowered and ("is too new" in lowered or "is too old" in lowered)
