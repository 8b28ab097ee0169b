"""How settings become the options of the Docker driver."""

from __future__ import annotations

from uuid import uuid4

import msgspec
import pytest

from app.errors import SettingsError
from app.server.assembly import docker_options
from app.settings import DockerSettings, ServerSettings, Settings


def settings(**docker: object) -> Settings:
    return msgspec.structs.replace(Settings(), docker=msgspec.convert(docker, DockerSettings))


@pytest.mark.parametrize(
    ("given", "ports"),
    [
        ({}, None),
        ({"port_range_min": 45000, "port_range_max": 45099}, (45000, 45099)),
    ],
)
def test_ports_to_publish_on(given: dict[str, object], ports: tuple[int, int] | None):
    assert docker_options(settings(**given), uuid4()).port_range == ports


def test_ports_are_published_on_the_loopback_unless_somebody_says_otherwise():
    assert docker_options(settings(), uuid4()).publish_host == "127.0.0.1"
    assert docker_options(settings(publish_host="10.1.2.3"), uuid4()).publish_host == "10.1.2.3"
    wide = msgspec.structs.replace(Settings(), server=ServerSettings(host="0.0.0.0"))
    assert docker_options(wide, uuid4()).publish_host == "0.0.0.0"


def test_our_own_network_is_the_default_and_cannot_be_named():
    """Named, the engine would choose addresses on it, and they would count as leased."""
    installation = uuid4()
    options = docker_options(Settings(), installation)
    assert (options.network_mode, len(options.subnets)) == ("bridge", 18)
    named = Settings(docker=DockerSettings(network_mode=f"sandledger-{installation.hex[:8]}"))
    with pytest.raises(SettingsError, match=r"say \"bridge\""):
        docker_options(named, installation)


@pytest.mark.parametrize("subnet", ["8.8.8.0/24", "10.0.0.1/16"])
def test_a_subnet_is_private_and_whole(subnet: str):
    with pytest.raises(ValueError, match=r"private|host bits"):
        DockerSettings(subnets=(subnet,))
