"""A keyless server, a stand-in agent, and a running sandbox whose agent it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from uuid import UUID

import pytest
import uvloop

from tests.api.conftest import MakeContext, make_context
from tests.proxy import rig as parts
from tests.proxy.nginx_pass import CORE, EXCEPTIONS
from tests.proxy.websockets import echoes

__all__ = ["make_context"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What deals with transports themselves is tested on both event loops that servers run on."""
    both = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return both if item.path.stem.startswith("test_websocket") else {"asyncio": both["asyncio"]}


SERVED = {"rig", "agent", "make_context"}
"""A test that uses one of these asks a server."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test that asks a server does it a second time through nginx. A core of them stays in `make test`."""
    name = metafunc.definition.originalname
    if SERVED.isdisjoint(metafunc.fixturenames) or name in EXCEPTIONS or metafunc.module.__name__.endswith("_nginx"):
        return
    marks = [] if name in CORE else [pytest.mark.proof]
    metafunc.parametrize("through", ["direct", pytest.param("nginx", marks=marks)], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Both event loops are our server's. nginx has none of them, so one is enough."""
    here = Path(__file__).parent
    items[:] = [each for each in items if not (each.path.parent == here and "uvloop-nginx" in each.name)]


@pytest.fixture(autouse=True)
def through(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How callers reach the servers of this test."""
    monkeypatch.setattr(parts, "through", getattr(request, "param", "direct"))


@pytest.fixture
async def agent() -> AsyncIterator[parts.Agent]:
    async with parts.agent() as made:
        yield made


@pytest.fixture
async def rig(make_context: MakeContext) -> AsyncIterator[parts.Rig]:
    async with parts.serving(make_context(api_key=None)) as made:
        yield made


@pytest.fixture
async def sandbox(rig: parts.Rig, agent: parts.Agent) -> UUID:
    return await rig.running(agent)


@pytest.fixture
def echo(agent: parts.Agent) -> None:
    agent.handlers["/proxy/3000/ws"] = echoes
