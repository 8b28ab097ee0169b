"""Who may send a request to a port of a sandbox. Pure: of the head row, what the request shows, and the time.

A key, and a server that asks for none, give a tenant; whose the sandbox is, is then seen when its row is read. A link
gives no tenant. It holds for the sandbox of the row, whosever that is:

============================================ ==================================
the value                                    answer
============================================ ==================================
another port, a changed character, revoked,  401 PROXY::LINK_INVALID
no such sandbox, another installation's
its time is over                             401 PROXY::LINK_EXPIRED
the sandbox has another object now           410 SANDBOX::ENDPOINT_REPLACED
the sandbox has ended                        the same
any, to a port that controls the sandbox     403 PROXY::PORT_NOT_ALLOWED
in a cookie, sent for another page           403 PROXY::ORIGIN_NOT_ALLOWED
============================================ ==================================

Whatever the value is, a stranger learns nothing of a sandbox: what is said about it is said to those only who had a
link to it.

**A browser sends a cookie for any page that asks it to.** So a request with a cookie must come from the page's own
origin or from one that the operator allows. `SameSite=Lax` is not enough: the pages of all sandboxes are of one site.
With a plain GET a browser sends no `Origin`. `Sec-Fetch-Site` tells it then, and only a navigation may come from
elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Final, TypeAlias

from msgspec import Struct

from app.domain.sandbox.links import Link, LinkKey, Sent, check_port, milliseconds, present, read
from app.domain.sandbox.state import Sandbox
from app.errors import Forbidden
from app.proxy.refusals import Refusal, link_expired, link_invalid, origin_not_allowed, replaced

_EARLIER: Final = 16
"""Generations for which a link is looked for, to say that the sandbox was made again."""
_ELSEWHERE: Final = ("cross-site", "same-site")


class ByKey(Struct, frozen=True):
    """A request with a key, or to a server that asks for none."""

    tenant: str


class ByLinks(Struct, frozen=True):
    """A request with links that may hold."""

    links: tuple[Sent, ...]
    is_first_visit: bool
    """Whether they stand in the query."""


Credentials: TypeAlias = ByKey | ByLinks


class Admitted(Struct, frozen=True):
    """Who may."""

    tenant: str
    link: Link | None = None
    """By which; None = by a key, or without one."""
    value: str = ""
    """Of that link."""

    def __repr__(self) -> str:
        """Keep the link out of logs and tracebacks."""
        return f"Admitted({self.tenant!r}, {self.link!r})"


def by_links(values: Collection[str], port: int | None, key: LinkKey | None, *, is_first_visit: bool) -> ByLinks:
    """What these values are worth before any row is read.

    Raises:
        Refusal: nothing.
    """
    if port is not None:
        try:
            check_port(port)
        except Forbidden as error:
            raise Refusal(403, error.code, error.message) from None
    sent = [found for value in values if (found := read(value)) is not None and key is not None]
    known = tuple(one for one in sent if key is not None and one.key_id == key.id)
    if not known:
        raise link_invalid()
    return ByLinks(known, is_first_visit)


def admit(sandbox: Sandbox | None, port: int, shown: ByLinks, key: LinkKey, now: datetime) -> Admitted:
    """Who may, by a link. `sandbox` is the row, whosever it is; None = there is none.

    Raises:
        Refusal: none of the links holds.
    """
    if sandbox is None:
        raise link_invalid()
    best = min((_held(sandbox, port, sent, key, now) for sent in shown.links), key=_rank)
    if isinstance(best, Refusal):
        raise best
    return best


def _rank(found: Admitted | Refusal) -> int:
    """The best of several: what holds, else what says most."""
    return 0 if isinstance(found, Admitted) else {410: 1, 401: 2}[found.status] + (found.code == "PROXY::LINK_INVALID")


def _held(sandbox: Sandbox, port: int, sent: Sent, key: LinkKey, now: datetime) -> Admitted | Refusal:
    current = present(sandbox, port, sent.expiry_ms)
    link = next((one for one in (current, *_before(current)) if key.signed(one, sent)), None)
    if link is None:
        return link_invalid()
    if sandbox.ending is not None:
        return replaced("The sandbox of this link has ended.")
    if link is not current:
        return replaced("The sandbox has been made again since this link was made; ask for a new one.")
    if sent.expiry_ms <= milliseconds(now):
        return link_expired()
    return Admitted(sandbox.tenant, link, key.sign(link))


def _before(link: Link) -> list[Link]:
    """The same for earlier objects of the sandbox."""
    earliest = max(1, link.generation - _EARLIER)
    return [
        Link(link.sandbox_id, link.port, one, link.number, link.expiry_ms) for one in range(earliest, link.generation)
    ]


def check_page(headers: Mapping[str, str], allowed: Collection[str]) -> None:
    """Whether a request with a cookie comes from a page that may send it. `headers` by their names in lower case.

    Raises:
        Refusal: 403.
    """
    origin = headers.get("origin")
    if origin is None:
        if headers.get("sec-fetch-site") in _ELSEWHERE and headers.get("sec-fetch-mode") != "navigate":
            raise origin_not_allowed()
        return
    own = headers.get("host", "").lower()
    if (not own or origin.partition("://")[2].lower() != own) and origin.lower() not in allowed:
        raise origin_not_allowed()
