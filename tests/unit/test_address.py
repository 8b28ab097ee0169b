"""Where the agent of a sandbox is reached, for each kind of network. The probe and the proxy ask the same function."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from app.domain.sandbox.address import Reach, Way, agent_at, engines_own, has_agent, leasable, leased_at
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


OWN = Way("10.0.0.9", "sandledger-0198f000", lambda network: network == "sandledger-0198f000")
LEASED = Address("sandledger-0198f000", "10.212.4.1", {"44772": "127.0.0.1:32768"})


@pytest.mark.parametrize(
    ("address", "way", "own", "agent"),
    [
        (LEASED, OWN, "10.212.4.1", "10.212.4.1:44772"),
        (LEASED, replace(OWN, stands_on=lambda _: False), None, "127.0.0.1:32768"),
        (LEASED, replace(OWN, own_network="sandledger-other"), None, "127.0.0.1:32768"),
        (LEASED, ENGINE, None, "127.0.0.1:32768"),
        (replace(LEASED, network="bridge"), OWN, None, "127.0.0.1:32768"),
        (replace(LEASED, ip=""), OWN, None, "127.0.0.1:32768"),
        # Where this server stands, the same address may be somebody else's.
        (replace(LEASED, ports={}), replace(OWN, stands_on=lambda _: False), None, None),
    ],
)
def test_an_address_is_leased_on_our_own_network_only(address: Address, way: Way, own: str | None, agent: str | None):
    assert leased_at(address, way) == own
    reach = agent_at(address, way)
    assert (None if reach is None else str(reach)) == agent


def test_what_is_leased_and_what_is_the_engines():
    first, last = leasable("10.212.0.0/18")
    assert (str(first), str(last)) == ("10.212.4.0", "10.212.63.254")
    assert str(engines_own("10.212.0.0/18")) == "10.212.0.0/22"
    assert first not in engines_own("10.212.0.0/18")
    with pytest.raises(ValueError, match=r"host bits"):
        leasable("10.212.0.1/18")
