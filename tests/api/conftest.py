"""The application on a real database, driven in-process; and a live server on a loopback port for real clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from litestar import Litestar

from app.api.app import create_app
from app.api.context import ApiContext, EndpointParts
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.links import LinkKey
from app.domain.sandbox.observed import Address, Exit, Observed, Part, Power
from app.domain.stream import Actor, ActorKind, Meta
from app.domain.tenants import ANY_TENANT
from app.runtime.fake import FakeDriver, FakeEngine
from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.refusals import Refusals
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from app.views.listing import Listing

KEY = "test-key-0123456789"
INSTALLATION = uuid4()
WORKER = Meta(Actor(ActorKind.RECONCILER, "w1", "test-worker"), "0")
ENDPOINTS = EndpointParts(b"k" * 32, LinkKey(b"l" * 32), wait_seconds=0.1)
ADDRESS = Address("bridge", "172.17.0.2", {"44772": "127.0.0.1:32768", "8080": "127.0.0.1:32769"})
"""Of a sandbox with an agent."""
MakeContext = Callable[..., ApiContext]


@pytest.fixture
def make_context(service: Service, database: Database, signal: Signal, sealer: Sealer) -> MakeContext:
    """A context on the test's database; parts can be replaced."""

    def make(**changes: Any) -> ApiContext:
        parts: dict[str, Any] = {
            "service": service,
            "listing": Listing(database),
            "refusals": Refusals(database),
            "sealer": sealer,
            "signal": signal,
            "database": database,
            "driver": FakeDriver(FakeEngine(), INSTALLATION),
            "endpoints": ENDPOINTS,
            "api_key": KEY,
        }
        return ApiContext(**(parts | changes))

    return make


@pytest.fixture
def context(make_context: MakeContext) -> ApiContext:
    """With a key."""
    return make_context()


@pytest.fixture
def app(context: ApiContext) -> Litestar:
    """On that context."""
    return create_app(context)


def client(app: Litestar, *, base_url: str = "http://api.test", **headers: str) -> httpx.AsyncClient:
    """Calls `app` without a socket."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True, client=("192.0.2.7", 4711))
    return httpx.AsyncClient(transport=transport, base_url=base_url, headers=headers)


@pytest.fixture
async def http(app: Litestar) -> AsyncIterator[httpx.AsyncClient]:
    """With the right key."""
    async with client(app, **{"OPEN-SANDBOX-API-KEY": KEY}) as made:
        yield made


def body(**changes: Any) -> dict[str, Any]:
    """A create body that is accepted; None takes a field away."""
    full: dict[str, Any] = {
        "image": {"uri": "busybox:1"},
        "entrypoint": ["sleep", "60"],
        "timeout": 600,
        "resourceLimits": {"cpu": "500m", "memory": "64Mi"},
    } | changes
    return {name: value for name, value in full.items() if value is not None}


async def create(http: httpx.AsyncClient, headers: dict[str, str] | None = None, **changes: Any) -> dict[str, Any]:
    """Create one; must be accepted."""
    answer = await http.post("/v1/sandboxes", json=body(**changes), headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()


def seen(sandbox_id: UUID | str, power: Power = Power.RUNNING, end: Exit | None = None) -> Observed:
    """What an engine would say."""
    return Observed(
        UUID(str(sandbox_id)),
        (Part("main", f"rt-{sandbox_id}", f"sandbox-{sandbox_id}"),),
        power,
        started_at=datetime.now(UTC),
        exit=end,
    )


async def observe(
    service: Service, sandbox_id: UUID | str, power: Power = Power.RUNNING, end: Exit | None = None
) -> None:
    """Record an observation, as the reconciler does."""
    await service.execute(UUID(str(sandbox_id)), ANY_TENANT, cmd.RecordSeen(seen(sandbox_id, power, end)), WORKER)


async def remove(service: Service, sandbox_id: UUID | str) -> None:
    """Record that nothing of it is left."""
    await service.execute(UUID(str(sandbox_id)), ANY_TENANT, cmd.RecordRemoved(), WORKER)
