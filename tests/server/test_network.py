"""What a process knows of its machine, from settings, environment and marks of a container."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from uuid import UUID

import pytest

from app.domain.sandbox.endpoints import Network
from app.server.front import access_of
from app.server.network import in_container, network_of, nowhere, outbound_address, way_of
from app.settings import DockerSettings, ProxySettings, RuntimeSettings, ServerSettings, Settings

FULL = Settings(
    server=ServerSettings(host="10.0.0.5", eip="edge.test"),
    runtime=RuntimeSettings(execd_image="agent:1"),
    docker=DockerSettings(host_ip="10.0.0.2"),
    proxy=ProxySettings(public_address="proxy.test", auth="open", wildcard="*.boxes.test:8443"),
)


def test_defaults(tmp_path: Path):
    assert network_of(Settings(), {}, tmp_path) == Network(agent=True)
    without = Settings(runtime=RuntimeSettings(execd_image=""))
    assert network_of(without, {}, tmp_path) == Network()


def test_every_setting_arrives(tmp_path: Path):
    known = Network(True, "10.0.0.5", "edge.test", "", "127.0.0.1", "proxy.test", True, "boxes.test:8443")
    assert network_of(FULL, {}, tmp_path) == known
    assert network_of(FULL, {"container": "podman"}, tmp_path).host_ip == "10.0.0.2"


@pytest.mark.parametrize(
    ("mark", "environ", "inside"),
    [
        (None, {}, False),
        (".dockerenv", {}, True),
        ("run/.containerenv", {}, True),
        (None, {"container": "docker"}, True),
        (None, {"CONTAINER": "Podman"}, True),
        (None, {"container": "yes"}, False),
    ],
)
def test_a_container_is_recognised(tmp_path: Path, mark: str | None, environ: dict[str, str], inside: bool):
    if mark is not None:
        (tmp_path / mark).parent.mkdir(exist_ok=True)
        (tmp_path / mark).touch()
    assert in_container(environ, tmp_path) is inside


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_who_listens_on_every_address_names_one_of_its_own(tmp_path: Path, host: str):
    found = network_of(Settings(server=ServerSettings(host=host)), {}, tmp_path)
    assert found.outbound == outbound_address()
    assert not ip_address(found.outbound).is_unspecified


def test_it_stands_on_our_network_where_the_interface_is(tmp_path: Path):
    """A server in a container, or on another machine, has none of that name."""
    installation = UUID("0198f000-0000-7000-8000-00000000aaaa")
    way = way_of(Settings(), installation, tmp_path)
    assert way.own_network == "sandledger-0198f000"
    assert not way.stands_on(way.own_network)
    (tmp_path / "slnet-0198f000").mkdir()
    assert way.stands_on(way.own_network), "a worker may make it later"
    settings = Settings(proxy=ProxySettings(resolve_internal=False))
    assert not way_of(settings, installation, tmp_path).stands_on(way.own_network)


@pytest.mark.parametrize(("auth", "stands"), [("key", True), ("open", False)])
def test_an_open_proxy_goes_to_no_program_itself(auth: Literal["key", "open"], stands: bool):
    """Nobody would ask its callers for anything: the agent's token is what they have to know."""
    installation = UUID("0198f000-0000-7000-8000-00000000aaaa")
    settings = Settings(proxy=ProxySettings(auth=auth))
    way = access_of(settings, installation, b"k").way
    assert (way.stands_on is not nowhere) is stands
