"""Diagnostics: what a sandbox's program wrote, what its engine says of it, and what happened to it.

Logs and inspections come from the engine, through a worker, while the sandbox has an object there; after its removal
from what was kept of its end, for as long as that is kept. Events come from the log of this server, for ever. So
diagnostics can be read of sandboxes that have ended. Sealed values and tokens are in none of them: the worker that
reads an engine has taken them out (`app.domain.sandbox.masking`).

Each of logs and events has two forms, as in the public contract: JSON with `scope`, and without it a plain text, which
the contract calls deprecated.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeAlias

import msgspec
from litestar import get
from litestar.params import QueryParameter
from msgspec import UNSET, Struct, UnsetType

from app.api.answers import Answer
from app.api.asking import TOO_MANY, ask, has_object
from app.api.commands import sandbox_of
from app.api.controller import ApiController
from app.api.diagnostics_text import events_text, no_object_text
from app.api.errors import Problem
from app.api.openapi import TextToo, header, may_refuse
from app.api.parameters import SandboxId
from app.api.request import ApiRequest
from app.domain.sandbox.decide import unknown, visible
from app.domain.sandbox.diagnostics import NO_LOGS, Inspection, LogText, age_of, inspection_text, last_lines
from app.domain.sandbox.state import Sandbox
from app.errors import Invalid
from app.store.diagnostics.kept import End, KeptEnds
from app.store.diagnostics.requests import ABSENT, Arguments, Question, inspect_question, logs_question

_TEXT: Final = ("content-type", "text/plain; charset=utf-8")
_PRIVATE: Final = ("cache-control", "no-store")
_DEPRECATED: Final = ("deprecation", "true")
_LOG_LINES, _EVENT_LINES = 100, 50
_SUMMARY_LOG_LINES, _SUMMARY_EVENT_LINES = 50, 20
_MAX_LOG_LINES, _MAX_EVENT_LINES = 10_000, 500
_LOG_SCOPES, _EVENT_SCOPES = ("container", "all"), ("runtime", "all")
_ONLY_LOGS = "The scope all holds the log of the sandbox's container only; this server has no others."
_ONLY_EVENTS = "The scope all holds the events of the sandbox only; this server has no others."
_RULE = "-" * 40
_NOT_ANSWERED: Final = (
    503,
    "DOCKER::SANDBOX_QUERY_FAILED",
    "No worker has answered for the engine of the sandbox; try again.",
)
_SCOPE: Final = (400, "DIAGNOSTICS_SCOPE_UNSUPPORTED", "scope must be container or all.")

Scope: TypeAlias = Annotated[
    str | None,
    QueryParameter(
        name="scope", description="Answers JSON. Without it the answer is a plain text, which is deprecated."
    ),
]
Tail: TypeAlias = Annotated[int, QueryParameter(ge=1, le=_MAX_LOG_LINES, description="Lines of the log at most.")]
Since: TypeAlias = Annotated[
    str | None,
    QueryParameter(description="Only lines of the last so many s, m, h or d, e.g. `10m`. Not with `scope`."),
]
Container: TypeAlias = Annotated[
    str | None, QueryParameter(description="Accepted and not used: a sandbox is one container here.")
]
Limit: TypeAlias = Annotated[int, QueryParameter(ge=1, le=_MAX_EVENT_LINES, description="Events at most.")]


class DiagnosticBody(Struct, frozen=True, rename="camel"):
    """A text of diagnostics, whole in the answer."""

    sandbox_id: str
    kind: str
    """`logs` or `events`."""
    scope: str
    delivery: str
    """`inline`."""
    content_type: str
    content: str
    content_length: int
    """Bytes of the content as UTF-8."""
    truncated: bool
    """There is more than is shown."""
    warnings: tuple[str, ...] | UnsetType = UNSET

    @classmethod
    def example(cls) -> DiagnosticBody:
        """For the document."""
        line = "2026-01-31T12:00:00.123456789Z listening\n"
        return cls(
            sandbox_id="0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b",
            kind="logs",
            scope="container",
            delivery="inline",
            content_type=_TEXT[1],
            content=line,
            content_length=len(line),
            truncated=False,
        )


class Diagnostics(ApiController):
    """Reads of one sandbox, live or ended."""

    path = "/sandboxes/{sandboxId:str}/diagnostics"
    tags = ("diagnostics",)

    @get(
        "/logs",
        operation_id="getSandboxLogs",
        operation_class=TextToo,
        summary="Read what a sandbox wrote",
        response_description="The last 100 lines; without `scope` the last lines as plain text.",
        response_headers=[header("Deprecation", "`true` on the plain text.")],
        responses=may_refuse(_SCOPE, "DOCKER::SANDBOX_NOT_FOUND", "GENERAL::VALIDATION_ERROR", _NOT_ANSWERED, TOO_MANY),
    )
    async def logs(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        *,
        within: Scope = None,
        tail: Tail = _LOG_LINES,
        since: Since = None,
        container: Container = None,  # noqa: ARG002 - as on the public server's Docker runtime
    ) -> Answer[DiagnosticBody]:
        """Both streams of the sandbox's program, each line with the engine's time. Sealed values are masked. After the
        removal of a sandbox its last lines are kept for some days.
        """
        scope = None if within is None else _scope(within, _LOG_SCOPES)
        sandbox = await self._load(request, sandbox_id)
        arguments = Arguments(tail) if scope is None else Arguments(_LOG_LINES)
        if scope is None and since:
            arguments = Arguments(tail, int(age_of(since).total_seconds()))
        found = await self._logs(request, sandbox, arguments)
        content = found.text or NO_LOGS
        if scope is None:
            return _plain(content, _DEPRECATED)
        return _described(sandbox, "logs", scope, content, truncated=found.more, warning=_ONLY_LOGS)

    @get(
        "/events",
        operation_id="getSandboxDiagnosticEvents",
        operation_class=TextToo,
        summary="Read what happened to a sandbox, as text",
        response_description="The last 50 events; without `scope` as plain text.",
        response_headers=[header("Deprecation", "`true` on the plain text.")],
        responses=may_refuse(_SCOPE, "DOCKER::SANDBOX_NOT_FOUND", "GENERAL::VALIDATION_ERROR"),
    )
    async def events(
        self, request: ApiRequest, sandbox_id: SandboxId, within: Scope = None, limit: Limit = _EVENT_LINES
    ) -> Answer[DiagnosticBody]:
        """From the log of this server, oldest first. `GET /sandboxes/{sandboxId}/events` has all of each event."""
        scope = None if within is None else _scope(within, _EVENT_SCOPES)
        sandbox = await self._load(request, sandbox_id)
        shown = limit if scope is None else _EVENT_LINES
        content, more = await self._events(sandbox, shown)
        if scope is None:
            return _plain(content, _DEPRECATED)
        return _described(sandbox, "events", scope, content, truncated=more, warning=_ONLY_EVENTS)

    @get(
        "/inspect",
        operation_id="inspectSandbox",
        operation_class=TextToo,
        summary="Read what the engine says of a sandbox",
        response_description="Plain text.",
        responses=may_refuse("DOCKER::SANDBOX_NOT_FOUND", _NOT_ANSWERED, TOO_MANY),
    )
    async def inspect(self, request: ApiRequest, sandbox_id: SandboxId) -> Answer[str]:
        """State, limits, network, labels and environment. Values of the environment that a request gave are masked."""
        sandbox = await self._load(request, sandbox_id)
        return _plain(await self._inspection(request, sandbox))

    @get(
        "/summary",
        operation_id="summarizeSandbox",
        operation_class=TextToo,
        summary="Read inspection, events and log of a sandbox at once",
        response_description="Plain text.",
        responses=may_refuse("DOCKER::SANDBOX_NOT_FOUND", "GENERAL::VALIDATION_ERROR", _NOT_ANSWERED, TOO_MANY),
    )
    async def summary(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        tail: Tail = _SUMMARY_LOG_LINES,
        event_limit: Annotated[
            int, QueryParameter(name="event_limit", ge=1, le=_MAX_EVENT_LINES, description="Events at most.")
        ] = _SUMMARY_EVENT_LINES,
    ) -> Answer[str]:
        """For people."""
        sandbox = await self._load(request, sandbox_id)
        inspection = await self._inspection(request, sandbox)
        logs = await self._logs(request, sandbox, Arguments(tail))
        events, _ = await self._events(sandbox, event_limit)
        parts = ["=" * 72, "SANDBOX DIAGNOSTICS SUMMARY", f"Sandbox ID: {sandbox.id}", "=" * 72]
        parts += ["", _RULE, "INSPECT", _RULE, inspection, "", _RULE, "EVENTS", _RULE, events]
        parts += ["", _RULE, f"LOGS (last {tail} lines)", _RULE, logs.text or NO_LOGS]
        return _plain("\n".join(parts) + "\n")

    async def _load(self, request: ApiRequest, sandbox_id: str) -> Sandbox:
        """Live or ended; of the caller's tenant."""
        identity = sandbox_of(sandbox_id)
        loaded = await self.context.service.view.load(identity, request.tenant)
        if loaded is None:
            raise unknown(identity)
        return loaded[0]

    async def _logs(self, request: ApiRequest, sandbox: Sandbox, arguments: Arguments) -> LogText:
        """From what is kept, or from the engine.

        Raises:
            NotFound: it has ended, and its log is not kept any more.
            Problem: 503.
        """
        kept = await self._kept(sandbox)
        if kept is None and has_object(sandbox):
            found = await self._asked(request, sandbox, logs_question(sandbox.tenant, sandbox.id, arguments))
            if found is not None:
                return msgspec.json.decode(found, type=LogText)
            kept = await self._kept(sandbox, gone=True)
        if kept is None:
            visible(sandbox, sandbox.id)
            return LogText()
        if kept.logs is None:
            return LogText(f"{NO_LOGS[:-1]}: {kept.error})")
        since = None if arguments.since_s is None else _ago(arguments.since_s)
        return last_lines(kept.logs, arguments.tail, since)

    async def _inspection(self, request: ApiRequest, sandbox: Sandbox) -> str:
        kept = await self._kept(sandbox)
        if kept is None and has_object(sandbox):
            found = await self._asked(request, sandbox, inspect_question(sandbox.tenant, sandbox.id))
            if found is not None:
                return inspection_text(msgspec.json.decode(found, type=Inspection))
            kept = await self._kept(sandbox, gone=True)
        if kept is None or kept.inspection is None:
            visible(sandbox, sandbox.id)
            return no_object_text(sandbox)
        return inspection_text(kept.inspection)

    async def _kept(self, sandbox: Sandbox, *, gone: bool = False) -> End | None:
        """What is kept of its end. Of one that is there nothing can be, unless its engine says that it is `gone`."""
        if has_object(sandbox) and sandbox.may_run and not gone:
            return None
        return await KeptEnds(self.context.database).read(sandbox.id, sandbox.tenant)

    async def _asked(self, request: ApiRequest, sandbox: Sandbox, question: Question) -> str | None:
        """An answer of a worker as JSON; None = the engine has no such object any more."""
        assert sandbox.engine is not None, "it has an object"
        reply = await ask(self.context, request.call, sandbox.engine, question)
        if reply is not None and reply.answer is not None:
            return reply.answer
        if reply is not None and reply.error == ABSENT:
            return None
        status, code, message = _NOT_ANSWERED
        if reply is not None and reply.error:
            message = f"The engine of the sandbox cannot be asked at the moment: {reply.error}"
        raise Problem(status, code, message, headers=[("retry-after", "2")])

    async def _events(self, sandbox: Sandbox, limit: int) -> tuple[str, bool]:
        log = self.context.service.log
        beginning = await self.context.service.view.beginning(sandbox.id, sandbox.tenant)
        assert beginning is not None, "the sandbox was loaded a moment ago"
        after = max(0, sandbox.version - limit)
        stored = await log.history(sandbox.id, sandbox.tenant, after=after, since=beginning.since, limit=limit)
        return events_text(sandbox, stored), after > 0


def _ago(seconds: int) -> datetime:
    return datetime.fromtimestamp(max(0.0, datetime.now(UTC).timestamp() - seconds), UTC)


def _scope(scope: str, known: tuple[str, ...]) -> str:
    asked = scope.strip().lower()
    if asked not in known:
        raise Invalid(_SCOPE[1], f"scope must be {' or '.join(known)}.")
    return asked


def _plain(content: str, *headers: tuple[str, str]) -> Answer[Any]:
    return Answer(content.encode(), _TEXT, _PRIVATE, *headers)


def _described(
    sandbox: Sandbox, kind: str, scope: str, content: str, *, truncated: bool, warning: str
) -> Answer[DiagnosticBody]:
    body = DiagnosticBody(
        sandbox_id=str(sandbox.id),
        kind=kind,
        scope=scope,
        delivery="inline",
        content_type=_TEXT[1],
        content=content,
        content_length=len(content.encode()),
        truncated=truncated,
        warnings=(warning,) if scope == "all" else UNSET,
    )
    return Answer(body, _PRIVATE)
