"""What Litestar reads from a request, by this contract's rules: the query and the body.

* A query parameter that is no list must not be repeated. Litestar would take the last one.
* A whole number has digits only, also where it may be left out. Litestar would also take `1.0`, `1e2`, and `null`.
* A body must say that it is JSON, must not be compressed, must arrive in time, and is bounded. Litestar knows the last
  of these only. Bodies are small, and a compressed one could be a thousand times longer than what is bounded.
"""

from __future__ import annotations

import re
from typing import Any, Final, get_args
from urllib.parse import parse_qsl

from litestar import Request
from litestar.datastructures import State
from litestar.params import QueryParameter
from litestar.typing import FieldDefinition

from app.api.auth import Principal
from app.api.call import Call, call_of, too_large
from app.api.errors import Problem, wrong

MAX_FIELDS: Final = 1000
_CODINGS: Final = frozenset({"gzip", "x-gzip", "deflate", "compress", "x-compress", "br", "zstd"})
"""Content codings that a refusal names. Another word may be anything, so it is not repeated."""
_WHOLE = re.compile(r"-?[0-9]{1,18}")


OPTIONAL_BODY: Final[dict[str, Any]] = {"optional_body": True}
"""`opt` of handlers to which a request without a body is one whose body is null."""


class ApiRequest(Request[Principal, Any, State]):
    """The request that every handler gets."""

    __slots__ = ()

    @property
    def call(self) -> Call:
        """Request id, principal, and what the outer layer knows."""
        return call_of(self.scope)

    @property
    def tenant(self) -> str:
        """Whose sandboxes this request sees."""
        return self.call.who.tenant

    @property
    def mount(self) -> str:
        """`/v1`, or nothing on the un-prefixed mount."""
        return "/v1" if self.scope["path"].startswith("/v1/") else ""

    def given(self, name: str) -> bool:
        """Whether a query parameter was sent."""
        return name in self.query_params

    def check_query(self) -> None:
        """Parse the query.

        Raises:
            Problem: 422.
        """
        try:
            pairs = parse_qsl(
                self.scope["query_string"].decode("ascii"),
                keep_blank_values=True,
                errors="strict",
                max_num_fields=MAX_FIELDS,
            )
        except ValueError:
            raise wrong("query", rule=f"must be percent-encoded UTF-8 with at most {MAX_FIELDS} fields") from None
        self._parsed_query = self._connection_state.parsed_query = tuple(pairs)
        for name, field in self._parameters():
            values = [value for sent, value in pairs if sent == name]
            if len(values) > 1 and not field.is_non_string_sequence:
                raise wrong("query", name, rule="must not be repeated")
            if _is_whole(field) and not all(map(_WHOLE.fullmatch, values)):
                raise wrong("query", name, rule="must be a whole number")

    def _parameters(self) -> list[tuple[str, FieldDefinition]]:
        """The query parameters of the handler, by their names on the wire."""
        fields = self.route_handler.parsed_fn_signature.parameters
        return [
            (definition.name or name, field)
            for name, field in fields.items()
            if isinstance(definition := field.kwarg_definition, QueryParameter)
        ]

    async def body(self) -> bytes:
        """All of it, also when it comes in chunks of unannounced length.

        Raises:
            Problem: 415, 413, 408, 503 when the process stops, or 422 when it is empty.
        """
        call = self.call
        if call.ended and self.route_handler.opt.get("optional_body"):
            return b"null"
        if not _says_json(call.headers.get("content-type", "")):
            raise Problem(
                415, "GENERAL::UNSUPPORTED_MEDIA_TYPE", "The body must come as Content-Type: application/json."
            )
        _refuse_coded(call.headers.get("content-encoding", ""))
        raw = await call.read()
        if not raw:
            raise wrong("body", rule="is required", kind="missing")
        return raw


def principal(request: ApiRequest) -> Principal:
    """Injected into handlers that declare it. Hot handlers take it from the request, because injection costs time."""
    return request.call.who


async def check(request: ApiRequest) -> None:
    """What is checked of every request before its handler runs: the announced length, and the query.

    Raises:
        Problem: 413 before anything is read, 422.
    """
    call = request.call
    announced = call.headers.get("content-length")
    if announced is not None and announced.isdecimal():
        limit = call.limits.body_limit
        if int(announced[:18]) > limit:
            raise too_large(limit)
    if request.scope["query_string"]:
        request.check_query()


def _is_whole(field: FieldDefinition) -> bool:
    return field.annotation is int or int in get_args(field.annotation)


def _says_json(content_type: str) -> bool:
    essence = content_type.partition(";")[0].strip().lower()
    return essence == "application/json" or (essence.startswith("application/") and essence.endswith("+json"))


def _refuse_coded(content_encoding: str) -> None:
    codings = [coding for each in content_encoding.split(",") if (coding := each.strip().lower())]
    found = [coding for coding in codings if coding != "identity"]
    if not found:
        return
    named = ", ".join(coding if coding in _CODINGS else "an unknown coding" for coding in found)
    raise Problem(
        415,
        "GENERAL::UNSUPPORTED_CONTENT_ENCODING",
        f"Content-Encoding is {named}. Bodies are sent uncompressed here: leave the header out.",
        headers=[("accept-encoding", "identity")],
    )
