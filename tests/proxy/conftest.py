"""A keyless server, a stand-in agent, and a running sandbox whose agent it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from uuid import UUID

import pytest
import uvloop

from tests.api.conftest import MakeContext, make_context
from tests.proxy import rig as parts
from tests.proxy.websockets import echoes

__all__ = ["make_context"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """What deals with transports themselves is tested on both event loops that servers run on."""
    both = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    return both if item.path.stem.startswith("test_websocket") else {"asyncio": both["asyncio"]}


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
