"""What moves a sandbox through its life: pause, resume, renew."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from litestar import post
from litestar.params import JSONBody
from msgspec import Meta, Struct

from app.api.answers import Answer
from app.api.commands import execute
from app.api.conditions import etag, preferences
from app.api.controller import ApiController
from app.api.instants import of_epoch_or_text
from app.api.openapi import APPLIED, BODY, COMMAND, ETAG, Documented, may_refuse
from app.api.parameters import IfMatch, Prefer, SandboxId
from app.api.request import ApiRequest
from app.api.sandbox_wire import Instant
from app.api.waiting import until
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase


class RenewExpiration(Struct, frozen=True, rename="camel"):
    """The new end, earlier or later than the present one."""

    expires_at: (
        Annotated[
            datetime,
            Meta(extra_json_schema={"format": "date-time"}, description="RFC 3339. Without an offset it is UTC."),
        ]
        | int
        | float
    )

    @classmethod
    def example(cls) -> RenewExpiration:
        """For the document."""
        return cls(datetime(2030, 1, 31, 12, tzinfo=UTC))


class RenewedExpiration(Struct, frozen=True, rename="camel"):
    """The end that holds now."""

    expires_at: Instant


class Lifecycle(ApiController):
    """Commands on one sandbox."""

    path = "/sandboxes/{sandboxId:str}"
    tags = ("sandboxes",)

    @post(
        "/pause",
        operation_id="pauseSandbox",
        operation_class=Documented,
        summary="Pause a sandbox",
        status_code=202,
        response_description="Accepted.",
        response_headers=[ETAG, APPLIED],
        responses=may_refuse("DOCKER::SANDBOX_NOT_RUNNING", "SANDBOX::API_NOT_SUPPORTED", *COMMAND),
    )
    async def pause(
        self, request: ApiRequest, sandbox_id: SandboxId, if_match: IfMatch = None, prefer: Prefer = None
    ) -> Answer[None]:
        """The answer waits a few seconds for the state `Paused`, unless `Prefer` says otherwise."""
        return await self._power(request, sandbox_id, cmd.Pause(), Phase.PAUSING, if_match=if_match, prefer=prefer)

    @post(
        "/resume",
        operation_id="resumeSandbox",
        operation_class=Documented,
        summary="Resume a sandbox",
        status_code=202,
        response_description="Accepted.",
        response_headers=[ETAG, APPLIED],
        responses=may_refuse("DOCKER::SANDBOX_NOT_PAUSED", "SANDBOX::API_NOT_SUPPORTED", *COMMAND),
    )
    async def resume(
        self, request: ApiRequest, sandbox_id: SandboxId, if_match: IfMatch = None, prefer: Prefer = None
    ) -> Answer[None]:
        """The answer waits a few seconds for the state `Running`, unless `Prefer` says otherwise."""
        return await self._power(request, sandbox_id, cmd.Resume(), Phase.RESUMING, if_match=if_match, prefer=prefer)

    async def _power(
        self,
        request: ApiRequest,
        sandbox_id: str,
        command: cmd.Command,
        under_way: Phase,
        *,
        if_match: str | None,
        prefer: str | None,
    ) -> Answer[None]:
        preferred = preferences(prefer, self.context.wait_seconds_max)
        outcome = await execute(self.context, request, sandbox_id, command, if_match)
        seconds: float = 0 if preferred.respond_async else self.context.power_wait_seconds
        if preferred.wait is not None:
            seconds = preferred.wait
        sandbox = await until(
            self.context,
            request.call,
            outcome.sandbox,
            lambda read: read.phase is not under_way,
            seconds,
            appended=outcome.position is not None,
        )
        return Answer(None, etag(sandbox), *preferred.applied)

    @post(
        "/renew-expiration",
        operation_id="renewSandboxExpiration",
        operation_class=Documented,
        summary="Move the end of a sandbox",
        status_code=200,
        response_description="The end that holds now.",
        response_headers=[ETAG],
        responses=may_refuse("DOCKER::INVALID_EXPIRATION", "SANDBOX::INVALID_PARAMETER", *COMMAND, *BODY),
    )
    async def renew(
        self, request: ApiRequest, sandbox_id: SandboxId, data: JSONBody[RenewExpiration], if_match: IfMatch = None
    ) -> Answer[RenewedExpiration]:
        """The new end is earlier or later. A renewal that comes too late is 409, never a false 200."""
        command = cmd.Renew(of_epoch_or_text(data.expires_at), self.context.max_sandbox_timeout_seconds)
        sandbox = (await execute(self.context, request, sandbox_id, command, if_match)).sandbox
        assert sandbox.expires_at is not None, "a renewal of what never expires is refused"
        return Answer(RenewedExpiration(sandbox.expires_at), etag(sandbox))
