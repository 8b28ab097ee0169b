"""A keyless server, a stand-in agent, and a running sandbox whose agent it is."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from tests.api.conftest import MakeContext, make_context
from tests.proxy import rig as parts

__all__ = ["make_context"]


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
