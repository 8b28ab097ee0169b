"""Routes of the contract that are not served: each is refused by name, with the contract's own code where it has one.

One table. A change that serves a route takes its line away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from litestar import route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from app.api.answers import Answer
from app.errors import Unsupported

_ONE = "/sandboxes/{sandboxId:str}"


class Part(Struct, frozen=True):
    """A part of the contract."""

    what: str
    routes: Mapping[str, tuple[str, ...]]
    """Path -> methods."""
    code: str = "SANDBOX::API_NOT_SUPPORTED"


UNSERVED: Final = (
    Part(
        "Pools",
        {"/pools": ("POST", "GET"), "/pools/{name:str}": ("GET", "PUT", "DELETE")},
        "KUBERNETES::POOL_NOT_SUPPORTED",
    ),
    Part(
        "Templates",
        {"/templates": ("POST", "GET"), "/templates/{templateId:str}": ("GET", "DELETE")},
        "FSB::API_NOT_SUPPORTED",
    ),
)


def refusing() -> Iterator[HTTPRouteHandler]:
    """A handler for each route. The answer is 501 to any request."""
    for part in UNSERVED:
        for path, methods in part.routes.items():
            yield _handler(part, path, methods)


def _handler(part: Part, path: str, methods: tuple[str, ...]) -> Any:
    @route(
        path,
        http_method=[HttpMethod(method) for method in methods],
        status_code=200,
        include_in_schema=False,
        sync_to_thread=False,
    )
    def refuse() -> Answer[None]:
        raise Unsupported(part.code, f"{part.what} are not served yet.")

    return refuse
