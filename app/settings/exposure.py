"""The start-up guard: a server without a key must not be reachable from other machines by accident.

Fails closed: a name that does not resolve, or resolves to one address that is not loopback, counts as exposed.
"""

from __future__ import annotations

import ipaddress
import socket

from app.errors import SettingsError
from app.settings.schema import Settings


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
