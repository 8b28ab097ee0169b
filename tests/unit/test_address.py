"""Where the agent of a sandbox is reached, for each kind of network. The probe and the proxy ask the same function."""

from __future__ import annotations

import pytest

from app.domain.sandbox.address import Reach, Way, agent_at, has_agent
from app.domain.sandbox.observed import Address

ENGINE = Way("10.0.0.9")


@pytest.mark.parametrize(
    ("address", "found"),
    [
        (Address("bridge", "172.17.0.2", {"44772": "127.0.0.1:32768", "8080": "127.0.0.1:32769"}), "127.0.0.1:32768"),
        (Address("named", "10.9.0.2", {"44772": "192.0.2.1:1"}), "192.0.2.1:1"),
        (Address("named", "10.9.0.2", {"44772": "[fd00::1]:7"}), "[fd00::1]:7"),
        (Address("bridge", "172.17.0.2", {"44772": "0.0.0.0:32768"}), "10.0.0.9:32768"),
        (Address("bridge", "172.17.0.2", {"44772": "[::]:32768"}), "10.0.0.9:32768"),
        (Address("bridge", "172.17.0.2", {"44772": ":32768"}), "10.0.0.9:32768"),
        (Address("host"), "10.0.0.9:44772"),
        (Address("pods", "10.244.0.7"), "10.244.0.7:44772"),
        (Address("pods", "fd00::7"), "[fd00::7]:44772"),
        (Address("bridge", "172.17.0.2", {"44772": ""}), None),
        (Address("bridge", "172.17.0.2", {"44772": "127.0.0.1"}), None),
        (Address("bridge", "172.17.0.2", {"44772": "127.0.0.1:x"}), None),
        (Address("none"), None),
        (None, None),
    ],
)
def test_the_agent_is_there(address: Address | None, found: str | None):
    reach = agent_at(address, ENGINE)
    assert (None if reach is None else str(reach)) == found


def test_a_host_has_no_brackets():
    assert agent_at(Address("b", "", {"44772": "[fd00::1]:7"}), ENGINE) == Reach("fd00::1", 7)


@pytest.mark.parametrize("configured", [True, False])
def test_a_published_port_says_whether_there_is_one(configured: bool):
    """Whatever the settings say now: the sandbox may be older than they are."""
    assert has_agent(Address("bridge", "172.17.0.2", {"44772": "127.0.0.1:1"}), configured=configured)
    assert not has_agent(Address("bridge", "172.17.0.2", {"8080": "127.0.0.1:1"}), configured=configured)
    assert not has_agent(Address("bridge", "172.17.0.2"), configured=configured)


@pytest.mark.parametrize("configured", [True, False])
def test_where_nothing_is_published_the_settings_do(configured: bool):
    assert has_agent(Address("host"), configured=configured) is configured
    assert has_agent(None, configured=configured) is configured
