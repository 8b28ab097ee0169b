"""`Answer`: what handlers return. A struct as JSON, encoded once by one shared encoder.

Litestar's `Response` merges headers, cookies and encoders of four layers for each request and makes an encoder each
time. Nothing here sets any of them, so `Answer` keeps its interface (typed content for the OpenAPI document, usable by
exception handlers) and skips that work.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from litestar import Response
from litestar.types import Receive, Scope, Send

T = TypeVar("T")
encode = msgspec.json.Encoder().encode
_JSON = (b"content-type", b"application/json")
_WITHOUT_LENGTH = (204, 304)
"""Every other answer has one; without it an empty 202 would be sent in chunks."""


class Answer(Response[T]):
    """A status, headers, and a body or none."""

    def __init__(self, content: T, *headers: tuple[str, str], status: int | None = None) -> None:
        """`status` is the handler's own if it is not given. None as content = no body."""
        self.content = content
        self.status_code = status
        self._headers = headers

    def to_asgi_response(self, *_: Any, status_code: int | None = None, **__: Any) -> Any:
        """Litestar's hook; what its layers would add is not looked at."""
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self._headers]
        content = self.content
        body = b""
        if content is not None:
            body = content if isinstance(content, bytes) else encode(content)
            if not any(name == b"content-type" for name, _ in headers):
                headers.append(_JSON)
        status = self.status_code or status_code or 200
        if status not in _WITHOUT_LENGTH:
            headers.append((b"content-length", str(len(body)).encode()))

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001 - ASGI
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})

        return answer


def unchanged(*headers: tuple[str, str]) -> Answer[Any]:
    """304, which never has a body."""
    return Answer(None, *headers, status=304)
