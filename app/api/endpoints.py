"""Endpoints: where clients reach a port of a sandbox.

A lookup reads one row and asks no engine. On a Pending sandbox it waits until there is an answer, for 20 s at most, on
the signal of the log; it holds nothing meanwhile and ends when its client leaves.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from litestar import get
from litestar.openapi.spec import Example
from litestar.params import PathParameter, QueryParameter
from msgspec import Struct

from app.agent import agent_token
from app.api.answers import Answer
from app.api.commands import sandbox_of
from app.api.controller import ApiController
from app.api.errors import INVALID_PARAMETER, wrong
from app.api.openapi import Documented, may_refuse
from app.api.parameters import SandboxId
from app.api.request import ApiRequest
from app.api.waiting import until
from app.domain.sandbox.decide import unknown, visible
from app.domain.sandbox.endpoints import MAX_PORT, Asked, is_awaited, not_yet, resolve
from app.domain.sandbox.state import Sandbox
from app.errors import Invalid

_WHOLE = re.compile(r"-?[0-9]{1,4000}")
_HOST = re.compile(r"([A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
"""Stricter than Litestar, which lets `user@host` pass."""
_EXPIRES: Final = (
    400,
    "SANDBOX::API_NOT_SUPPORTED",
    "expires needs a gateway with signing keys, which this runtime does not have. Leave it out.",
)

Port = Annotated[
    str,
    PathParameter(
        name="port",
        description="Port inside the sandbox. The agent's is 44772.",
        examples=[Example(id="port", value=8080)],
        schema_extra={"type": "integer", "minimum": 1, "maximum": MAX_PORT},
    ),
]
_WORDS: Final = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}
"""What the public server takes for a boolean, in small or capital letters."""
UseServerProxy = Annotated[
    str | None,
    QueryParameter(
        name="use_server_proxy",
        description="An endpoint that leads through this server, for clients that reach no other. `yes`, `on` and the "
        "like are `true`.",
        schema_extra={"type": "boolean", "default": False},
    ),
]
Expires = Annotated[
    str | None,
    QueryParameter(
        name="expires",
        description="Epoch seconds until which a signed endpoint holds. Refused: this runtime signs none.",
        schema_extra={"pattern": r"^-?[0-9]+$"},
    ),
]


class EndpointBody(Struct, frozen=True):
    """Where a port is reached. `endpoint` has no scheme and may have a path. `headers` go with every request to it."""

    endpoint: str
    headers: dict[str, str]

    def __repr__(self) -> str:
        """Keep the token out of tracebacks."""
        return f"EndpointBody(endpoint={self.endpoint!r})"

    @classmethod
    def example(cls) -> EndpointBody:
        """For the document."""
        return cls(
            "127.0.0.1:32768/proxy/3000",
            {"Sandledger-Generation": "1", "X-EXECD-ACCESS-TOKEN": "64 hexadecimal digits"},
        )


class Endpoints(ApiController):
    """Lookups."""

    path = "/sandboxes/{sandboxId:str}/endpoints"
    tags = ("sandboxes",)

    @get(
        "/{port:str}",
        operation_id="getSandboxEndpoint",
        operation_class=Documented,
        summary="Look up where a port is reached",
        response_description="The endpoint.",
        responses=may_refuse(
            INVALID_PARAMETER,
            "DOCKER::INVALID_PORT",
            _EXPIRES,
            "DOCKER::SANDBOX_NOT_FOUND",
            "KUBERNETES::POD_IP_NOT_AVAILABLE",
            "DOCKER::SANDBOX_NOT_RUNNING",
            "SANDBOX::AGENT_UNREACHABLE",
            "GENERAL::VALIDATION_ERROR",
            "SANDBOX::AGENT_NOT_AVAILABLE",
        ),
    )
    async def look_up(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        port: Port,
        proxied: UseServerProxy = None,
        expires: Expires = None,
    ) -> Answer[EndpointBody]:
        """On a Pending sandbox the answer waits up to 20 s. `KUBERNETES::POD_IP_NOT_AVAILABLE` means: ask again."""
        number, use_server_proxy = port_of(port), _truth(proxied)
        _check_expires(expires, through_server=use_server_proxy)
        identity, view, ours = sandbox_of(sandbox_id), self.context.service.view, self.context.endpoints
        loaded = await view.load(identity, request.tenant)
        if loaded is None:
            raise unknown(identity)
        sandbox = visible(loaded[0], identity)
        if expires is not None:
            raise Invalid(*_EXPIRES[1:])
        asked = Asked(number, use_server_proxy, host_of(request), request.mount)

        def done(read: Sandbox) -> bool:
            return not is_awaited(read, asked, ours.network)

        sandbox = await until(self.context, request.call, sandbox, done, ours.wait_seconds)
        if not done(sandbox):
            raise not_yet(sandbox, await view.attempt(sandbox))
        token = agent_token(ours.token_key, sandbox.object_id or sandbox.id, sandbox.generation)
        found = resolve(sandbox, asked, ours.network, token)
        return Answer(EndpointBody(found.address, found.headers), ("cache-control", "no-store"))


def port_of(text: str) -> int:
    """The port in a path.

    Raises:
        Problem: 422, it is no whole number.
        Invalid: it is none that a program can listen on.
    """
    if not _WHOLE.fullmatch(text):
        raise wrong("path", "port", rule="must be a whole number")
    number = int(text)
    if not 1 <= number <= MAX_PORT:
        raise Invalid("DOCKER::INVALID_PORT", f"port must be from 1 to {MAX_PORT}.")
    return number


def _truth(text: str | None) -> bool:
    if text is None:
        return False
    found = _WORDS.get(text.lower())
    if found is None:
        raise wrong("query", "use_server_proxy", rule="must be true or false")
    return found


def _check_expires(expires: str | None, *, through_server: bool) -> None:
    if expires is None:
        return
    if not _WHOLE.fullmatch(expires):
        raise wrong("query", "expires", rule="must be a whole number")
    if through_server:
        raise Invalid(INVALID_PARAMETER, "expires must not stand beside use_server_proxy=true.")


def host_of(request: ApiRequest) -> str:
    """The host that the client called; the address of its connection when the header names none."""
    named = request.call.headers.get("host", "")
    if _HOST.fullmatch(named):
        return named
    host, port = request.scope["server"] or ("localhost", None)
    host = f"[{host}]" if ":" in host else host
    return host if port is None else f"{host}:{port}"
