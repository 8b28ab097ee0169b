"""From exceptions to answers, in this one place. Every error body is `{code, message}`; validation adds `detail`.

Nothing here repeats what the client sent: a field is named by its place and its rule, because a value may be a secret.
Whatever is not known becomes 500 with the request id and nothing else; the log has the rest under that id.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import msgspec
from litestar.enums import ParamType
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException, ValidationException
from litestar.params import ParameterKwarg
from litestar.typing import FieldDefinition
from msgspec import UNSET, Struct, UnsetType

from app.domain.text import printable
from app.errors import (
    Conflict,
    CursorExpired,
    Forbidden,
    Invalid,
    KeyRetired,
    KeyReused,
    NotFound,
    PreconditionFailed,
    Rejected,
    StoreBusy,
    StoreRefused,
    StoreUnavailable,
    UnknownEvent,
    Unsupported,
)

_LOG = logging.getLogger(__name__)
_PLACE = re.compile(r"^(?P<rule>.*?)(?: - at `(?:key` in `)?\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_MISSING = re.compile(r"missing required field `(\w+)`")
_SHOWN = 3
SHOW_EACH: Final = "show_each"
"""Set on a record that must be in the process log, however many like it there are."""

VALIDATION = "GENERAL::VALIDATION_ERROR"
INVALID_HEADER = "GENERAL::INVALID_HEADER"
NOT_FOUND = "GENERAL::NOT_FOUND"
STOPPING = "GENERAL::SERVER_STOPPING"
INVALID_PARAMETER = "SANDBOX::INVALID_PARAMETER"
STATUSES: Final[Mapping[type[Rejected], int]] = {
    Invalid: 400,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    CursorExpired: 410,
    PreconditionFailed: 412,
    KeyReused: 422,
    Unsupported: 501,
}
"""Every kind of refusal of the core, and its status."""
_UNAVAILABLE: Final[Mapping[type[StoreUnavailable], str]] = {
    StoreBusy: "This server is busy: all its database connections are in use; try again.",
    StoreRefused: "The database does not have what this server needs; its operator finds the reason in the log.",
    KeyRetired: "This server seals by a master key that is no longer in use; try again, or call another server.",
}


class Issue(Struct, frozen=True):
    """One thing that is wrong with a request."""

    loc: tuple[str | int, ...]
    """Where: `body`, `query`, `header` or `path`, then the way down. `*` stands for a key of the client's own."""
    msg: str
    """The rule."""
    type: str
    """`missing`, `json_invalid` or `value_error`."""


class ErrorBody(Struct, frozen=True):
    """The JSON that every error answer has, whatever its status."""

    code: str
    message: str
    detail: tuple[Issue, ...] | UnsetType = UNSET
    """Only on validation errors."""


class Problem(Exception):
    """An HTTP answer that refuses."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        detail: tuple[Issue, ...] | UnsetType = UNSET,
    ) -> None:
        """`message` is for people and repeats no input."""
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers
        self.detail = detail

    @property
    def body(self) -> bytes:
        """The JSON of the answer, as it is sent."""
        return msgspec.json.encode(ErrorBody(self.code, self.message, self.detail))


def malformed(*issues: Issue) -> Problem:
    """422: the request does not have the contract's shape."""
    shown = "; ".join(f"{'.'.join(map(str, issue.loc))}: {issue.msg}" for issue in issues[:_SHOWN])
    more = len(issues) - _SHOWN
    return Problem(422, VALIDATION, f"{shown}; and {more} more" if more > 0 else shown, detail=issues)


def wrong(*loc: str | int, rule: str, kind: str = "value_error") -> Problem:
    """422 for one place of the request; `loc` leads there, `rule` says what it has to be."""
    return malformed(Issue(loc, rule, kind))


def from_msgspec(error: msgspec.ValidationError) -> Problem:
    """422 from the decoder's words: they name types and bounds of ours, and places, never values."""
    found = _PLACE.match(str(error))
    rule = found["rule"] if found else "does not fit"
    path = (found["path"] if found else None) or ""
    loc: list[str | int] = ["body"]
    for name, index in _STEP.findall(path):
        loc.append(name or ("*" if index == "..." else int(index)))
    missing = _MISSING.search(rule)
    if missing is not None:
        return wrong(*loc, missing[1], rule="is required", kind="missing")
    return wrong(*loc, rule=_lower(rule))


def from_parameters(error: ValidationException, fields: Mapping[str, FieldDefinition]) -> Problem:
    """422 from Litestar's words about parameters, 400 when one of them is a header.

    Litestar names the handler's parameter; clients know the name on the wire.
    """
    issues: list[Issue] = []
    found = cast("list[dict[str, Any]]", error.extra) if isinstance(error.extra, list) else []
    for each in found:
        field = fields.get(str(each.get("key", "")).partition(".")[0])
        definition = None if field is None else field.kwarg_definition
        if not isinstance(definition, ParameterKwarg) or field is None:
            continue
        name, rule = definition.name or field.name, _lower(str(each["message"]))
        if definition.param_type is ParamType.HEADER:
            return Problem(400, INVALID_HEADER, f"The header {name} {rule}.")
        issues.append(Issue((definition.param_type.value, name), rule, "value_error"))
    return malformed(*issues) if issues else wrong("query", rule="does not fit")


def _lower(rule: str) -> str:
    return rule[:1].lower() + rule[1:]


def forbidden(code: str, message: str) -> Problem:
    """403: this server takes such a request from no client."""
    return Problem(403, code, message)


def unauthorised(code: str, message: str) -> Problem:
    """401, with the header that says how to do better (RFC 9110, section 11.6.1)."""
    return Problem(401, code, message, headers=[("www-authenticate", 'ApiKey header="OPEN-SANDBOX-API-KEY"')])


def problem_of(error: BaseException, request_id: str, fields: Mapping[str, FieldDefinition] | None = None) -> Problem:
    """What to answer. Logs what nobody expected. `fields` are the parameters of the handler, if one was found."""
    match error:
        case Problem():
            return error
        case Rejected():
            return Problem(STATUSES[type(error)], error.code, printable(error.message))
        case StoreUnavailable():
            _LOG.warning("request %s: %s", request_id, error)
            return Problem(
                503,
                "GENERAL::STORE_UNAVAILABLE",
                _UNAVAILABLE.get(type(error), "The database is not reachable at the moment; try again."),
                headers=[("retry-after", "2")],
            )
        case UnknownEvent():
            _LOG.error("request %s: %s", request_id, error)
            return Problem(
                503,
                "SANDLEDGER::NEWER_HISTORY",
                "A newer version wrote what you ask for, and this version cannot read it. To see it, upgrade this "
                "server, or call one that runs the newer version.",
            )
        case NotFoundException():
            return Problem(404, NOT_FOUND, "There is no such path. /openapi.json lists the paths.")
        case MethodNotAllowedException():
            allow = allowed((error.headers or {}).get("allow", "").split(", "))
            message = f"This path takes {allow}."
            return Problem(405, "GENERAL::METHOD_NOT_ALLOWED", message, headers=[("allow", allow)])
        case ValidationException():
            return from_parameters(error, fields or {})
        case HTTPException() if error.status_code < 500:  # noqa: PLR2004
            return Problem(error.status_code, "GENERAL::BAD_REQUEST", "The request is not well-formed HTTP.")
        case _:
            _LOG.error("request %s failed", request_id, exc_info=error, extra={SHOW_EACH: True})
            return Problem(
                500, "GENERAL::INTERNAL_ERROR", f"Something went wrong here; the log has it under request {request_id}."
            )


def allowed(methods: Sequence[str]) -> str:
    """The value of `Allow`: HEAD goes wherever GET goes."""
    return ", ".join(sorted({*filter(None, methods), "OPTIONS", *(["HEAD"] if "GET" in methods else [])}))
