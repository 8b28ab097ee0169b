"""The query of a list (contract 1.9), and what is added to it: `cursor` and `limit` beside `page` and `pageSize`."""

from __future__ import annotations

from urllib.parse import parse_qsl

from msgspec import Struct

from app.api.call import Call
from app.api.errors import Issue, Problem, malformed, wrong
from app.domain.sandbox.state import Phase
from app.errors import Unsupported
from app.views.listing import Cursor, Wanted

_PHASES = {phase.value.lower(): phase.value for phase in Phase}
_MOST_PAGES = 2**53
_SIZE = (1, 200, 20)


class ListQuery(Struct, frozen=True):
    """Which page of which sandboxes."""

    wanted: Wanted
    size: int
    page: int
    after: Cursor | None = None

    @property
    def offset(self) -> int:
        """Rows before this page; a page beyond every row is empty, never an overflow."""
        return min((self.page - 1) * self.size, _MOST_PAGES)


def list_query(call: Call, tenant: str) -> ListQuery:
    """Parse.

    Raises:
        Problem: 422 for a parameter, 400 `INVALID_METADATA_FORMAT` for the metadata filter.
        Unsupported: `asOf`; passing over it would answer with the present in the past's name.
    """
    if call.many("asOf") is not None:
        raise Unsupported("SANDBOX::API_NOT_SUPPORTED", "asOf of lists is not served yet; it is for single sandboxes.")
    wanted = Wanted(tenant, _phases(call), _metadata(call), call.flag("includeTerminal"))
    cursor = call.one("cursor")
    for mine, other in (("cursor", "page"), ("limit", "pageSize")):
        if call.many(mine) is not None and call.many(other) is not None:
            raise malformed(Issue(("query", mine), f"may not stand beside {other}", "value_error"))
    size = call.whole("limit" if call.many("limit") is not None else "pageSize", *_SIZE)
    if cursor is None:
        return ListQuery(wanted, size, call.whole("page", 1, _MOST_PAGES, 1))
    try:
        after = Cursor.parse(cursor)
    except ValueError as error:
        raise wrong("query", "cursor", rule=str(error)) from None
    return ListQuery(wanted, size, after.page + 1, after)


def _phases(call: Call) -> tuple[str, ...] | None:
    asked = call.many("state")
    if asked is None:
        return None
    return tuple({_PHASES[text.lower()]: None for text in asked if text.lower() in _PHASES})


def _metadata(call: Call) -> dict[str, str]:
    text = call.one("metadata")
    if not text:
        return {}
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=256)
    except ValueError:
        pairs = None
    if pairs is None or "\0" in "".join(part for pair in pairs for part in pair):
        raise Problem(
            400,
            "INVALID_METADATA_FORMAT",
            "metadata must be a query string of its own, key=value&key=value, whose parts are percent-encoded.",
        )
    return dict(pairs)
