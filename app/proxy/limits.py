"""How many streams may be open at once: in this process, for a tenant, for a sandbox.

Proxied requests are counted here and not among the requests of the lifecycle API, so neither can take the other's
places. A stream has two descriptors. `raise_file_limit` sees to it that there are enough of them.
"""

from __future__ import annotations

import logging
import resource
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final, TypeVar
from uuid import UUID

from msgspec import Struct

from app.proxy.refusals import busy

DESCRIPTORS_A_STREAM: Final = 2
OTHER_DESCRIPTORS: Final = 512
_Key = TypeVar("_Key")
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
        self._tenants: Counter[str] = Counter()
        self._sandboxes: Counter[UUID] = Counter()
        self.open = 0

    @contextmanager
    def stream(self, tenant: str, sandbox_id: UUID) -> Generator[None]:
        """Hold a place for the block.

        Raises:
            Refusal: there is none.
        """
        if self.open >= self._limits.in_process:
            raise busy("This server")
        if self._tenants[tenant] >= self._limits.of_tenant:
            raise busy("The tenant")
        if self._sandboxes[sandbox_id] >= self._limits.of_sandbox:
            raise busy("The sandbox")
        self.open += 1
        self._tenants[tenant] += 1
        self._sandboxes[sandbox_id] += 1
        try:
            yield
        finally:
            self.open -= 1
            _less(self._tenants, tenant)
            _less(self._sandboxes, sandbox_id)


def _less(counts: Counter[_Key], key: _Key) -> None:
    """Names that count nothing are not kept: there are as many as sandboxes ever were."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]


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
