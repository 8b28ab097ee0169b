"""The query of a list (contract 1.9), and what is added to it: `cursor` and `limit` beside `page` and `pageSize`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final, TypeAlias
from urllib.parse import parse_qsl

from litestar.openapi.spec import Example
from litestar.params import QueryParameter
from msgspec import Struct

from app.api.errors import Issue, Problem, malformed, wrong
from app.domain.sandbox.state import Phase
from app.errors import Unsupported
from app.views.listing import Cursor, Wanted

MAX_PAGE_SIZE: Final = 200
MAX_PAGES: Final = 2**53
DEFAULT_PAGE_SIZE: Final = 20
_PHASES = {phase.value.lower(): phase.value for phase in Phase}
_MAX_OFFSET = 2**53
_EITHER: Final = (("cursor", "page"), ("limit", "pageSize"))


States: TypeAlias = Annotated[
    list[str] | None,
    QueryParameter(
        name="state",
        description="Any of these states, in any case. May be repeated.",
        examples=[Example(id="running", value=[Phase.RUNNING.value])],
    ),
]
Metadata: TypeAlias = Annotated[
    str | None,
    QueryParameter(
        description="All of these entries. A query string itself (`key=value&key=value`), so it is encoded twice.",
        examples=[Example(id="two", value="team=a&purpose=test")],
    ),
]
PageNumber: TypeAlias = Annotated[int, QueryParameter(ge=1, le=MAX_PAGES, description="Which page.")]
PageSize: TypeAlias = Annotated[
    int, QueryParameter(name="pageSize", ge=1, le=MAX_PAGE_SIZE, description="How many sandboxes on a page.")
]
CursorText: TypeAlias = Annotated[
    str | None,
    QueryParameter(
        name="cursor",
        description="`nextCursor` of the page before, instead of `page`. 410 when the log was restored since.",
    ),
]
Limit: TypeAlias = Annotated[
    int, QueryParameter(ge=1, le=MAX_PAGE_SIZE, description="How many on a page, beside `cursor`.")
]


class Page(Struct, frozen=True):
    """What a list was asked for."""

    given: Callable[[str], bool]
    """Whether a parameter was sent."""
    state: list[str] | None
    metadata: str | None
    page: int
    size: int
    cursor: str | None
    include_terminal: bool


def list_page(asked: Page, tenant: str) -> tuple[Wanted, int, Cursor | None, int]:
    """The filter, the rows before the page, the cursor, and the page's number.

    Raises:
        Problem: 422 for a parameter, 400 `INVALID_METADATA_FORMAT` for the metadata filter.
        Unsupported: `asOf`. Ignoring it would present the present as the past.
    """
    if asked.given("asOf"):
        raise Unsupported("SANDBOX::API_NOT_SUPPORTED", "asOf of lists is not served yet; it is for single sandboxes.")
    for mine, other in _EITHER:
        if asked.given(mine) and asked.given(other):
            raise malformed(Issue(("query", mine), f"must not stand beside {other}", "value_error"))
    wanted = Wanted(tenant, _phases(asked.state), _metadata(asked.metadata), asked.include_terminal)
    if asked.cursor is None:
        # A page beyond every row is empty, never an overflow.
        return wanted, min((asked.page - 1) * asked.size, _MAX_OFFSET), None, asked.page
    try:
        after = Cursor.parse(asked.cursor)
    except ValueError as error:
        raise wrong("query", "cursor", rule=str(error)) from None
    return wanted, 0, after, after.page + 1


def _phases(asked: list[str] | None) -> tuple[str, ...] | None:
    if asked is None:
        return None
    return tuple({_PHASES[text.lower()]: None for text in asked if text.lower() in _PHASES})


def _metadata(text: str | None) -> dict[str, str]:
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
