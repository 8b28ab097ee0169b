"""What other machines can reach: the start-up guard, and where ports of sandboxes are published.

A server without a key must not be reachable from other machines by accident. Fails closed: a name that does not
resolve, or resolves to one address that is not loopback, counts as exposed.
"""

from __future__ import annotations

import ipaddress
import socket

from app.errors import SettingsError
from app.settings.schema import Settings

_LOOPBACK = "127.0.0.1"
_ANYWHERE = "0.0.0.0"  # noqa: S104 - the operator asked for it


def check_exposure(settings: Settings) -> None:
    """SettingsError when the server would listen beyond loopback without a key and the operator has not accepted
    that.
    """
    server = settings.server
    if server.api_key or server.insecure or is_loopback(server.host):
        return
    raise SettingsError(
        f'server.host = "{server.host}" is reachable from other machines (or does not resolve) and no API key is set.'
        " Set server.api_key or OPENSANDBOX_SERVER_API_KEY, or accept a server that anyone can use with"
        ' OPENSANDBOX_INSECURE_SERVER=YES, or listen on "127.0.0.1".'
    )


def publish_host(settings: Settings) -> str:
    """The IP address on which ports of sandboxes are published: the operator's, else the loopback unless the server
    itself listens wider. May ask the resolver, because engines take no names.

    Raises:
        SettingsError: the name does not resolve.
    """
    key, host = "docker.publish_host", settings.docker.publish_host
    if not host:
        if is_loopback(settings.server.host):
            return _LOOPBACK
        key, host = "server.host", settings.server.host
    if host == "::":
        # The engine takes it for IPv6 only; a socket of ours takes both kinds there.
        return _ANYWHERE
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        raise SettingsError(
            f'{key} = "{host}" does not resolve to an IPv4 address, so ports of sandboxes cannot be published there;'
            " set docker.publish_host to an address of the engine's machine"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether every address a listener on `host` would bind is loopback. May ask the resolver."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return _loopback_address(host)
    except ValueError:
        pass
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(answers) and all(_loopback_address(str(address[0])) for *_, address in answers)


def _loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
