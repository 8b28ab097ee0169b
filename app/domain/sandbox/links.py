"""Signed links: who has one reaches one port of one sandbox, without a key, until its time. Pure.

A link is for browsers, which cannot send a key. Its value is

    v1.<key id>.<expiry>.<MAC>

* **key id**: names the installation's key `link`, and does not give it away. A value of another installation is told
  from a changed one without a look into the database.
* **expiry**: milliseconds since 1970, by the database's clock.
* **MAC**: 128 bits of HMAC-SHA256 over sandbox, port, generation, link number and expiry, as 32 hexadecimal digits.

Nothing of it is stored. Generation and link number are those of the head row, so a link ends when the sandbox gets
another object, and all links of a sandbox end when its link number is raised. The key outlives restarts, and a rotation
of the master key does not change it.

Values are compared as text and in constant time, and each has one spelling only.
"""

from __future__ import annotations

import hmac
import re
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID, uuid5

from msgspec import Struct

from app.domain.sandbox.address import AGENT_PORT, EGRESS_PORT
from app.domain.sandbox.state import Sandbox
from app.errors import Forbidden

LONGEST_SECONDS: Final = 7 * 24 * 3600
PRIVATE_PORTS: Final = frozenset((AGENT_PORT, EGRESS_PORT))
"""Of the agent and of the sidecar. They control the sandbox, and no link leads to them."""
LINK_PARAMETER: Final = "sandledger_link"
"""The name of a link's value in the query of its address."""
_VERSION: Final = "v1"
_VALUE: Final = re.compile(r"v1\.([0-9a-f]{8})\.([1-9][0-9]{0,13})\.([0-9a-f]{32})")
_MAC_DIGITS: Final = 32
_KEY_ID_DIGITS: Final = 8
_MILLISECOND: Final = timedelta(milliseconds=1)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class LinkKey(Struct, frozen=True):
    """The key `link` of the installation."""

    secret: bytes

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return "LinkKey(***)"

    @property
    def id(self) -> str:
        """What names it in a value."""
        return self._mac("sandledger-link-key")[:_KEY_ID_DIGITS]

    def _mac(self, text: str) -> str:
        return hmac.digest(self.secret, text.encode(), "sha256").hex()

    def sign(self, link: Link) -> str:
        """The value of a link. It is the only secret of it."""
        return f"{_VERSION}.{self.id}.{link.expiry_ms}.{self._mac(link.text)[:_MAC_DIGITS]}"

    def signed(self, link: Link, sent: Sent) -> bool:
        """Whether this value is the link's. In constant time."""
        return hmac.compare_digest(self._mac(link.text)[:_MAC_DIGITS], sent.mac)


class Link(Struct, frozen=True):
    """What a link is for."""

    sandbox_id: UUID
    port: int
    generation: int
    number: int
    """The sandbox's link number when it was made."""
    expiry_ms: int

    @property
    def text(self) -> str:
        """What is signed: five words, each of which has one spelling and no space."""
        return f"sandledger-link {self.sandbox_id} {self.port} {self.generation} {self.number} {self.expiry_ms}"

    @property
    def id(self) -> UUID:
        """Its name in the log. It follows from what the link is for, and says nothing about the value."""
        return uuid5(self.sandbox_id, f"{self.port} {self.generation} {self.number} {self.expiry_ms}")

    @property
    def expires_at(self) -> datetime:
        """When it ends."""
        return instant_of(self.expiry_ms)


def present(sandbox: Sandbox, port: int, expiry_ms: int) -> Link:
    """A link to this port of the sandbox, as it would be made now."""
    return Link(sandbox.id, port, sandbox.generation, sandbox.link_number, expiry_ms)


class Sent(Struct, frozen=True):
    """A value that somebody sent, well-formed and not yet believed."""

    key_id: str
    expiry_ms: int
    mac: str

    def __repr__(self) -> str:
        """Keep the value out of logs and tracebacks."""
        return f"Sent(expiry_ms={self.expiry_ms})"


def check_port(port: int) -> None:
    """Whether a link may lead to it.

    Raises:
        Forbidden: it is the agent's or the sidecar's.
    """
    if port in PRIVATE_PORTS:
        raise Forbidden(
            "PROXY::PORT_NOT_ALLOWED",
            f"Port {port} controls the sandbox, and no link leads to it. Send an API key with the request instead.",
        )


def read(value: str) -> Sent | None:
    """None = it is no link."""
    found = _VALUE.fullmatch(value)
    return None if found is None else Sent(found[1], int(found[2]), found[3])


def milliseconds(at: datetime) -> int:
    """Since 1970, rounded down."""
    return (at - _EPOCH) // _MILLISECOND


def instant_of(expiry_ms: int) -> datetime:
    """The same the other way round."""
    return _EPOCH + expiry_ms * _MILLISECOND
