"""Calls to one engine, typed, with every way they fail sorted into two.

* `Refused`: the engine answered 4xx or 5xx. The caller knows what it asked for and gives the verdict.
* `RuntimeUnavailable`: no usable answer: no connection, a cut answer, a timeout, something that is not the engine.

The client library's own verbs are not used, because they neither pass the platform at create nor tell a cut stream
from a finished one; its connection handling and version negotiation are, through the one private call in `open`.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

import aiodocker
import aiohttp
import msgspec

from app.errors import RuntimeUnavailable

T = TypeVar("T")
NOT_CONNECTED = 900
"""The status that the client library invents when there is no connection."""
CONNECT_TIMEOUT = 30.0


class Refused(Exception):
    """The engine answered with an error. Never leaves the driver: `message` may repeat what we sent."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the engine answered {status}")
        self.status = status
        self.message = message


class Engine:
    """One engine behind one client."""

    def __init__(self, docker: aiodocker.Docker, timeout: float) -> None:
        self._docker = docker
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    @property
    def address(self) -> str:
        """For people: the socket or URL, without a password that it might hold."""
        connector = self._docker.connector
        if isinstance(connector, aiohttp.UnixConnector):
            return f"unix://{connector.path}"
        return self._docker.docker_host.rpartition("@")[2]

    async def ask(
        self, path: str, answer: type[T], *, params: Mapping[str, str] | None = None, versioned: bool = True
    ) -> T:
        """GET something."""
        async with self.open("GET", path, params=params, versioned=versioned) as response:
            return self._decode(await response.read(), answer)

    async def create(self, path: str, body: msgspec.Struct, answer: type[T], *, params: Mapping[str, str]) -> T:
        """POST a document and read another."""
        async with self.open("POST", path, params=params, body=msgspec.json.encode(body)) as response:
            return self._decode(await response.read(), answer)

    async def tell(self, method: str, path: str, *, params: Mapping[str, str] | None = None) -> None:
        """Order something; "already so" (304) is success."""
        async with self.open(method, path, params=params) as response:
            await response.read()

    @asynccontextmanager
    async def open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: aiohttp.ClientTimeout | None = None,  # noqa: ASYNC109
        versioned: bool = True,
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """An answer to be read inside the block. Leaving the block early closes the connection, which ends a stream."""
        try:
            async with self._docker._query(  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                path,
                method,
                params=params,
                data=body,
                headers=headers,
                timeout=timeout or self._timeout,
                versioned_api=versioned,
            ) as response:
                try:
                    yield response
                finally:
                    response.release()
        except aiodocker.DockerError as error:
            if error.status == NOT_CONNECTED:
                raise self._unreachable(error.__context__ or error) from None
            raise Refused(error.status, error.message) from None
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise self._unreachable(error) from None
        except (ValueError, KeyError) as error:
            # The library could not make sense of an error's body: no engine speaks like that, a proxy might.
            raise RuntimeUnavailable(f"{self.address} does not answer like a Docker engine") from error

    def _decode(self, body: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=answer)
        except msgspec.DecodeError as error:
            raise RuntimeUnavailable(f"the engine at {self.address} gave an answer we cannot read: {error}") from None

    def _unreachable(self, error: BaseException) -> RuntimeUnavailable:
        """Say what to do about it."""
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
            return RuntimeUnavailable(f"{place} did not answer in time: look at its load and its log")
        return RuntimeUnavailable(
            f"the connection to {place} broke ({type(error).__name__}): see whether it is running, and DOCKER_HOST"
        )


def until_done(*, quiet: float | None = None) -> aiohttp.ClientTimeout:
    """No limit on the whole, for streams; `quiet` = seconds of silence after which the stream counts as dead."""
    return aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=quiet)


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
