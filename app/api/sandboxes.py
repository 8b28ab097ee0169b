"""Sandboxes: create, list, read, delete, change metadata."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from uuid import UUID

from litestar import delete, get, patch, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from msgspec import UNSET

from app.api import sandbox_wire as wire
from app.api.answers import Answer, unchanged
from app.api.commands import execute, sandbox_of
from app.api.conditions import etag, not_modified, preferences
from app.api.controller import ApiController
from app.api.creation import begin
from app.api.errors import wrong
from app.api.filters import (
    DEFAULT_PAGE_SIZE,
    CursorText,
    Limit,
    Metadata,
    Page,
    PageNumber,
    PageSize,
    States,
    list_page,
)
from app.api.instants import parse_instant
from app.api.openapi import APPLIED, BODY, COMMAND, ETAG, RESTORE, Documented, header, may_refuse
from app.api.parameters import (
    AsOf,
    IdempotencyKey,
    IfMatch,
    IfNoneMatch,
    IncludeTerminal,
    Prefer,
    SandboxId,
)
from app.api.request import ApiRequest
from app.api.waiting import until
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.decide import visible
from app.domain.sandbox.state import Phase, Sandbox, fold
from app.domain.sandbox.status import Attempt
from app.views.listing import TooFar

_UNBOUNDED = 2**31


class Sandboxes(ApiController):
    """The collection and its members."""

    path = "/sandboxes"
    tags = ("sandboxes",)

    @post(
        operation_id="createSandbox",
        operation_class=Documented,
        summary="Create a sandbox",
        status_code=202,
        response_description="Accepted.",
        response_headers=[
            header("Location", "Path of the new sandbox."),
            ETAG,
            APPLIED,
            header("Idempotency-Replayed", "`true` when an earlier request made the sandbox."),
        ],
        responses=may_refuse(
            "SANDBOX::INVALID_PARAMETER",
            "SANDBOX::INVALID_METADATA_LABEL",
            "DOCKER::INVALID_ENTRYPOINT",
            "SANDLEDGER::IDEMPOTENCY_KEY_REUSED",
            "SANDBOX::API_NOT_SUPPORTED",
            *RESTORE,
            *BODY,
        ),
    )
    async def create(
        self,
        request: ApiRequest,
        data: JSONBody[wire.CreateSandbox],
        idempotency_key: IdempotencyKey = None,
        prefer: Prefer = None,
    ) -> Answer[wire.CreatedSandbox]:
        """The answer comes as soon as the request is committed, with state `Pending`. The container follows."""
        preferred = preferences(prefer, self.context.wait_seconds_max)
        outcome = await begin(self.context, request.call, data, idempotency_key)
        sandbox = outcome.sandbox
        if preferred.wait:
            appended = not outcome.replayed
            sandbox = await until(self.context, request.call, sandbox, _provisioned, preferred.wait, appended=appended)
        replayed = [("idempotency-replayed", "true")] if outcome.replayed else []
        location = ("location", f"{request.mount}/sandboxes/{sandbox.id}")
        pending = sandbox.phase is Phase.PENDING and bool(preferred.wait)
        attempt = await self.context.service.view.attempt(sandbox) if pending else None
        return Answer(wire.created_body(sandbox, attempt), location, etag(sandbox), *preferred.applied, *replayed)

    @get(
        operation_id="listSandboxes",
        operation_class=Documented,
        summary="List sandboxes, newest first",
        response_description="A page.",
        responses=may_refuse(
            "INVALID_METADATA_FORMAT",
            "SANDLEDGER::CURSOR_EXPIRED",
            "GENERAL::VALIDATION_ERROR",
            "SANDBOX::API_NOT_SUPPORTED",
        ),
    )
    async def list(
        self,
        request: ApiRequest,
        *,
        states: States = None,
        metadata: Metadata = None,
        page: PageNumber = 1,
        page_size: PageSize = DEFAULT_PAGE_SIZE,
        cursor: CursorText = None,
        limit: Limit = DEFAULT_PAGE_SIZE,
        include_terminal: IncludeTerminal = False,
    ) -> Answer[wire.SandboxList]:
        """Sandboxes of the caller's tenant that have not ended."""
        size = limit if request.given("limit") else page_size
        asked = Page(request.given, states, metadata, page, size, cursor, include_terminal)
        wanted, offset, after, number = list_page(asked, request.tenant)
        try:
            found = await self.context.listing.page(wanted, size=size, offset=offset, after=after)
        except TooFar as error:
            raise wrong("query", "page", rule=str(error)) from None
        pending = [sandbox for sandbox in found.sandboxes if sandbox.phase is Phase.PENDING]
        attempts: Mapping[UUID, Attempt] = await self.context.service.view.attempts(pending) if pending else {}
        pages = -(-found.total // size)
        return Answer(
            wire.SandboxList(
                tuple(wire.sandbox_body(sandbox, attempts.get(sandbox.id)) for sandbox in found.sandboxes),
                wire.Pagination(
                    number, size, found.total, pages, found.next is not None, found.is_lower_bound or UNSET
                ),
                UNSET if found.next is None else str(found.next),
            )
        )

    @get(
        "/{sandboxId:str}",
        operation_id="getSandbox",
        operation_class=Documented,
        summary="Read a sandbox",
        response_description="The sandbox.",
        response_headers=[ETAG],
        responses={
            304: ResponseSpec(None, description="The sandbox is still at that version."),
            **may_refuse("DOCKER::SANDBOX_NOT_FOUND", "GENERAL::VALIDATION_ERROR"),
        },
    )
    async def get(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        include_terminal: IncludeTerminal = False,
        as_of: AsOf = None,
        if_none_match: IfNoneMatch = None,
    ) -> Answer[wire.SandboxBody]:
        """The sandbox as it is now, or as it was."""
        identity, tenant, service = sandbox_of(sandbox_id), request.tenant, self.context.service
        if as_of is None:
            loaded = await service.view.load(identity, tenant)
            sandbox = None if loaded is None else loaded[0]
        else:
            instant = parse_instant("asOf", as_of)
            history = await service.history(identity, tenant)
            # Cut at the first later event: where the clock stepped back, a filter by time would leave holes.
            sandbox = fold(takewhile(lambda event: event.at <= instant, history))
        if sandbox is None or not include_terminal:
            sandbox = visible(sandbox, identity)
        if not_modified(if_none_match, sandbox):
            return unchanged(etag(sandbox))
        now = as_of is None and sandbox.phase is Phase.PENDING
        attempt = await service.view.attempt(sandbox) if now else None
        return Answer(wire.sandbox_body(sandbox, attempt), etag(sandbox))

    @delete(
        "/{sandboxId:str}",
        operation_id="deleteSandbox",
        operation_class=Documented,
        summary="Delete a sandbox",
        response_description="The sandbox has ended.",
        responses=may_refuse(*COMMAND),
    )
    async def delete(self, request: ApiRequest, sandbox_id: SandboxId, if_match: IfMatch = None) -> Answer[None]:
        """The sandbox has ended when this answers. Its container is removed after that. Its history stays."""
        await execute(self.context, request, sandbox_id, cmd.Terminate(), if_match)
        return Answer(None)

    @patch(
        "/{sandboxId:str}/metadata",
        operation_id="patchSandboxMetadata",
        operation_class=Documented,
        summary="Change metadata",
        response_description="The sandbox.",
        response_headers=[ETAG],
        responses=may_refuse(
            "SANDBOX::INVALID_METADATA_LABEL", "INVALID_METADATA_LABEL", "SANDBOX::INVALID_PARAMETER", *COMMAND, *BODY
        ),
    )
    async def patch_metadata(
        self, request: ApiRequest, sandbox_id: SandboxId, data: JSONBody[wire.MetadataPatch], if_match: IfMatch = None
    ) -> Answer[wire.SandboxBody]:
        """Merge patch of depth one (RFC 7396): a string sets, null removes."""
        most = self.context.metadata_max_entries
        command = cmd.PatchMetadata(data, _UNBOUNDED if most is None else most)
        sandbox = (await execute(self.context, request, sandbox_id, command, if_match)).sandbox
        return Answer(wire.sandbox_body(sandbox), etag(sandbox))


def _provisioned(sandbox: Sandbox) -> bool:
    return sandbox.phase is not Phase.PENDING
