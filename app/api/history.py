"""A sandbox's history: its events, of live and of ended ones."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from litestar import get
from litestar.di import NamedDependency
from litestar.params import QueryParameter
from msgspec import UNSET, Struct, UnsetType

from app.api.answers import Answer
from app.api.auth import Principal
from app.api.commands import sandbox_of
from app.api.controller import ApiController
from app.api.openapi import Documented, header, may_refuse
from app.api.parameters import SandboxId
from app.api.sandbox_wire import Instant
from app.domain.sandbox.decide import unknown
from app.domain.stream import read_meta
from app.domain.text import printable
from app.store.log.epoch import check_epoch
from app.store.log.store import StoredEvent

_MAX_VERSION = 2**31 - 1
_MAX_EPOCH = 2**31 - 1
_MAX_EVENTS = 1000
_EPOCH_HEADER = "Sandledger-Epoch"


class ActorBody(Struct, frozen=True):
    """Who caused an event, as clients see it."""

    kind: str
    id: str
    name: str


class EventBody(Struct, frozen=True, rename="camel"):
    """One event of a sandbox's history."""

    position: int
    """Its place in the log of this installation."""
    version: int
    """Its place in this sandbox's history: 1, 2, 3 and so on."""
    type: str
    recorded_at: Instant
    actor: ActorBody
    data: dict[str, Any]
    """What happened, as stored; never a secret."""
    occurred_at: str | UnsetType = UNSET
    """When the engine says it happened."""
    request_id: str | UnsetType = UNSET
    cause: int | UnsetType = UNSET
    """Position of the event that led here."""

    @classmethod
    def example(cls) -> EventBody:
        """For the document."""
        actor = ActorBody("api_key", "default", "default")
        at = datetime(2026, 1, 31, 12, tzinfo=UTC)
        return cls(41, 4, "sandbox.metadata_patched", at, actor, {"set": {"team": "b"}}, request_id="my-request")


class EventList(Struct, frozen=True):
    """A page of history, oldest first."""

    items: tuple[EventBody, ...]
    epoch: int
    """The log's; it rises when the database was restored. Give it back with `next`, or with a version of your own."""
    next: int | UnsetType = UNSET
    """Give it back as `after`. Absent when there is no more at the moment."""


class History(ApiController):
    """The feed of one sandbox's events, oldest first."""

    path = "/sandboxes/{sandboxId:str}/events"
    tags = ("sandboxes",)

    @get(
        operation_id="listSandboxEvents",
        operation_class=Documented,
        summary="Read a sandbox's history",
        response_description="A page of history.",
        response_headers=[header(_EPOCH_HEADER, "The log's epoch, as in the page.")],
        responses=may_refuse("DOCKER::SANDBOX_NOT_FOUND", "SANDLEDGER::CURSOR_EXPIRED", "GENERAL::VALIDATION_ERROR"),
    )
    async def events(
        self,
        principal: NamedDependency[Principal],
        sandbox_id: SandboxId,
        after: Annotated[
            int, QueryParameter(ge=0, le=_MAX_VERSION, description="Only events with a higher version.")
        ] = 0,
        limit: Annotated[int, QueryParameter(ge=1, le=_MAX_EVENTS, description="How many events at most.")] = 100,
        epoch: Annotated[
            int | None,
            QueryParameter(
                ge=1,
                le=_MAX_EPOCH,
                description="`epoch` of the page that `after` comes from. 410 when the log was restored since.",
            ),
        ] = None,
    ) -> Answer[EventList]:
        """Oldest first, also of a sandbox that has ended. Not in the public contract."""
        identity, tenant = sandbox_of(sandbox_id), principal.tenant
        beginning = await self.context.service.view.beginning(identity, tenant)
        if beginning is None:
            raise unknown(identity)
        present = beginning.epoch
        if epoch is not None:
            check_epoch(epoch, present)
        log = self.context.service.log
        found = await log.history(identity, tenant, after=after, since=beginning.since, limit=limit + 1)
        page = found[:limit]
        following = page[-1].version if len(found) > limit else UNSET
        return Answer(
            EventList(tuple(map(event_body, page)), present, following), (_EPOCH_HEADER.lower(), str(present))
        )


def event_body(stored: StoredEvent) -> EventBody:
    """The one place where a stored event becomes a body. Its message may repeat what an engine said."""
    data: dict[str, Any] = msgspec.json.decode(stored.data)
    if isinstance(message := data.get("message"), str):
        data["message"] = printable(message)
    meta = read_meta(stored.meta)
    return EventBody(
        position=stored.position,
        version=stored.version,
        type=stored.type,
        recorded_at=stored.recorded_at,
        actor=ActorBody(meta.actor.kind, meta.actor.id, meta.actor.name),
        data=data,
        occurred_at=data.get("occurred_at") or UNSET,
        request_id=meta.request_id or UNSET,
        cause=meta.cause or UNSET,
    )
