"""Routes of the contract that are not served: each is refused by name, with the contract's own code where it has one.

One table. Whoever serves a route takes its line away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from litestar.response.base import ASGIResponse
from msgspec import Struct

from app.api.call import Call
from app.errors import Unsupported

_ONE = "/sandboxes/{sandboxId}"
_ALL: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")


class Part(Struct, frozen=True):
    """A part of the contract."""

    what: str
    routes: Mapping[str, tuple[str, ...]]
    """Path -> methods."""
    code: str = "SANDBOX::API_NOT_SUPPORTED"

    @property
    def refusal(self) -> Unsupported:
        """As raised."""
        return Unsupported(self.code, f"{self.what} are not served yet.")


UNSERVED: Final = (
    Part("Endpoints", {f"{_ONE}/endpoints/{{port}}": ("GET",)}),
    Part("Proxied requests", {f"{_ONE}/proxy/{{port}}": _ALL, f"{_ONE}/proxy/{{port}}/{{rest*}}": _ALL}),
    Part("Network policies", {f"{_ONE}/networkpolicy": ("GET", "PUT", "PATCH", "DELETE")}),
    Part("Diagnostics", {f"{_ONE}/diagnostics/{kind}": ("GET",) for kind in ("logs", "events", "inspect", "summary")}),
    Part(
        "Snapshots",
        {f"{_ONE}/snapshots": ("POST",), "/snapshots": ("GET",), "/snapshots/{snapshotId}": ("GET", "DELETE")},
        "SNAPSHOT::NOT_IMPLEMENTED",
    ),
    Part(
        "Pools",
        {"/pools": ("POST", "GET"), "/pools/{name}": ("GET", "PUT", "DELETE")},
        "KUBERNETES::POOL_NOT_SUPPORTED",
    ),
    Part(
        "Templates",
        {"/templates": ("POST", "GET"), "/templates/{templateId}": ("GET", "DELETE")},
        "FSB::API_NOT_SUPPORTED",
    ),
)


class Refusing:
    """The endpoint of a part."""

    def __init__(self, part: Part) -> None:
        """Of this one."""
        self._part = part

    async def __call__(self, _call: Call) -> ASGIResponse:
        """501, whoever asks for whatever."""
        raise self._part.refusal
