"""Network policies of single sandboxes (contract 1.17): the routes, without what they lead to.

The public server passes these calls on to the egress sidecar of the sandbox, and answers 502 when there is none. Here
no sandbox has one yet: a create with `networkPolicy` is refused. So the shape of a request is checked, and the answer
is the public server's for a sandbox without a sidecar. Nothing is passed on: a program that happens to listen on the
sidecar's port is not one, and must not get to see what an operator sends to it.
"""

from __future__ import annotations

from typing import Annotated, Any

from litestar import delete, get, patch, put
from litestar.params import JSONBody
from msgspec import Meta, Struct

from app.api.answers import Answer
from app.api.commands import sandbox_of
from app.api.controller import ApiController
from app.api.errors import Problem
from app.api.openapi import BODY, Documented, may_refuse
from app.api.parameters import SandboxId
from app.api.request import ApiRequest
from app.domain.sandbox.decide import unknown, visible
from app.domain.sandbox.endpoints import not_yet
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.sandbox.status import status_of
from app.errors import Conflict

_NO_SIDECAR = (
    502,
    "BACKEND_CONNECTION_FAILED",
    "The sandbox was made without a network policy, so there is no egress sidecar that could answer.",
)
_REFUSALS = (
    "DOCKER::SANDBOX_NOT_FOUND",
    "KUBERNETES::POD_IP_NOT_AVAILABLE",
    "DOCKER::SANDBOX_NOT_RUNNING",
    _NO_SIDECAR,
)


class NetworkRule(Struct, frozen=True):
    """What happens to traffic to one target."""

    action: str
    """`allow` or `deny`."""
    target: Annotated[str, Meta(min_length=1)]
    """A name such as `example.com` or `*.example.com`."""

    @classmethod
    def example(cls) -> NetworkRule:
        """For the document."""
        return cls("allow", "pypi.org")


class NetworkPolicy(Struct, frozen=True, rename="camel"):
    """Rules in their order; the first that fits decides."""

    default_action: str | None = None
    """For targets that no rule names: `allow` or `deny`."""
    egress: list[NetworkRule] = []

    @classmethod
    def example(cls) -> NetworkPolicy:
        """For the document."""
        return cls("deny", [NetworkRule.example()])


class NetworkPolicies(ApiController):
    """Answers as the public server does without a sidecar."""

    path = "/sandboxes/{sandboxId:str}/networkpolicy"
    tags = ("network policies",)

    @get(
        operation_id="getNetworkPolicy",
        operation_class=Documented,
        summary="Read a sandbox's network policy",
        response_description="Not answered yet: no sandbox has a sidecar.",
        responses=may_refuse(*_REFUSALS),
    )
    async def read(self, request: ApiRequest, sandbox_id: SandboxId) -> Answer[dict[str, Any]]:
        """502 without a sidecar, which no sandbox has yet."""
        raise await self._refusal(request, sandbox_id)

    @put(
        operation_id="replaceNetworkPolicy",
        operation_class=Documented,
        summary="Replace a sandbox's network policy",
        status_code=200,
        response_description="Not answered yet: no sandbox has a sidecar.",
        responses=may_refuse(*_REFUSALS, *BODY),
    )
    async def replace(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        data: JSONBody[NetworkPolicy],  # noqa: ARG002 - its shape is all that is looked at
    ) -> Answer[dict[str, Any]]:
        """502 without a sidecar, which no sandbox has yet."""
        raise await self._refusal(request, sandbox_id)

    @patch(
        operation_id="patchNetworkPolicy",
        operation_class=Documented,
        summary="Add rules to a sandbox's network policy",
        response_description="Not answered yet: no sandbox has a sidecar.",
        responses=may_refuse(*_REFUSALS, *BODY),
    )
    async def change(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        data: JSONBody[list[NetworkRule]],  # noqa: ARG002
    ) -> Answer[dict[str, Any]]:
        """502 without a sidecar, which no sandbox has yet."""
        raise await self._refusal(request, sandbox_id)

    @delete(
        operation_id="deleteNetworkPolicyRules",
        operation_class=Documented,
        summary="Remove rules from a sandbox's network policy, by target",
        status_code=200,
        response_description="Not answered yet: no sandbox has a sidecar.",
        responses=may_refuse(*_REFUSALS, *BODY),
    )
    async def remove(
        self,
        request: ApiRequest,
        sandbox_id: SandboxId,
        data: JSONBody[list[str]],  # noqa: ARG002
    ) -> Answer[dict[str, Any]]:
        """502 without a sidecar, which no sandbox has yet."""
        raise await self._refusal(request, sandbox_id)

    async def _refusal(self, request: ApiRequest, sandbox_id: str) -> Exception:
        identity, view = sandbox_of(sandbox_id), self.context.service.view
        loaded = await view.load(identity, request.tenant)
        if loaded is None:
            raise unknown(identity)
        sandbox = visible(loaded[0], identity)
        if sandbox.phase is Phase.PENDING:
            return not_yet(sandbox, await view.attempt(sandbox))
        return _without_sidecar(sandbox)


def _without_sidecar(sandbox: Sandbox) -> Exception:
    if sandbox.phase in (Phase.FAILED, Phase.TERMINATED):
        status = status_of(sandbox)
        message = f"The sandbox is {status.state} ({status.reason}): {status.message}"
        return Conflict("DOCKER::SANDBOX_NOT_RUNNING", message)
    return Problem(*_NO_SIDECAR)
