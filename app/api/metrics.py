"""What the SDKs report about their own calls. It is counted by day in the table `client_metrics`."""

from __future__ import annotations

import re
from typing import Annotated, Final

from litestar import post
from litestar.params import JSONBody
from msgspec import Meta, Struct

from app.api.answers import Answer
from app.api.controller import ApiController
from app.api.openapi import BODY, Documented, may_refuse
from app.api.request import ApiRequest
from app.store.metrics import Report

UNKNOWN: Final = "unknown"
_SDK = re.compile(r"OpenSandbox-([A-Za-z]{1,20})-SDK/([0-9A-Za-z.+-]{1,30})(?:\s|$)")


class MetricsEvent(Struct, frozen=True, rename="camel"):
    """What the SDKs report after a create. It is counted; which sandbox it was is not stored."""

    event_type: Annotated[str, Meta(pattern=r"^sandbox\.create$")]
    create_duration_ms: Annotated[int, Meta(ge=0)]
    success: bool
    sandbox_id: str | None = None
    image: str | None = None

    @classmethod
    def example(cls) -> MetricsEvent:
        """For the document."""
        return cls("sandbox.create", 1200, success=True)


def sdk_in(user_agent: str) -> str:
    """`python/1.1.1`, from the header of an SDK."""
    found = _SDK.match(user_agent)
    return UNKNOWN if found is None else f"{found[1].lower()}/{found[2]}"


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
    async def report(self, request: ApiRequest, data: JSONBody[MetricsEvent]) -> Answer[None]:
        """SDKs send it. It is counted by day, SDK and success."""
        sdk = sdk_in(request.call.headers.get("user-agent", ""))
        report = Report(request.tenant, data.event_type, sdk, data.success)
        await self.context.metrics.count(self.context.database, report, data.create_duration_ms)
        return Answer(None)
