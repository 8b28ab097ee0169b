"""What this process knows of the machine that it runs on, for the endpoints that it hands out.

Looked up once, at the start. The machine's own address towards others is the one that the kernel would send from; a UDP
socket that is connected shows it, and nothing is sent.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from uuid import UUID

from app.domain.sandbox.address import LOOPBACK, Way, nowhere, own_link, own_network
from app.domain.sandbox.endpoints import Network
from app.settings import Settings

_MARKS: Final = (".dockerenv", "run/.containerenv")
"""Files that engines put into containers, below the root."""
_RUNTIMES: Final = frozenset({"docker", "podman", "oci", "containerd", "lxc", "systemd-nspawn"})
"""Values of the variable `container` that mean one."""
LINKS: Final = Path("/sys/class/net")
"""Network interfaces of this machine, or of the container that this process is in."""
_EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - compared only
_ELSEWHERE: Final = ("192.0.2.1", 9)
"""An address of the documentation network: any that is not this machine's leads to the same answer."""


def network_of(settings: Settings, environ: Mapping[str, str], root: Path = Path("/")) -> Network:
    """For `app.domain.sandbox.endpoints`. May ask the resolver."""
    server, docker, proxy = settings.server, settings.docker, settings.proxy
    listens_everywhere = server.host in _EVERYWHERE
    return Network(
        agent=bool(settings.runtime.execd_image),
        listens_on=server.host,
        eip=server.eip,
        host_ip=docker.host_ip if in_container(environ, root) else "",
        outbound=outbound_address() if listens_everywhere else LOOPBACK,
        public_address=proxy.public_address,
        open_proxy=proxy.auth == "open",
        wildcard=proxy.wildcard.removeprefix("*."),
    )


def way_of(settings: Settings, installation: UUID, links: Path = LINKS) -> Way:
    """How this server reaches what its engine runs.

    It stands on our own network where that network's interface is. A server elsewhere, or in a container, has none of
    that name. There the same addresses may be somebody else's, so they are not used.
    """
    host = settings.docker.host_ip or LOOPBACK

    def stands_on(network: str) -> bool:
        return (links / own_link(network)).exists()

    return Way(host, own_network(installation), stands_on if settings.proxy.resolve_internal else nowhere)


def in_container(environ: Mapping[str, str], root: Path) -> bool:
    """Whether this process runs in a container."""
    named = {environ.get(name, "").strip().lower() for name in ("container", "CONTAINER")}
    return bool(named & _RUNTIMES) or any((root / mark).exists() for mark in _MARKS)


def outbound_address() -> str:
    """The IPv4 address of this machine towards others; the loopback when it has no other."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_ELSEWHERE)
            return str(probe.getsockname()[0])
    except OSError:
        pass
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return LOOPBACK
