"""Where a port of a sandbox is reached: the forms of an endpoint, from the head row and the operator's settings alone.

No engine is asked. The address was recorded when the container started, and the row has the one of its present object.

=============================== ======================================= =================================
what is asked for               endpoint                                headers beside the generation
=============================== ======================================= =================================
host network                    `<host>:<port>`                         the agent's token on its own port
published port 8080             `<host>:<published 8080>`               none
any other port, with an agent   `<host>:<published 44772>/proxy/<port>` the agent's token
through this server             `<base>/sandboxes/<id>/proxy/<port>`    none; the token where the proxy is open
the same, with a wildcard       `<port>-<id>.<domain>`                  the same
=============================== ======================================= =================================

The agent asks for its token on every path, so it goes with each endpoint that leads to the agent. The proxy of this
server adds the token itself, unless it lets in callers without a key: then it would be theirs for nothing.

`<host>` is the first of these that is known: `server.eip`; `docker.host_ip`, when the server runs in a container and
itself listens on all interfaces or on the loopback; the address on which the port is published, unless that is every
address; the machine's own address towards others, when the server listens on every address; `server.host`. A port that
is published on the loopback is so reached at the loopback, because nothing else can work.

`<base>` is `proxy.public_address`, else `server.eip`, both without scheme, else the host that the request named and the
prefix that it used.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from msgspec import Struct

from app.domain.sandbox import address as addresses
from app.domain.sandbox.address import AGENT_PORT, HOST_NETWORK
from app.domain.sandbox.decide import visible
from app.domain.sandbox.links import LINK_PARAMETER
from app.domain.sandbox.state import Phase, Sandbox
from app.domain.sandbox.status import Attempt, status_of
from app.errors import Conflict, NotFound, Rejected, Unsupported

HTTP_PORT: Final = 8080
"""The port of the user's own program that is published beside the agent's."""
TOKEN_HEADER: Final = "X-EXECD-ACCESS-TOKEN"  # noqa: S105 - the name of a header
GENERATION_HEADER: Final = "Sandledger-Generation"
MAX_PORT: Final = 65535
_ONLY_FROM_HERE = ("NETWORK_NOT_REACHABLE", "ADVERTISED_NOT_REACHABLE")
"""Reasons that hold for the place of the probe only. A client may stand elsewhere, so it gets the endpoint."""
_NO_AGENT = "SANDBOX::AGENT_NOT_AVAILABLE"
_UNREACHABLE = "SANDBOX::AGENT_UNREACHABLE"
_NOT_YET = "KUBERNETES::POD_IP_NOT_AVAILABLE"


class Network(Struct, frozen=True):
    """What the operator says, and what this server knows of its machine."""

    agent: bool = False
    """Whether new sandboxes get an agent."""
    listens_on: str = "127.0.0.1"
    """`server.host`."""
    eip: str = ""
    host_ip: str = ""
    """`docker.host_ip`, when this server runs in a container; else empty."""
    outbound: str = "127.0.0.1"
    """The machine's own address towards others."""
    public_address: str = ""
    open_proxy: bool = False
    """Whether the proxy lets in callers without a key."""
    wildcard: str = ""
    """The domain, with a port if need be, under which every port of every sandbox has a host; empty = there is none."""


class Asked(Struct, frozen=True):
    """One lookup."""

    port: int
    through_server: bool = False
    host: str = ""
    """The host, and port if any, that the request named."""
    mount: str = ""
    """The prefix that it used: `/v1` or nothing."""
    scheme: str = "http"
    """By which it came. A link, which has one, names it unless the operator names another."""


class Endpoint(Struct, frozen=True):
    """Where the port is, without a scheme, and what to send with every request to it."""

    address: str
    headers: dict[str, str]

    def __repr__(self) -> str:
        """Keep the token out of tracebacks."""
        return f"Endpoint(address={self.address!r}, headers={sorted(self.headers)})"


def is_awaited(sandbox: Sandbox, asked: Asked, network: Network) -> bool:
    """Whether the answer is yet to come: the sandbox is Pending, and what was asked for is not there."""
    if sandbox.phase is not Phase.PENDING or (asked.port == AGENT_PORT and not has_agent(sandbox, network)):
        return False
    return sandbox.address is None or _needs_agent(sandbox, asked.port)


def has_agent(sandbox: Sandbox, network: Network) -> bool:
    """Whether an agent is in it."""
    return addresses.has_agent(sandbox.address, configured=network.agent)


def resolve(sandbox: Sandbox, asked: Asked, network: Network, token: str) -> Endpoint:
    """The endpoint. `token` is the agent's. Not for what `is_awaited`.

    Raises:
        NotFound: the sandbox has ended, or the engine shows no address.
        Conflict: it does not run, or its agent does not answer.
        Unsupported: what was asked for needs an agent, and there is none.
    """
    _check(visible(sandbox, sandbox.id), asked, network)
    headers = {GENERATION_HEADER: str(sandbox.generation)}
    if asked.through_server:
        if network.open_proxy and has_agent(sandbox, network):
            headers[TOKEN_HEADER] = token
        return Endpoint(_through_server(sandbox, asked, network), headers)
    if _needs_agent(sandbox, asked.port):
        headers[TOKEN_HEADER] = token
    return Endpoint(_direct(sandbox, asked.port, network), headers)


def not_yet(sandbox: Sandbox, attempt: Attempt | None) -> Rejected:
    """The one refusal after which clients ask again, with what the sandbox waits for."""
    status = status_of(sandbox, attempt)
    return NotFound(_NOT_YET, f"The sandbox is {status.state} ({status.reason}): {status.message}")


def _check(sandbox: Sandbox, asked: Asked, network: Network) -> None:
    """Whether there is an endpoint."""
    if sandbox.phase in (Phase.FAILED, Phase.TERMINATED):
        status = status_of(sandbox)
        message = f"The sandbox is {status.state} ({status.reason}): {status.message}"
        raise Conflict("DOCKER::SANDBOX_NOT_RUNNING", message)
    if not has_agent(sandbox, network):
        _check_without_agent(sandbox, asked, network)
    if sandbox.address is None:
        raise NotFound(_NOT_YET, "The sandbox runs, and the engine shows no address of it.")
    trouble = sandbox.agent_trouble
    if trouble is not None and trouble.reason not in _ONLY_FROM_HERE and _needs_agent(sandbox, asked.port):
        raise Conflict(_UNREACHABLE, f"The agent cannot be reached ({trouble.reason}): {trouble.message}")


def _check_without_agent(sandbox: Sandbox, asked: Asked, network: Network) -> None:
    if asked.port == AGENT_PORT:
        since = (
            "This sandbox was made without an agent. Create it again."
            if network.agent
            else "This server gives sandboxes no agent. Its operator can set runtime.execd_image."
        )
        raise Unsupported(_NO_AGENT, since)
    if not asked.through_server and sandbox.address is not None and _needs_agent(sandbox, asked.port):
        raise Unsupported(
            _NO_AGENT,
            f"Port {asked.port} is not published, and this sandbox has no agent that leads to it. The operator "
            "can set runtime.execd_image; sandboxes that are created after that have one.",
        )


def _needs_agent(sandbox: Sandbox, port: int) -> bool:
    """Whether the way to this port leads to the agent, or would."""
    address = sandbox.address
    if port == AGENT_PORT or address is None:
        return True
    return address.network != HOST_NETWORK and not (port == HTTP_PORT and str(HTTP_PORT) in address.ports)


def _direct(sandbox: Sandbox, port: int, network: Network) -> str:
    address = sandbox.address
    assert address is not None, "_check refuses a sandbox without an address"
    if address.network == HOST_NETWORK:
        return f"{_host(network, '')}:{port}"
    published = address.ports[str(AGENT_PORT if _needs_agent(sandbox, port) else port)]
    at, _, number = published.rpartition(":")
    path = f"/proxy/{port}" if _needs_agent(sandbox, port) else ""
    return f"{_host(network, at)}:{number}{path}"


def _through_server(sandbox: Sandbox, asked: Asked, network: Network) -> str:
    if network.wildcard:
        return f"{asked.port}-{sandbox.id}.{network.wildcard}"
    chosen = network.public_address or network.eip
    base = _without_scheme(chosen).rstrip("/") if chosen else f"{asked.host}{asked.mount}"
    return f"{base}/sandboxes/{sandbox.id}/proxy/{asked.port}"


def link_url(sandbox: Sandbox, asked: Asked, network: Network, value: str) -> str:
    """The address of a signed link. The scheme is that of `proxy.public_address`, else of `server.eip`, else asked's:
    this server does not see whether TLS ends in front of it.
    """
    scheme = next((one.partition("://")[0] for one in (network.public_address, network.eip) if "://" in one), "")
    return f"{scheme or asked.scheme}://{_through_server(sandbox, asked, network)}/?{LINK_PARAMETER}={value}"


def _host(network: Network, published_on: str) -> str:
    """The table in the module's docstring. `published_on` is empty when nothing is published."""
    if network.eip:
        return _host_of(_without_scheme(network.eip).partition("/")[0])
    everywhere = _is_unspecified(network.listens_on)
    if network.host_ip and (everywhere or _is_loopback(network.listens_on)):
        return _bracketed(network.host_ip)
    if published_on and not _is_unspecified(published_on):
        return _bracketed(published_on)
    return _bracketed(network.outbound if everywhere else network.listens_on)


def _without_scheme(address: str) -> str:
    return address.partition("://")[2] if "://" in address else address


def _host_of(authority: str) -> str:
    """Without a port: the ports of sandboxes are others."""
    if authority.startswith("["):
        return authority.partition("]")[0] + "]"
    return _bracketed(authority) if _ip(authority) is not None else authority.partition(":")[0]


def _bracketed(host: str) -> str:
    return f"[{host}]" if isinstance(_ip(host), IPv6Address) and not host.startswith("[") else host


def _is_unspecified(host: str) -> bool:
    found = _ip(host)
    return found is not None and found.is_unspecified


def _is_loopback(host: str) -> bool:
    found = _ip(host)
    return host.rstrip(".").lower() == "localhost" or (found is not None and found.is_loopback)


@lru_cache(1024)
def _ip(host: str) -> IPv4Address | IPv6Address | None:
    """None: it is a name."""
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None
