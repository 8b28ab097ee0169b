"""What the HTTP application works on. Built by the server process, or by a test; nothing here is global."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from msgspec import Struct, field

from app.api.auth import Authenticate
from app.api.waiters import Waiters
from app.domain.sandbox.endpoints import Network
from app.domain.sandbox.links import LinkKey
from app.domain.sandbox.spec import Bounds
from app.runtime.driver import Driver
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.refusals import Refusals
from app.store.log.signal import Signal
from app.store.metrics import ClientMetrics
from app.store.vault.seal import Sealer
from app.views.listing import Listing


class EndpointParts(Struct, frozen=True):
    """What lookups of endpoints need."""

    token_key: bytes
    """The key `token` of the installation."""
    link_key: LinkKey
    network: Network = Network()
    wait_seconds: float = 20
    """Longest wait for a Pending sandbox."""

    def __repr__(self) -> str:
        """Keep the key out of tracebacks."""
        return f"EndpointParts(network={self.network!r})"


class ApiContext(Struct, frozen=True, kw_only=True):
    """The parts and the bounds of one HTTP application."""

    service: Service
    listing: Listing
    refusals: Refusals
    sealer: Sealer
    signal: Signal
    database: Database
    driver: Driver
    """Asked by `/ready` only, and only where this process has a worker. Requests work on the database alone."""
    endpoints: EndpointParts
    api_key: str | None = None
    """None or blank = every request is accepted that `app.api.auth` does not refuse."""
    authenticate: Authenticate | None = None
    """Whose a key is. None = there is one key, `api_key`, or none."""
    loopback_only: bool = True
    """Without keys: whether the header `Host` must name the loopback."""
    max_sandbox_timeout_seconds: int | None = None
    diagnostics_wait_seconds: float = 16
    """How long a reader of diagnostics waits for a worker: for one that dies with the question, and for the next."""
    wait_seconds_max: int = 300
    """Longest `Prefer: wait`."""
    power_wait_seconds: float = 10
    """How long pause and resume wait for the final state when the client says nothing."""
    body_limit: int = 1024 * 1024
    body_idle_seconds: float = 30
    """How long a body may pause on its way."""
    body_total_seconds: float = 120
    """How long a body may take altogether."""
    metadata_max_entries: int | None = 256
    bounds: Bounds = Bounds()
    """The operator's default and highest limits of a sandbox."""
    worker_alive: Callable[[], bool] | None = None
    """Whether this process's worker runs. None = it has none, and needs no engine."""
    engine_mismatch: Callable[[], str] | None = None
    """Why this process's worker does not use the engine that answers; empty = it does. None = there is no worker."""
    ready_cache_seconds: float = 2
    """How long an answer of `/ready` holds."""
    metrics: ClientMetrics = field(default_factory=ClientMetrics)
    """What the SDKs report."""
    waiters: Waiters = field(default_factory=Waiters)
    """The requests that wait."""
    serves_api: bool = True
    """Whether the lifecycle API is served, and not only the server's own paths."""
    asked_to_stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set as soon as the process is asked to stop. `/ready` says so, while requests are still served."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process is asked to stop; requests that wait then answer what they have, or 503 when it is
    their body that they wait for."""
