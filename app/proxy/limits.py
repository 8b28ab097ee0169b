"""How many streams may be open at once: in this process, for a tenant, for a sandbox.

Proxied requests are counted here and not among the requests of the lifecycle API, so neither can take the other's
places. A stream has two descriptors. `raise_file_limit` sees to it that there are enough of them.
"""

from __future__ import annotations

import logging
import resource
from typing import Final
from uuid import UUID

from msgspec import Struct

from app.proxy.refusals import busy

DESCRIPTORS_A_STREAM: Final = 2
OTHER_DESCRIPTORS: Final = 512
_LOG = logging.getLogger(__name__)


class Limits(Struct, frozen=True):
    """Open streams at once."""

    in_process: int = 8192
    of_tenant: int = 4096
    of_sandbox: int = 512


class Streams:
    """Counts the open ones."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tenants: dict[str, int] = {}
        self._sandboxes: dict[UUID, int] = {}
        self.open = 0

    def enter(self, tenant: str, sandbox_id: UUID) -> None:
        """Take a place. Its holder gives it back with `leave`.

        Raises:
            Refusal: there is none.
        """
        of_tenant, of_sandbox = self._tenants.get(tenant, 0), self._sandboxes.get(sandbox_id, 0)
        if self.open >= self._limits.in_process:
            raise busy("This server")
        if of_tenant >= self._limits.of_tenant:
            raise busy("The tenant")
        if of_sandbox >= self._limits.of_sandbox:
            raise busy("The sandbox")
        self.open += 1
        self._tenants[tenant] = of_tenant + 1
        self._sandboxes[sandbox_id] = of_sandbox + 1

    def leave(self, tenant: str, sandbox_id: UUID) -> None:
        """Give the place back. Names that count nothing are not kept: there are as many as sandboxes ever were."""
        self.open -= 1
        self._tenants[tenant] -= 1
        self._sandboxes[sandbox_id] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        if not self._sandboxes[sandbox_id]:
            del self._sandboxes[sandbox_id]


def with_descriptors(limits: Limits) -> Limits:
    """Raise the limit of open files to what so many streams need; where it cannot be raised, allow fewer streams."""
    wanted = DESCRIPTORS_A_STREAM * limits.in_process + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed >= wanted:
        return limits
    fewer = max(1, (allowed - OTHER_DESCRIPTORS) // DESCRIPTORS_A_STREAM)
    _LOG.warning(
        "only %s files may be open: the proxy carries %s streams and not %s", allowed, fewer, limits.in_process
    )
    return Limits(fewer, min(limits.of_tenant, fewer), min(limits.of_sandbox, fewer))
