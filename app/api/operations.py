"""What the API offers, as data: the router is built from this table, and so is the OpenAPI document, so that neither
can say what the other does not do. Endpoints are bound to operations by name in `app.api.app`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from app.api import schema as wire
from app.domain.sandbox.state import Phase

BOTH_MOUNTS: Final = ("/v1", "")
_EXTRA: Final = "\n\nNot in the public contract."


class Parameter(Struct, frozen=True):
    """A query parameter or a header."""

    place: str
    name: str
    schema: Mapping[str, Any]
    description: str


class Answer(Struct, frozen=True):
    """A successful answer."""

    description: str
    body: Any = None
    """The struct that is encoded; None = an empty body."""
    headers: tuple[str, ...] = ()
    media: str = "application/json"


class Operation(Struct, frozen=True, kw_only=True):
    """One method on one path."""

    name: str
    method: str
    path: str
    summary: str
    answers: Mapping[int, Answer]
    description: str = ""
    parameters: tuple[Parameter, ...] = ()
    body: Any = None
    """Type of the request body."""
    body_media: tuple[str, ...] = ("application/json",)
    refusals: tuple[int, ...] = ()
    """Error statuses beside those that follow from the rest, see `app.api.document`."""
    mounts: tuple[str, ...] = BOTH_MOUNTS
    open: bool = False
    """Whether it needs no key."""
    tag: str = "sandboxes"

    @property
    def command(self) -> str | None:
        """Name in the table of refusals: method and route of what changes sandboxes; None for all else."""
        changes = self.method not in ("GET", "HEAD") and self.path.startswith("/sandboxes")
        return f"{self.method} {self.path.replace('{sandboxId}', '{id}')}" if changes else None


def _query(name: str, schema: Mapping[str, Any], description: str) -> Parameter:
    return Parameter("query", name, schema, description)


def _header(name: str, description: str, **schema: Any) -> Parameter:
    return Parameter("header", name, {"type": "string", **schema}, description)


def _whole(low: int, high: int | None = None, default: int | None = None) -> Mapping[str, Any]:
    bounds = {"minimum": low, "maximum": high, "default": default}
    return {"type": "integer"} | {key: value for key, value in bounds.items() if value is not None}


_PREFER = _header(
    "Prefer", "RFC 7240. `wait=N`: answer when it is there, after N seconds at the latest. `respond-async`: at once."
)
_IF_MATCH = _header("If-Match", 'RFC 9110. Only when the sandbox is at one of these versions, e.g. `"3"`; `*` = any.')
_INCLUDE_TERMINAL = _query(
    "includeTerminal", {"type": "boolean", "default": False}, "Also those that have been deleted or have expired."
)
_POWER: Final = {202: Answer("Accepted.", headers=("ETag", "Preference-Applied"))}

CONTRACT: Final[tuple[Operation, ...]] = (
    Operation(
        name="createSandbox",
        method="POST",
        path="/sandboxes",
        summary="Create a sandbox",
        description="Answers as soon as the request is committed, with state `Pending`; its container follows.",
        parameters=(
            _header(
                "Idempotency-Key",
                "The same key with the same body gives the same sandbox, however often and wherever it is sent.",
                minLength=1,
                maxLength=255,
                pattern=r"^[\x21-\x7e]+$",
            ),
            _PREFER,
        ),
        body=wire.CreateSandbox,
        answers={
            202: Answer(
                "Accepted.",
                wire.CreatedSandbox,
                ("Location", "ETag", "Preference-Applied", "Idempotency-Replayed"),
            )
        },
        refusals=(501,),
    ),
    Operation(
        name="listSandboxes",
        method="GET",
        path="/sandboxes",
        summary="List sandboxes, newest first",
        parameters=(
            _query(
                "state",
                {"type": "array", "items": {"type": "string"}, "examples": [[Phase.RUNNING.value]]},
                "Any of these states, in any case. May be repeated.",
            ),
            _query(
                "metadata",
                {"type": "string", "examples": ["team=a&purpose=test"]},
                "All of these entries: itself a query string (`key=value&key=value`), so to be encoded twice.",
            ),
            _query("page", _whole(1, default=1), "Which page."),
            _query("pageSize", _whole(1, 200, 20), "How many on a page."),
            _query("cursor", {"type": "string"}, "`nextCursor` of the page before, instead of `page`."),
            _query("limit", _whole(1, 200, 20), "How many on a page, beside `cursor`."),
            _INCLUDE_TERMINAL,
        ),
        answers={200: Answer("A page.", wire.SandboxList)},
        refusals=(422,),
    ),
    Operation(
        name="getSandbox",
        method="GET",
        path="/sandboxes/{sandboxId}",
        summary="Look at a sandbox",
        parameters=(
            _INCLUDE_TERMINAL,
            _query("asOf", {"type": "string", "format": "date-time"}, "As it stood at that instant." + _EXTRA),
            _header("If-None-Match", "RFC 9110. 304 when the sandbox is still at this version."),
        ),
        answers={
            200: Answer("The sandbox.", wire.SandboxBody, ("ETag",)),
            304: Answer("Still at that version.", headers=("ETag",)),
        },
        refusals=(422,),
    ),
    Operation(
        name="deleteSandbox",
        method="DELETE",
        path="/sandboxes/{sandboxId}",
        summary="Delete a sandbox",
        description="It has ended when this answers; its container is removed after that. Its history stays.",
        parameters=(_IF_MATCH,),
        answers={204: Answer("It has ended.")},
        refusals=(409, 412),
    ),
    Operation(
        name="patchSandboxMetadata",
        method="PATCH",
        path="/sandboxes/{sandboxId}/metadata",
        summary="Change metadata",
        description="Merge patch of depth one (RFC 7396): a string sets, null removes.",
        parameters=(_IF_MATCH,),
        body=wire.MetadataPatch,
        body_media=("application/json", "application/merge-patch+json"),
        answers={200: Answer("The sandbox.", wire.SandboxBody, ("ETag",))},
        refusals=(409, 412),
    ),
    Operation(
        name="pauseSandbox",
        method="POST",
        path="/sandboxes/{sandboxId}/pause",
        summary="Pause a sandbox",
        description="Waits a few seconds for the state `Paused`, unless `Prefer` says otherwise.",
        parameters=(_IF_MATCH, _PREFER),
        answers=_POWER,
        refusals=(409, 412, 501),
    ),
    Operation(
        name="resumeSandbox",
        method="POST",
        path="/sandboxes/{sandboxId}/resume",
        summary="Resume a sandbox",
        description="Waits a few seconds for the state `Running`, unless `Prefer` says otherwise.",
        parameters=(_IF_MATCH, _PREFER),
        answers=_POWER,
        refusals=(409, 412, 501),
    ),
    Operation(
        name="renewSandboxExpiration",
        method="POST",
        path="/sandboxes/{sandboxId}/renew-expiration",
        summary="Move the end of a sandbox",
        description="Earlier or later. A renewal that comes too late is 409, never a false 200.",
        parameters=(_IF_MATCH,),
        body=wire.RenewExpiration,
        answers={200: Answer("The end that now holds.", wire.RenewedExpiration, ("ETag",))},
        refusals=(409, 412),
    ),
    Operation(
        name="listSandboxEvents",
        method="GET",
        path="/sandboxes/{sandboxId}/events",
        summary="Read a sandbox's history",
        description="Oldest first; also when it has ended." + _EXTRA,
        parameters=(
            _query("after", _whole(0, 2**31 - 1, 0), "Only events with a higher version."),
            _query("limit", _whole(1, 1000, 100), "How many at most."),
        ),
        answers={200: Answer("A page of history.", wire.EventList)},
        refusals=(422,),
    ),
    Operation(
        name="reportMetricsEvent",
        method="POST",
        path="/metrics/events",
        summary="Report how a create went",
        description="SDKs send it. Checked and accepted, not stored.",
        body=wire.MetricsEvent,
        answers={204: Answer("Accepted.")},
        mounts=("/v1",),
        tag="metrics",
    ),
)

SERVER: Final[tuple[Operation, ...]] = (
    Operation(
        name="health",
        method="GET",
        path="/health",
        summary="Whether the process answers",
        answers={200: Answer("It does.", wire.Health)},
        mounts=("",),
        open=True,
        tag="server",
    ),
    Operation(
        name="ready",
        method="GET",
        path="/ready",
        summary="Whether requests can be served",
        description="Database, migrations, and where this process has a worker, engine and worker." + _EXTRA,
        answers={200: Answer("They can.", wire.Readiness), 503: Answer("They cannot.", wire.Readiness)},
        mounts=("",),
        open=True,
        tag="server",
    ),
    Operation(
        name="version",
        method="GET",
        path="/version",
        summary="Version of this server",
        answers={200: Answer("The version.", wire.VersionBody)},
        mounts=("",),
        open=True,
        tag="server",
    ),
)
