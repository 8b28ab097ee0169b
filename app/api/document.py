"""The OpenAPI 3.1 document, from the table of operations and the very structs that decode and encode.

It is built here and not derived from handler signatures, because bodies are decoded strictly by msgspec (a converter
that takes "null" for null would change env values), and because it has to say what holds for all answers: the error
body, the request id, which error statuses follow from a key, a path, a body. The test suite runs a fuzzer over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from app import __version__
from app.api.errors import ErrorBody
from app.api.operations import CONTRACT, SERVER, Answer, Operation

_REF: Final = "#/components/schemas/{name}"
_TEXT: Final = {"type": "string"}
_HEADERS: Final[dict[str, Any]] = {
    "X-Request-ID": {"description": "The client's own, or a new one.", "schema": {"type": "string", "maxLength": 128}},
    "ETag": {"description": "Version of the sandbox.", "schema": {"type": "string", "pattern": '^"[0-9]+"$'}},
    "Location": {"description": "Path of the new sandbox.", "schema": _TEXT},
    "Preference-Applied": {"description": "What of `Prefer` was heard (RFC 7240).", "schema": _TEXT},
    "Idempotency-Replayed": {"description": "`true` when an earlier request made it.", "schema": _TEXT},
    "Retry-After": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    "Allow": {"description": "What the path takes.", "schema": _TEXT},
}
_REFUSALS: Final = {
    400: "A value or a header breaks a rule.",
    401: "The API key is missing or wrong.",
    404: "There is no such sandbox, or it has ended; the message says when and why.",
    409: "The sandbox is not in a state that allows it.",
    412: "`If-Match` names another version.",
    413: "The body is too large.",
    415: "The body does not come as JSON.",
    422: "The request does not have the right shape; `detail` says where.",
    500: "A fault of the server.",
    501: "A part of the contract that is not served yet, or not by this runtime.",
    503: "The database is not reachable at the moment.",
}
_PATTERNS: Final = {"sandboxId": {"type": "string", "description": "UUID of the sandbox."}}
_DESCRIPTION: Final = """\
Lifecycle of sandboxes. Every request that changes something becomes an event in an append-only log, and every refused
one a record beside it. All paths below `/v1` are also served without that prefix. Other routes of the public contract
(endpoints, proxy, network policies, diagnostics, snapshots, pools, templates) answer 501.

Errors are always `{"code", "message"}`; 422 adds `detail`. No answer repeats a value that was sent.
"""


def build() -> dict[str, Any]:
    """The whole document."""
    paths: dict[str, dict[str, Any]] = {}
    types: list[Any] = [ErrorBody]
    for operation in (*CONTRACT, *SERVER):
        paths.setdefault(f"{operation.mounts[0]}{operation.path}", {})[operation.method.lower()] = _operation(operation)
        types += [kind for kind in _types(operation) if kind not in types]
    _, components = msgspec.json.schema_components(types, ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sandledger",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "headers": _HEADERS,
            "securitySchemes": {"key": {"type": "apiKey", "in": "header", "name": "OPEN-SANDBOX-API-KEY"}},
        },
        "security": [{"key": []}],
    }


def _types(operation: Operation) -> Iterator[Any]:
    if operation.body is not None:
        yield operation.body
    for answer in operation.answers.values():
        if answer.body is not None:
            yield answer.body


def _operation(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": {str(status): response for status, response in sorted(_responses(operation).items())},
    }
    if operation.description:
        described["description"] = operation.description.strip()
    if parameters := list(_parameters(operation)):
        described["parameters"] = parameters
    if operation.body is not None:
        content = {media: {"schema": _schema(operation.body)} for media in operation.body_media}
        described["requestBody"] = {"required": True, "content": content}
    if operation.open:
        described["security"] = []
    return described


def _parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for name, schema in _PATTERNS.items():
        if f"{{{name}}}" in operation.path:
            yield {"in": "path", "name": name, "required": True, "schema": schema}
    for parameter in operation.parameters:
        yield {
            "in": parameter.place,
            "name": parameter.name,
            "required": False,
            "description": parameter.description,
            "schema": dict(parameter.schema),
        }
    described = "Comes back in the answer, and stands in the log beside what the request led to."
    yield {"in": "header", "name": "X-Request-ID", "required": False, "description": described, "schema": _TEXT}


def _schema(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


def refusals(operation: Operation) -> set[int]:
    """Which error statuses an operation may answer."""
    found = {400, 500, *operation.refusals}
    if not operation.open:
        found |= {401, 503}
    if "{sandboxId}" in operation.path:
        found.add(404)
    if operation.method != "GET":
        found.add(413)
    if operation.body is not None:
        found |= {415, 422}
    return found - operation.answers.keys()


def _responses(operation: Operation) -> dict[int, Any]:
    found = {status: _answer(answer) for status, answer in operation.answers.items()}
    for status in refusals(operation):
        extra = ("Retry-After",) if status == 503 else ()  # noqa: PLR2004
        found[status] = _answer(Answer(_REFUSALS[status], ErrorBody, extra))
    return found


def _answer(answer: Answer) -> dict[str, Any]:
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-ID", *answer.headers)}
    described: dict[str, Any] = {"description": answer.description, "headers": headers}
    if answer.body is not None:
        described["content"] = {answer.media: {"schema": _schema(answer.body)}}
    return described
