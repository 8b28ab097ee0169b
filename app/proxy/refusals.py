"""What the proxy itself answers: always `{code, message}`, with the code in the header `Sandledger-Error` too.

A status of the sandbox's program is never changed, so the header is how a client tells our refusal from the program's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

ERROR_HEADER: Final = b"sandledger-error"


class Refusal(Exception):
    """An answer that refuses."""

    def __init__(self, status: int, code: str, message: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        """`message` is for people. `headers` are more headers of the answer."""
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers

    @property
    def body(self) -> bytes:
        """As sent."""
        return msgspec.json.encode({"code": self.code, "message": self.message})


def malformed(message: str) -> Refusal:
    """The framing of the request cannot be passed on as it is."""
    return Refusal(400, "GENERAL::BAD_REQUEST", message)


def invalid_header(message: str) -> Refusal:
    """A header breaks a rule."""
    return Refusal(400, "GENERAL::INVALID_HEADER", message)


def invalid_port() -> Refusal:
    """The path names no port."""
    return Refusal(400, "DOCKER::INVALID_PORT", "The port in the path must be a whole number from 1 to 65535.")


def not_available(message: str) -> Refusal:
    """Pending longer than the proxy waits. The one signal on which the SDKs ask again."""
    return Refusal(404, "KUBERNETES::POD_IP_NOT_AVAILABLE", message)


def not_running(message: str) -> Refusal:
    """Paused, exited or failed."""
    return Refusal(409, "DOCKER::SANDBOX_NOT_RUNNING", message)


def link_invalid() -> Refusal:
    """What was sent as a link is none that holds."""
    return Refusal(401, "PROXY::LINK_INVALID", "The link is not valid, or it was revoked. Ask for a new one.")


def link_expired() -> Refusal:
    """It was one."""
    return Refusal(401, "PROXY::LINK_EXPIRED", "The link has expired. Ask for a new one.")


def origin_not_allowed() -> Refusal:
    """A browser sent the cookie of a link for the page of another origin."""
    return Refusal(
        403,
        "PROXY::ORIGIN_NOT_ALLOWED",
        "This request with the cookie of a link comes from a page of another origin. Pages of the sandbox's own "
        "address may send it, and those of proxy.allowed_origins.",
    )


def replaced(
    message: str = "The sandbox has been made again since this endpoint was given out; ask for the endpoint again.",
) -> Refusal:
    """The request was meant for an earlier object of the sandbox."""
    return Refusal(410, "SANDBOX::ENDPOINT_REPLACED", message)


def not_proven(message: str) -> Refusal:
    """Nobody knows whose address that is."""
    return Refusal(502, "PROXY::ADDRESS_NOT_PROVEN", message)


def not_connected(message: str) -> Refusal:
    """No connection to the sandbox."""
    return Refusal(502, "BACKEND_CONNECTION_FAILED", message)


def no_answer(message: str) -> Refusal:
    """A connection, and no whole head of an answer on it."""
    return Refusal(502, "BACKEND_RESPONSE_FAILED", message)


def too_slow(seconds: float) -> Refusal:
    """Neither a piece of the body nor an answer in time."""
    return Refusal(504, "BACKEND_TIMEOUT", f"Nothing moved for {seconds:g} s: no piece of the body, and no answer.")


def busy(what: str) -> Refusal:
    """A limit of streams is reached."""
    return Refusal(
        503, "PROXY::BUSY", f"{what} has as many open streams as it may have; try again.", [("retry-after", "1")]
    )


def store_unavailable(message: str) -> Refusal:
    """The head row cannot be read."""
    return Refusal(503, "GENERAL::STORE_UNAVAILABLE", message, [("retry-after", "2")])


def loop() -> Refusal:
    """The request came through this installation again and again."""
    return Refusal(508, "PROXY::LOOP", "The request has passed this server four times already: a sandbox calls itself.")
