"""Who calls, and from where a call may come.

With keys, every request shows one, except on the open paths. A key leads to a `Principal`: the tenant whose sandboxes
it sees, and the actor that its events name. Keys are compared in constant time.

Without keys, anybody who reaches the socket may do everything, and the browser of a developer reaches it too. So:

* `Host` must name the loopback. A page whose name was rebound to 127.0.0.1 still sends its own name.
* A request that acts, and every WebSocket, must not come from a page of another origin: `Origin` names the server
  itself, and `Sec-Fetch-Site` is not `cross-site`. That holds for requests without a body too, which a page may send
  without asking first. Requests from programs have neither header.

An operator who listens beyond the loopback without a key has accepted that anybody may call; then `Host` is free.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Final, TypeAlias

from msgspec import Struct

from app.api.errors import forbidden, unauthorised
from app.domain.stream import Actor, ActorKind
from app.store.vault.seal import Sealer

API_KEY: Final = "open-sandbox-api-key"
DEFAULT_TENANT: Final = "default"
_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class Principal(Struct, frozen=True):
    """Who a request is from."""

    tenant: str
    actor: Actor


Authenticate: TypeAlias = Callable[[str], Principal | None]
"""From the key that was sent to its owner; None when no such key exists."""
ANONYMOUS: Final = Principal(DEFAULT_TENANT, Actor(ActorKind.API_KEY, "anonymous", "anonymous"))


def built_in(api_key: str | None, sealer: Sealer) -> Authenticate | None:
    """The one key of the settings; None when there is none."""
    expected = (api_key or "").strip().encode()
    if not expected:
        return None
    owner = Principal(DEFAULT_TENANT, Actor(ActorKind.API_KEY, sealer.digest(expected, "api-key"), "default"))

    def authenticate(sent: str) -> Principal | None:
        return owner if hmac.compare_digest(sent.encode("latin-1"), expected) else None

    return authenticate


def principal_of(headers: Mapping[str, str], authenticate: Authenticate) -> Principal:
    """The owner of the key in this head.

    Raises:
        Problem: 401.
    """
    key = headers.get(API_KEY)
    if not key:
        raise unauthorised("MISSING_API_KEY", "The header OPEN-SANDBOX-API-KEY is missing.")
    owner = authenticate(key)
    if owner is None:
        raise unauthorised("INVALID_API_KEY", "The API key is not valid.")
    return owner


def check_keyless(headers: Mapping[str, str], method: str, *, loopback_only: bool) -> None:
    """Whether a server without keys may answer this.

    Raises:
        Problem: 403.
    """
    host = headers.get("host", "")
    if loopback_only and host and not _names_loopback(host):
        raise forbidden(
            "SANDLEDGER::HOST_NOT_ALLOWED",
            "Without an API key this server answers only to localhost, 127.0.0.0/8 and [::1] in the header Host. "
            "Call it by one of these, or set server.api_key.",
        )
    if method in _READS:
        return
    origin = headers.get("origin")
    foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
    # A page of one sandbox is of the same site as the host of another.
    if foreign or headers.get("sec-fetch-site") in ("cross-site", "same-site"):
        raise forbidden(
            "SANDLEDGER::ORIGIN_NOT_ALLOWED",
            "Without an API key this server accepts no changes from pages of another origin. Set server.api_key.",
        )


@lru_cache(256)
def _names_loopback(host: str) -> bool:
    name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
