"""One question to an agent: does it answer, and if not, why.

============================ ========================== ==============================================================
what is seen                 reason                     what it means
============================ ========================== ==============================================================
200                          none                       the agent of this sandbox answers
refused, or closed at once   `AGENT_NOT_LISTENING`      it did not start, or has ended
401                          `AGENT_OF_ANOTHER`         another sandbox's agent has this address
no route, no connection      `NETWORK_NOT_REACHABLE`    this server cannot reach the address
connected, no answer         `AGENT_SILENT`             it hangs, or gets too little CPU
any other answer             `PORT_TAKEN_IN_IMAGE`      another program of the image has the port
============================ ========================== ==============================================================

A published port is served by the engine, which accepts a connection and closes it when nothing listens inside. So an
answer that ends before its first byte means the same as a refused connection.
"""

from __future__ import annotations

import asyncio
import errno

import aiohttp
from msgspec import Struct

from app.agent.session import plain_session
from app.agent.token import TOKEN_HEADER

CONNECT_SECONDS = 1.0
ANSWER_SECONDS = 1.0
_OK, _UNAUTHORIZED = 200, 401
_NO_ROUTE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT)


class Trouble(Struct, frozen=True):
    """Why an agent did not answer, in a word of the catalogue and for people."""

    reason: str
    message: str


class Prober:
    """Asks agents. One client, closed at the end."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, address: str, token: str) -> Trouble | None:
        """Ask the agent at `host:port` once. None = it is the right one, and it answers."""
        try:
            async with (
                asyncio.timeout(CONNECT_SECONDS + ANSWER_SECONDS),
                self._client().get(
                    f"http://{address}/ping", headers={TOKEN_HEADER: token}, allow_redirects=False
                ) as response,
            ):
                return judge(response.status, response.headers.get("Server", ""), address)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return explain(error, address)

    async def close(self) -> None:
        """Release connections."""
        if self._session is not None:
            await self._session.close()

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = plain_session(
                # A connection that is kept would be one to a container that may have ended since.
                aiohttp.TCPConnector(force_close=True, limit=0),
                aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS),
            )
        return self._session


def judge(status: int, server: str, address: str) -> Trouble | None:
    """What an HTTP answer means."""
    if status == _OK:
        return None
    if status == _UNAUTHORIZED:
        return Trouble(
            "AGENT_OF_ANOTHER",
            f"An agent answers on {address}, but it is not this sandbox's: two sandboxes share an address. "
            'Use docker.network_mode = "bridge".',
        )
    who = f" (Server: {server[:100]})" if server else ""
    return Trouble(
        "PORT_TAKEN_IN_IMAGE",
        f"{address} answers with status {status}{who}, so it is not the agent: a program of the image may use its "
        "port.",
    )


def explain(error: Exception, address: str) -> Trouble:
    """What a question without an answer means."""
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno not in _NO_ROUTE:
        return _not_listening(address)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Trouble(
            "NETWORK_NOT_REACHABLE",
            f"This server cannot reach {address}, where the sandbox's agent should be: "
            "check docker.publish_host and the network between this server and the engine.",
        )
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError | aiohttp.ClientOSError):
        return _not_listening(address)
    if isinstance(error, TimeoutError):
        return Trouble(
            "AGENT_SILENT",
            f"{address} accepts the connection and does not answer: the agent may hang, or its CPU limit is too small.",
        )
    return Trouble("PORT_TAKEN_IN_IMAGE", f"{address} does not speak HTTP, so it is not the agent.")


def _not_listening(address: str) -> Trouble:
    return Trouble(
        "AGENT_NOT_LISTENING",
        f"The container runs, and nothing listens on {address}: its agent did not start, or has ended.",
    )
