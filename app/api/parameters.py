"""Parameters that several handlers take, with their names on the wire and their descriptions.

Headers and instants are taken as text: their grammars are in `app.api.conditions` and `app.api.instants`.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from litestar.openapi.spec import Example
from litestar.params import HeaderParameter, PathParameter, QueryParameter

SandboxId: TypeAlias = Annotated[
    str,
    PathParameter(
        name="sandboxId",
        description="UUID of the sandbox.",
        examples=[Example(id="id", value="0197a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b")],
    ),
]
IncludeTerminal: TypeAlias = Annotated[
    bool, QueryParameter(name="includeTerminal", description="Also sandboxes that were deleted or have expired.")
]
AsOf: TypeAlias = Annotated[
    str | None,
    QueryParameter(
        name="asOf",
        description="The sandbox as it was at that instant. Not in the public contract.",
        format="date-time",
        examples=[Example(id="instant", value="2026-01-31T12:00:00Z")],
    ),
]
IfMatch: TypeAlias = Annotated[
    str | None,
    HeaderParameter(
        name="If-Match",
        description='RFC 9110. Only when the sandbox is at one of these versions, such as `"3"`. `*` = any version.',
    ),
]
IfNoneMatch: TypeAlias = Annotated[
    str | None,
    HeaderParameter(name="If-None-Match", description="RFC 9110. 304 when the sandbox is still at this version."),
]
Prefer: TypeAlias = Annotated[
    str | None,
    HeaderParameter(
        name="Prefer",
        description="RFC 7240. `wait=N`: answer when the state is reached, after N seconds at the latest. "
        "`respond-async`: answer at once.",
        examples=[Example(id="wait", value="wait=30")],
    ),
]
IdempotencyKey: TypeAlias = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        description="The same key with the same body gives the same sandbox, however often and to whichever server it "
        "is sent.",
        schema_extra={"min_length": 1, "max_length": 255, "pattern": r"^[\x21-\x7e]+$"},
    ),
]
