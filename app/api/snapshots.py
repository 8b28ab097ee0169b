"""Snapshots: create, list, read, delete."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

import uuid_utils.compat
from litestar import delete, get, post
from litestar.openapi.spec import Example
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import UNSET

from app.api.answers import Answer
from app.api.call import uuid_in
from app.api.commands import sandbox_of
from app.api.controller import ApiController
from app.api.filters import DEFAULT_PAGE_SIZE, PageNumber, PageSize
from app.api.openapi import BODY, SNAPSHOT, Documented, header, may_refuse
from app.api.parameters import SandboxId
from app.api.request import OPTIONAL_BODY, ApiRequest
from app.api.sandbox_wire import Pagination
from app.api.snapshot_wire import CreateSnapshot, SnapshotBody, SnapshotList, snapshot_body
from app.api.waiting import Watched, watch
from app.domain.snapshot.decide import unknown, visible
from app.domain.snapshot.state import Snapshot, SnapshotState
from app.errors import NotFound
from app.views.snapshots import Page, Wanted

_STATES = frozenset(state.value for state in SnapshotState if state is not SnapshotState.REMOVED)
_MAX_OFFSET = 2**53

SnapshotId = Annotated[
    str,
    PathParameter(
        name="snapshotId",
        description="UUID of the snapshot.",
        examples=[Example(id="id", value="0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5c")],
    ),
]
OfSandbox = Annotated[str | None, QueryParameter(name="sandboxId", description="Only those of this sandbox.")]
Named = Annotated[str | None, QueryParameter(name="name", description="Only those with exactly this name.")]
InStates = Annotated[
    list[str] | None,
    QueryParameter(
        name="state",
        description="Any of these states, as they are written. May be repeated.",
        examples=[Example(id="ready", value=[SnapshotState.READY.value])],
    ),
]


class Snapshots(ApiController):
    """The collection and its members."""

    path = "/"
    tags = ("snapshots",)

    @post(
        "/sandboxes/{sandboxId:str}/snapshots",
        operation_id="createSnapshot",
        operation_class=Documented,
        summary="Create a snapshot of a sandbox",
        status_code=202,
        response_description="Accepted.",
        response_headers=[header("Location", "Path of the new snapshot.")],
        responses=may_refuse(
            "DOCKER::SANDBOX_NOT_FOUND",
            "SNAPSHOT::INVALID_SOURCE_STATE",
            "SNAPSHOT::TOO_MANY",
            "SNAPSHOT::NOT_IMPLEMENTED",
            *BODY,
        ),
        opt=OPTIONAL_BODY,
    )
    async def create(
        self, request: ApiRequest, sandbox_id: SandboxId, data: JSONBody[CreateSnapshot | None] = None
    ) -> Answer[SnapshotBody]:
        """The answer comes as soon as the request is committed, with state `Creating`. The sandbox stands still for a
        moment while its files are copied. Memory, volumes and the environment are not part of a snapshot.
        """
        identity, snapshot_id = sandbox_of(sandbox_id), uuid_utils.compat.uuid7()
        name = None if data is None else data.name
        outcome = await self.context.service.snapshots.create(
            snapshot_id, request.tenant, identity, name, request.call.meta()
        )
        return Answer(snapshot_body(outcome.snapshot), ("location", f"/v1/snapshots/{snapshot_id}"))

    @get(
        "/snapshots",
        operation_id="listSnapshots",
        operation_class=Documented,
        summary="List snapshots, newest first",
        response_description="A page.",
        responses=may_refuse("GENERAL::VALIDATION_ERROR"),
    )
    async def list(
        self,
        request: ApiRequest,
        *,
        sandbox_id: OfSandbox = None,
        name: Named = None,
        states: InStates = None,
        page: PageNumber = 1,
        page_size: PageSize = DEFAULT_PAGE_SIZE,
    ) -> Answer[SnapshotList]:
        """Snapshots of the caller's tenant."""
        wanted = _wanted(request.tenant, sandbox_id, name, states)
        offset = min((page - 1) * page_size, _MAX_OFFSET)
        view = self.context.service.snapshots.view
        found = Page((), 0) if wanted is None else await view.page(wanted, size=page_size, offset=offset)
        pages = -(-found.total // page_size)
        pagination = Pagination(page, page_size, found.total, pages, page < pages, found.is_lower_bound or UNSET)
        return Answer(SnapshotList(tuple(map(snapshot_body, found.snapshots)), pagination))

    @get(
        "/snapshots/{snapshotId:str}",
        operation_id="getSnapshot",
        operation_class=Documented,
        summary="Read a snapshot",
        response_description="The snapshot.",
        responses=may_refuse("SNAPSHOT::NOT_FOUND"),
    )
    async def get(self, request: ApiRequest, snapshot_id: SnapshotId) -> Answer[SnapshotBody]:
        """The snapshot as it is now. While it is made or removed, the message says why the last attempt failed."""
        identity = snapshot_of(snapshot_id)
        view = self.context.service.snapshots.view
        loaded = await view.load(identity, request.tenant)
        snapshot = visible(None if loaded is None else loaded[0], identity)
        return Answer(snapshot_body(snapshot, await view.trouble(snapshot)))

    @delete(
        "/snapshots/{snapshotId:str}",
        operation_id="deleteSnapshot",
        operation_class=Documented,
        summary="Delete a snapshot",
        response_description="The snapshot is being deleted, and no sandbox can be made from it any more.",
        responses=may_refuse(*SNAPSHOT),
    )
    async def delete(self, request: ApiRequest, snapshot_id: SnapshotId) -> Answer[None]:
        """The answer waits a few seconds for the image to be removed. While the engine is away, the snapshot is
        `Deleting`.
        """
        identity, snapshots = snapshot_of(snapshot_id), self.context.service.snapshots
        outcome = await snapshots.delete(identity, request.tenant, request.call.meta())

        async def load() -> Snapshot | None:
            loaded = await snapshots.view.load(identity, request.tenant)
            return None if loaded is None else loaded[0]

        def done(snapshot: Snapshot) -> bool:
            return snapshot.state is not SnapshotState.DELETING

        watched = Watched(identity, outcome.snapshot, load, done)
        await watch(self.context, request.call, watched, self.context.power_wait_seconds)
        return Answer(None)


def _wanted(tenant: str, sandbox_id: str | None, name: str | None, states: list[str] | None) -> Wanted | None:
    """The filter. None: nothing can fit."""
    source = None if sandbox_id is None else uuid_in(sandbox_id)
    chosen = None if states is None else tuple(dict.fromkeys(state for state in states if state in _STATES))
    if (sandbox_id is not None and source is None) or chosen == () or "\0" in (name or ""):
        return None
    return Wanted(tenant, source, name, chosen)


def snapshot_of(text: str) -> UUID:
    """The id in a path.

    Raises:
        NotFound: it is no UUID, so no snapshot can have it.
    """
    found = uuid_in(text)
    if found is None:
        raise NotFound(unknown("").code, "Snapshot ids are UUIDs; there is no snapshot with the id in this path.")
    return found
