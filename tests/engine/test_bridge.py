"""The engine's own bridge, on which the tests' sandboxes stand."""

from __future__ import annotations

from pathlib import Path

import aiodocker
import pytest

pytestmark = pytest.mark.engine
SET = "3"
"""How the kernel says that a link address was set (NET_ADDR_SET) and is not chosen again."""


async def test_the_bridge_keeps_its_link_address(docker_host: str):
    """Otherwise containers lose their connections while others come and go, for seconds, and rarely."""
    async with aiodocker.Docker(url=docker_host) as docker:
        bridge = await (await docker.networks.get("bridge")).show()
    link = Path("/sys/class/net") / bridge["Options"]["com.docker.network.bridge.name"]
    if not link.exists():
        pytest.skip("the engine is on another machine")
    assert (link / "addr_assign_type").read_text().strip() == SET
