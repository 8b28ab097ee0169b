"""The endpoints of sandboxes: decode, ask the service, encode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import uuid5

import msgspec
import uuid_utils.compat
from litestar.response.base import ASGIResponse
from msgspec import UNSET

from app.api import schema as wire
from app.api.body import Body
from app.api.call import Call
from app.api.conditions import Preferences, etag, expected_version, not_modified, preferences
from app.api.context import ApiContext
from app.api.creation import accept
from app.api.instants import of_epoch_or_text, parse_instant
from app.api.lists import list_query
from app.api.waiting import until
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.decide import unknown, visible
from app.domain.sandbox.state import Phase, Sandbox, fold
from app.service.sandboxes import Outcome
from app.store.log.store import StoredEvent

_UNBOUNDED = 2**31
_encode = msgspec.json.Encoder().encode


def answer(body: Any, *headers: tuple[str, str], status: int = 200) -> ASGIResponse:
    """A struct as JSON."""
    return ASGIResponse(body=_encode(body), headers=headers, status_code=status)


def empty(status: int, *headers: tuple[str, str]) -> ASGIResponse:
    """No body."""
    return ASGIResponse(headers=headers, status_code=status, media_type="text/plain")


class Sandboxes:
    """On a context; each public method is an endpoint."""

    def __init__(self, context: ApiContext) -> None:
        """Keep it."""
        self._context = context
        self._service = context.service
        self._tenant = context.tenant
        self._create_body = Body(wire.CreateSandbox)
        self._renew_body = Body(wire.RenewExpiration)
        self._patch_body: Body[wire.MetadataPatch] = Body(wire.MetadataPatch)
        self._metrics_body = Body(wire.MetricsEvent)

    async def create(self, call: Call) -> ASGIResponse:
        """202 when the events are committed; with `Prefer: wait`, when it runs or will not."""
        context = self._context
        key = call.idempotency_key()
        wishes = preferences(call, context.wait_seconds_max)
        request = await self._create_body.of(call)
        sandbox_id = uuid_utils.compat.uuid7()
        if key is not None:  # the same from every replica, so the database finds the repetition
            sandbox_id = uuid5(context.installation, f"{self._tenant}\0{key}")
        event, secrets = accept(request, sandbox_id, context)
        call.sandbox_id = sandbox_id
        sealed = None if secrets is None else context.sealer.seal(sandbox_id, secrets)
        outcome = await self._service.create(sandbox_id, event, sealed, call.meta(key))
        box = await until(context, call, outcome.sandbox, _provisioned, wishes.wait or 0)
        headers = [("location", f"{call.prefix}/sandboxes/{box.id}"), ("etag", etag(box)), *_applied(wishes)]
        if outcome.replayed:
            headers.append(("idempotency-replayed", "true"))
        return answer(wire.created_body(box), *headers, status=202)

    async def list(self, call: Call) -> ASGIResponse:
        """A page."""
        asked = list_query(call, self._tenant)
        page = await self._context.listing.page(asked.wanted, size=asked.size, offset=asked.offset, after=asked.after)
        pages = -(-page.total // asked.size)
        return answer(
            wire.SandboxList(
                tuple(map(wire.sandbox_body, page.boxes)),
                wire.Pagination(asked.page, asked.size, page.total, pages, page.next is not None),
                UNSET if page.next is None else str(page.next),
            )
        )

    async def get(self, call: Call) -> ASGIResponse:
        """One sandbox, as it is or as it was."""
        sandbox_id = call.sandbox()
        as_of = call.one("asOf") if call.query else None
        if as_of is None:
            loaded = await self._service.view.load(sandbox_id, self._tenant)
            box = None if loaded is None else loaded[0]
        else:
            instant = parse_instant("asOf", as_of)
            history = await self._service.history(sandbox_id, self._tenant)
            box = fold(fact for fact in history if fact.at <= instant)
        if box is None or not call.flag("includeTerminal"):
            box = visible(box, sandbox_id)
        if not_modified(call, box):
            return empty(304, ("etag", etag(box)))
        return answer(wire.sandbox_body(box), ("etag", etag(box)))

    async def delete(self, call: Call) -> ASGIResponse:
        """204 when it has ended for clients; the worker removes the container."""
        await self._execute(call, cmd.Terminate())
        return empty(204)

    async def patch_metadata(self, call: Call) -> ASGIResponse:
        """The sandbox with its new metadata."""
        patch = await self._patch_body.of(call)
        most = self._context.metadata_max_entries
        outcome = await self._execute(call, cmd.PatchMetadata(patch, _UNBOUNDED if most is None else most))
        return answer(wire.sandbox_body(outcome.sandbox), ("etag", etag(outcome.sandbox)))

    async def renew(self, call: Call) -> ASGIResponse:
        """The end that now holds."""
        request = await self._renew_body.of(call)
        wanted = of_epoch_or_text(request.expires_at)
        command = cmd.Renew(wanted, self._context.max_sandbox_timeout_seconds)
        box = (await self._execute(call, command)).sandbox
        assert box.expires_at is not None, "a renewal of what never expires is refused"
        return answer(wire.RenewedExpiration(box.expires_at), ("etag", etag(box)))

    async def pause(self, call: Call) -> ASGIResponse:
        """202; by then it is Paused, if the engine is quick."""
        return await self._power(call, cmd.Pause(), Phase.PAUSING)

    async def resume(self, call: Call) -> ASGIResponse:
        """202; by then it is Running, if the engine is quick."""
        return await self._power(call, cmd.Resume(), Phase.RESUMING)

    async def _power(self, call: Call, command: cmd.Command, under_way: Phase) -> ASGIResponse:
        wishes = preferences(call, self._context.wait_seconds_max)
        box = (await self._execute(call, command)).sandbox
        seconds: float = 0 if wishes.respond_async else self._context.power_wait_seconds
        if wishes.wait is not None:
            seconds = wishes.wait
        done: Callable[[Sandbox], bool] = lambda seen: seen.phase is not under_way  # noqa: E731
        box = await until(self._context, call, box, done, seconds)
        return empty(202, ("etag", etag(box)), *_applied(wishes))

    async def _execute(self, call: Call, command: cmd.Command) -> Outcome:
        sandbox_id = call.sandbox()
        expected = await expected_version(call, self._service, self._tenant)
        return await self._service.execute(sandbox_id, command, call.meta(), tenant=self._tenant, if_match=expected)

    async def events(self, call: Call) -> ASGIResponse:
        """A page of history, of live and ended ones."""
        sandbox_id = call.sandbox()
        after = call.whole("after", 0, 2**31 - 1, 0)
        limit = call.whole("limit", 1, 1000, 100)
        since = await self._context.listing.since(sandbox_id, self._tenant)
        if since is None:
            raise unknown(sandbox_id)
        found = await self._service.log.history(sandbox_id, self._tenant, after=after, since=since, limit=limit + 1)
        page = found[:limit]
        return answer(wire.EventList(tuple(map(_event_body, page)), page[-1].version if len(found) > limit else UNSET))

    async def report_metrics(self, call: Call) -> ASGIResponse:
        """Checked and accepted."""
        await self._metrics_body.of(call)
        return empty(204)


def _provisioned(box: Sandbox) -> bool:
    return box.phase is not Phase.PENDING


def _applied(wishes: Preferences) -> list[tuple[str, str]]:
    return [] if wishes.applied is None else [("preference-applied", wishes.applied)]


def _event_body(stored: StoredEvent) -> wire.EventBody:
    actor = stored.meta["actor"]
    return wire.EventBody(
        position=stored.position,
        version=stored.version,
        type=stored.type,
        recorded_at=stored.recorded_at,
        actor=wire.ActorBody(actor["kind"], actor["id"], actor["name"]),
        data=stored.data,
        occurred_at=stored.data.get("occurred_at") or UNSET,
        request_id=stored.meta.get("request_id") or UNSET,
        cause=stored.meta.get("cause") or UNSET,
    )
