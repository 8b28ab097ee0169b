"""What the SDKs report about their own calls."""

from __future__ import annotations

from typing import Annotated

from litestar import post
from litestar.params import JSONBody
from msgspec import Meta, Struct

from app.api.answers import Answer
from app.api.controller import ApiController
from app.api.openapi import BODY, Documented, may_refuse


class MetricsEvent(Struct, frozen=True, rename="camel"):
    """What the SDKs report after a create. It is checked and accepted, not stored."""

    event_type: Annotated[str, Meta(pattern=r"^sandbox\.create$")]
    create_duration_ms: Annotated[int, Meta(ge=0)]
    success: bool
    sandbox_id: str | None = None
    image: str | None = None

    @classmethod
    def example(cls) -> MetricsEvent:
        """For the document."""
        return cls("sandbox.create", 1200, success=True)


class Metrics(ApiController):
    """Below `/v1` only, as in the public contract."""

    path = "/metrics"
    tags = ("metrics",)

    @post(
        "/events",
        operation_id="reportMetricsEvent",
        operation_class=Documented,
        summary="Report how a create went",
        status_code=204,
        response_description="Accepted.",
        responses=may_refuse(*BODY),
    )
    async def report(self, data: JSONBody[MetricsEvent]) -> Answer[None]:  # noqa: ARG002 - decoding it is all that is done
        """SDKs send it. It is checked and accepted, not stored."""
        return Answer(None)
