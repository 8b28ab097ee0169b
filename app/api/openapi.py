"""The OpenAPI 3.1 document: Litestar derives it from the handlers; here is what it cannot see.

A handler names the codes that it may refuse with (`may_refuse`), and the document gets one answer a status with an
example a code. `Documented` adds what holds for every operation: the request id, and the errors of key, database and
server. The test suite runs a fuzzer over the document. Proxied requests are a paragraph of the text: no handler serves
them (`app.server.front` says why), and a path of the document cannot mean "any rest, any method, any body".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec
from litestar.datastructures import ResponseHeader
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import (
    Components,
    Example,
    License,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Schema,
    SecurityScheme,
)
from litestar.router import Router
from msgspec import Struct

from app import __version__
from app.api.errors import INVALID_HEADER, INVALID_PARAMETER, STOPPING, VALIDATION, ErrorBody, Issue

_DESCRIPTION: Final = """\
Lifecycle of sandboxes. Every request that changes something becomes an event in an append-only log. Every refused
command of a known caller becomes a record beside it. All paths below `/v1` are also served without that prefix. Other
routes of the public contract (pools, templates) answer 501.

`/v1/sandboxes/{sandboxId}/proxy/{port}/...` passes a request of any method on to the program that listens on this port
in the sandbox, byte by byte, and carries WebSockets. It has no entry below, because what it takes and answers is the
program's. Errors of this server have the header `Sandledger-Error`. Browsers, which send no key, are let in by signed
links.

Errors are always `{"code", "message"}`; 422 adds `detail`. No answer repeats a value that was sent.
"""
_STATUSES: Final = {
    400: "A value or a header breaks a rule.",
    401: "The API key is missing or wrong.",
    403: "The server has no key, and the request comes from another host name or another page's origin. Or no link may "
    "lead to this port.",
    404: "There is no such sandbox or snapshot, or it has ended. The message says when and why.",
    408: "The body did not arrive in time.",
    409: "The sandbox or the snapshot is not in a state that allows it.",
    410: "The cursor belongs to another epoch of the log. Begin with the first page.",
    412: "`If-Match` names another version.",
    413: "The body is too large.",
    415: "The body does not come as JSON.",
    422: "The request does not have the right shape. `detail` says where.",
    500: "A fault of the server.",
    501: "A part of the contract that is not served yet, or not by this runtime.",
    502: "There is nothing in the sandbox that could answer.",
    503: "The database is not reachable at the moment, the server has too many connections, or it stops.",
}
_ID: Final = "0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b"
_CODES: Final[Mapping[str, tuple[int, str]]] = {
    INVALID_PARAMETER: (400, "image.uri must be an image reference such as registry.example/team/name:tag."),
    "SANDBOX::INVALID_METADATA_LABEL": (400, "metadata keys must be labels such as team or example.com/team."),
    "INVALID_METADATA_FORMAT": (400, "metadata must be a query string of its own, key=value&key=value."),
    "INVALID_METADATA_LABEL": (400, "Keys that begin with opensandbox.io/ are reserved."),
    "DOCKER::INVALID_ENTRYPOINT": (400, "entrypoint must begin with a program."),
    "DOCKER::INVALID_EXPIRATION": (400, "expiresAt must lie in the future."),
    "DOCKER::INVALID_PORT": (400, "port must be from 1 to 65535."),
    INVALID_HEADER: (400, "The header idempotency-key must not be repeated."),
    "MISSING_API_KEY": (401, "The header OPEN-SANDBOX-API-KEY is missing."),
    "INVALID_API_KEY": (401, "The API key is not valid."),
    "SANDLEDGER::HOST_NOT_ALLOWED": (403, "Without an API key this server answers only to localhost."),
    "SANDLEDGER::ORIGIN_NOT_ALLOWED": (403, "Without an API key this server accepts no changes from other origins."),
    "PROXY::PORT_NOT_ALLOWED": (403, "Port 44772 controls the sandbox, and no link leads to it."),
    "DOCKER::SANDBOX_NOT_FOUND": (404, f"Sandbox {_ID} does not exist."),
    "KUBERNETES::POD_IP_NOT_AVAILABLE": (
        404,
        "The sandbox is Pending (IMAGE_PULLING): Image busybox:1 is being pulled. 1 of 2 layers, 3.1 of 9.4 MB.",
    ),
    "GENERAL::REQUEST_TIMEOUT": (408, "The body did not arrive in time: 30 s for each piece, 120 s in all."),
    "DOCKER::SANDBOX_NOT_RUNNING": (409, "The sandbox is Paused; only a running sandbox can be paused."),
    "DOCKER::SANDBOX_NOT_PAUSED": (409, "The sandbox is Running; only a paused sandbox can be resumed."),
    "SANDBOX::AGENT_UNREACHABLE": (409, "The agent cannot be reached (AGENT_NOT_LISTENING): nothing listens there."),
    "SANDLEDGER::CONCURRENT_CHANGE": (409, "The sandbox is being changed by too many callers at once. Try again."),
    "SNAPSHOT::NOT_FOUND": (404, f"Snapshot {_ID} does not exist."),
    "SNAPSHOT::NOT_READY": (409, f"Snapshot {_ID} is Creating; sandboxes are made from Ready ones."),
    "SNAPSHOT::INVALID_RESTORE_CONFIG": (
        409,
        f"Snapshot {_ID} cannot be used: engine default does not have its image any more.",
    ),
    "SNAPSHOT::ENGINE_UNAVAILABLE": (
        409,
        f"The image of snapshot {_ID} is on engine default, which cannot be used now.",
    ),
    "SNAPSHOT::INVALID_SOURCE_STATE": (409, "Sandbox is Paused; a snapshot can be made of a Running sandbox only."),
    "SNAPSHOT::TOO_MANY": (409, "8 snapshots of this sandbox are Creating, and more are not taken meanwhile."),
    "SNAPSHOT::INVALID_STATE": (409, f"Snapshot {_ID} is being created; delete it when it is not."),
    "SNAPSHOT::DELETE_CONFLICT": (409, f"Sandboxes that were made from this snapshot still use it: {_ID}."),
    "SANDLEDGER::CURSOR_EXPIRED": (410, "The cursor belongs to another epoch of the log."),
    "SANDLEDGER::VERSION_MISMATCH": (
        412,
        "If-Match names version 3, the sandbox is at version 4; read its ETag again.",
    ),
    "GENERAL::BODY_TOO_LARGE": (413, "A body may have at most 1048576 bytes."),
    "GENERAL::UNSUPPORTED_MEDIA_TYPE": (415, "The body must come as Content-Type: application/json."),
    VALIDATION: (422, "body.timeout: expected `int` >= 60"),
    "SANDLEDGER::IDEMPOTENCY_KEY_REUSED": (422, "This Idempotency-Key was used before with a different body."),
    "GENERAL::INTERNAL_ERROR": (500, "Something went wrong here; the log has it under request 5f2c9a."),
    "SANDBOX::API_NOT_SUPPORTED": (501, "volumes is not served yet."),
    "SANDBOX::AGENT_NOT_AVAILABLE": (501, "This sandbox was made without an agent. Create it again."),
    "SNAPSHOT::NOT_IMPLEMENTED": (501, "Engine default cannot make snapshots."),
    "GENERAL::STORE_UNAVAILABLE": (503, "The database is not reachable at the moment; try again."),
    "GENERAL::TOO_MANY_CONNECTIONS": (503, "The server has too many connections; try again."),
    STOPPING: (503, "The server stops, and the body of the request has not arrived; send it again."),
}
BODY: Final = (
    "GENERAL::REQUEST_TIMEOUT",
    "GENERAL::BODY_TOO_LARGE",
    "GENERAL::UNSUPPORTED_MEDIA_TYPE",
    VALIDATION,
    STOPPING,
)
"""Codes of every handler that takes a body."""
SNAPSHOT: Final = ("SNAPSHOT::NOT_FOUND", "SNAPSHOT::INVALID_STATE", "SNAPSHOT::DELETE_CONFLICT")
"""Codes of a delete of one snapshot."""
RESTORE: Final = (
    "SNAPSHOT::NOT_FOUND",
    "SNAPSHOT::NOT_READY",
    "SNAPSHOT::INVALID_RESTORE_CONFIG",
    "SNAPSHOT::ENGINE_UNAVAILABLE",
)
"""Codes of a create that names a snapshot."""
COMMAND: Final = (
    INVALID_HEADER,
    "DOCKER::SANDBOX_NOT_FOUND",
    "SANDLEDGER::CONCURRENT_CHANGE",
    "SANDLEDGER::VERSION_MISMATCH",
    "GENERAL::BODY_TOO_LARGE",
)
"""Codes of every handler that changes one sandbox."""
_ALWAYS: Final = (
    INVALID_HEADER,
    "SANDLEDGER::HOST_NOT_ALLOWED",
    "GENERAL::INTERNAL_ERROR",
    "GENERAL::TOO_MANY_CONNECTIONS",
)
_KEYED: Final = (
    "MISSING_API_KEY",
    "INVALID_API_KEY",
    "SANDLEDGER::ORIGIN_NOT_ALLOWED",
    "GENERAL::STORE_UNAVAILABLE",
)


class _Refusal(ResponseSpec):
    """One error answer of a handler."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Refusal:
        """Itself: nobody changes it. Litestar copies handlers for each router, and with them hundreds of examples, a
        sixth of the time that `create_app` takes.
        """
        return self


def may_refuse(*codes: str | tuple[int, str, str], keyed: bool = True) -> dict[int, ResponseSpec]:
    """The error answers of a handler. A code comes with status and message where it has another status than usual.
    `keyed` = it needs a key.
    """
    found: dict[int, list[Example]] = {}
    for each in dict.fromkeys((*codes, *_ALWAYS, *(_KEYED if keyed else ()))):
        status, code, message = (_CODES[each][0], each, _CODES[each][1]) if isinstance(each, str) else each
        detail = (Issue(("body", "timeout"), "expected `int` >= 60", "value_error"),) if code == VALIDATION else None
        value: dict[str, Any] = {"code": code, "message": message}
        if detail:
            value["detail"] = [{"loc": list(one.loc), "msg": one.msg, "type": one.type} for one in detail]
        found.setdefault(status, []).append(Example(id=code, summary=code, value=value))
    return {
        status: _Refusal(ErrorBody, generate_examples=False, description=_STATUSES[status], examples=examples)
        for status, examples in sorted(found.items())
    }


def header(name: str, description: str) -> ResponseHeader:
    """A header of the successful answer, for the document only."""
    return ResponseHeader(name=name, description=description, documentation_only=True)


ETAG: Final = header("ETag", "Version of the sandbox.")
APPLIED: Final = header("Preference-Applied", "What of `Prefer` was followed (RFC 7240).")
_TEXT: Final = Schema(type=OpenAPIType.STRING)


@dataclass
class Documented(Operation):
    """An operation with what holds for each of them."""

    def __post_init__(self) -> None:
        """Complete what Litestar made."""
        self.parameters = [
            *(self.parameters or []),
            Parameter(
                name="X-Request-ID",
                param_in="header",
                description="Comes back in the answer. It is stored beside what the request led to.",
                schema=Schema(type=OpenAPIType.STRING, max_length=128),
            ),
        ]
        for status, response in (self.responses or {}).items():
            if not isinstance(response, OpenAPIResponse):
                continue
            if _is_empty(response):
                response.content = None
            headers: dict[str, Any] = {
                "X-Request-ID": OpenAPIHeader(schema=_TEXT, description="The client's own, or a new one."),
                **(response.headers or {}),
            }
            if status == "503" and self.tags != ["server"]:
                headers["Retry-After"] = OpenAPIHeader(schema=_TEXT, description="Seconds.")
            for each in headers.values():
                each.schema = each.schema or _TEXT
            response.headers = headers


def _is_empty(response: OpenAPIResponse) -> bool:
    """Whether the handler answers `None`, which Litestar documents as JSON null."""
    schemas = [each.schema for each in (response.content or {}).values()]
    return any(isinstance(each, Schema) and each.type is OpenAPIType.NULL for each in schemas)


@dataclass
class TextToo(Documented):
    """One that answers a plain text, beside JSON or alone."""

    def __post_init__(self) -> None:
        """Litestar knows the type of the handler's return value only."""
        super().__post_init__()
        answer = (self.responses or {}).get("200")
        if isinstance(answer, OpenAPIResponse):
            text = {"text/plain": OpenAPIMediaType(schema=_TEXT)}
            answer.content = {kind: each for kind, each in (answer.content or {}).items() if _is_object(each)} | text


def _is_object(media: OpenAPIMediaType) -> bool:
    return not (isinstance(media.schema, Schema) and media.schema.type is OpenAPIType.STRING)


@dataclass
class OpenOperation(Documented):
    """One that needs no key."""

    def __post_init__(self) -> None:
        """No requirement stands above the document's."""
        super().__post_init__()
        self.security = []


def config(router: Router, *plugins: OpenAPIRenderPlugin) -> OpenAPIConfig:
    """Litestar's OpenAPI, rendered by these plugins on this router."""
    return OpenAPIConfig(
        title="Sandledger",
        version=__version__,
        description=_DESCRIPTION,
        license=License(name="Apache-2.0", identifier="Apache-2.0"),
        security=[{"key": []}],
        components=Components(
            security_schemes={
                "key": SecurityScheme(type="apiKey", name="OPEN-SANDBOX-API-KEY", security_scheme_in="header")
            }
        ),
        use_handler_docstrings=True,
        openapi_router=router,
        render_plugins=plugins,
    )


def described(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with four things put right.

    Shapes get the docstrings of their structs, and what their `example` gives. A union is `anyOf`: Litestar writes
    `oneOf`, and then an integer, which is also a number, fits neither. An alternative that stands alone is no union:
    Litestar keeps one for a parameter that may be absent, and says that it may be null. A body that may be null may be
    left out, which is not said otherwise.
    """
    found = _plain(dict(document))
    shapes = {each.__name__: each for each in Struct.__subclasses__() if each.__module__.startswith("app.api")}
    for name, schema in found["components"]["schemas"].items():
        schema.setdefault("description", shapes[name].__doc__)
        if (example := getattr(shapes[name], "example", None)) is not None:
            schema.setdefault("examples", [msgspec.to_builtins(example())])
    for methods in found["paths"].values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                parameter["schema"] = _without_null(parameter["schema"])
            for sent in operation.get("requestBody", {}).get("content", {}).values():
                plain = _without_null(sent["schema"])
                operation["requestBody"]["required"] = (
                    plain == sent["schema"]
                )  # null stands for a body that is left out
                sent["schema"] = plain
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    plain = {("anyOf" if key == "oneOf" else key): _plain(each) for key, each in cast("dict[str, Any]", value).items()}
    return _alone(plain, plain["anyOf"]) if "anyOf" in plain else plain


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    return _alone(schema, [each for each in schema.get("anyOf", []) if each != {"type": "null"}])


def _alone(schema: dict[str, Any], alternatives: list[dict[str, Any]]) -> dict[str, Any]:
    if len(alternatives) != 1:
        return schema
    return {**alternatives[0], **{key: each for key, each in schema.items() if key != "anyOf"}}
