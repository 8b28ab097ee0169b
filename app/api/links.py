"""Signed links: for browsers, which cannot send a key. `app.domain.sandbox.links` says what a link is.

The answer of a create is the only place where the value of a link ever stands. The log names the link, who made it, the
port and the end.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from litestar import delete, post
from litestar.params import JSONBody
from msgspec import Meta, Struct

from app.api.answers import Answer
from app.api.commands import execute, sandbox_of
from app.api.conditions import etag
from app.api.controller import ApiController
from app.api.endpoints import Port, host_of, port_of
from app.api.errors import INVALID_PARAMETER
from app.api.openapi import BODY, COMMAND, ETAG, Documented, may_refuse
from app.api.parameters import IfMatch, SandboxId
from app.api.request import ApiRequest
from app.api.sandbox_wire import Instant
from app.api.waiting import until
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.decide import unknown, visible
from app.domain.sandbox.endpoints import Asked, link_url
from app.domain.sandbox.links import LONGEST_SECONDS, check_port, milliseconds, present
from app.domain.sandbox.state import Phase, Sandbox


class CreateLink(Struct, frozen=True, rename="camel"):
    """For how long the link holds."""

    expires_in: Annotated[int, Meta(ge=1, le=LONGEST_SECONDS, description="Seconds, 7 days at most.")]

    @classmethod
    def example(cls) -> CreateLink:
        """For the document."""
        return cls(3600)


class LinkBody(Struct, frozen=True, rename="camel"):
    """A signed link. Whoever has `url` reaches this port until `expiresAt`; nobody can ask for it again."""

    url: str
    expires_at: Instant
    link_id: UUID
    """Its name in the history of the sandbox."""

    def __repr__(self) -> str:
        """Keep the link out of tracebacks."""
        return f"LinkBody(link_id={self.link_id})"

    @classmethod
    def example(cls) -> LinkBody:
        """For the document."""
        return cls(
            "https://3000-0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b.sandboxes.example.com/"
            "?sandledger_link=v1.0a1b2c3d.1769864400000.00112233445566778899aabbccddeeff",
            datetime(2026, 1, 31, 13, tzinfo=UTC),
            UUID("5f2c9a00-0000-5000-8000-000000000001"),
        )


class Links(ApiController):
    """Of one sandbox."""

    path = "/sandboxes/{sandboxId:str}"
    tags = ("sandboxes",)

    @post(
        "/endpoints/{port:str}/links",
        operation_id="createSandboxLink",
        operation_class=Documented,
        summary="Make a signed link to a port",
        status_code=201,
        response_description="The link.",
        response_headers=[ETAG],
        responses=may_refuse(
            INVALID_PARAMETER,
            "DOCKER::INVALID_PORT",
            "PROXY::PORT_NOT_ALLOWED",
            "KUBERNETES::POD_IP_NOT_AVAILABLE",
            "DOCKER::SANDBOX_NOT_RUNNING",
            *COMMAND,
            *BODY,
        ),
    )
    async def create(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        port: Port,
        data: JSONBody[CreateLink],
        if_match: IfMatch = None,
    ) -> Answer[LinkBody]:
        """A browser that opens the link gets a cookie and the page without the link in its address. The link ends at
        its time, when links are revoked, and when the sandbox ends or is made again. On a Pending sandbox the answer
        waits up to 20 s. Not in the public contract.
        """
        number = port_of(port)
        check_port(number)
        await self._awaited(request, sandbox_id)
        command = cmd.CreateLink(number, data.expires_in)
        outcome = await execute(self.context, request, sandbox_id, command, if_match)
        sandbox, ours = outcome.sandbox, self.context.endpoints
        (made,) = outcome.events
        assert isinstance(made, ev.LinkCreated)
        link = present(sandbox, number, milliseconds(made.expires_at))
        asked = Asked(number, True, host_of(request), request.mount, request.scope["scheme"])
        url = link_url(sandbox, asked, ours.network, ours.link_key.sign(link))
        return Answer(
            LinkBody(url, made.expires_at, made.link_id), etag(sandbox), ("cache-control", "no-store"), status=201
        )

    async def _awaited(self, request: ApiRequest, sandbox_id: str) -> None:
        """Wait for a sandbox that has no object yet: a link leads to one object of it."""
        identity = sandbox_of(sandbox_id)
        loaded = await self.context.service.view.load(identity, request.tenant)
        if loaded is None:
            raise unknown(identity)
        sandbox = visible(loaded[0], identity)
        await until(self.context, request.call, sandbox, _has_begun, self.context.endpoints.wait_seconds)

    @delete(
        "/links",
        operation_id="revokeSandboxLinks",
        operation_class=Documented,
        summary="Revoke all links of a sandbox",
        response_description="No link that was made before holds any more.",
        response_headers=[ETAG],
        responses=may_refuse(*COMMAND),
    )
    async def revoke(self, request: ApiRequest, sandbox_id: SandboxId, if_match: IfMatch = None) -> Answer[None]:
        """Streams and WebSockets that were opened by a link are cut within two seconds. Not in the public contract."""
        outcome = await execute(self.context, request, sandbox_id, cmd.RevokeLinks(), if_match)
        return Answer(None, etag(outcome.sandbox))


def _has_begun(sandbox: Sandbox) -> bool:
    return sandbox.phase is not Phase.PENDING
