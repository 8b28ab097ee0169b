"""The token that the agent of one sandbox asks for. It is derived, so nothing stores it.

It depends on the key `token` of the installation, the object and its generation. The token of an old generation so
never fits a new one, and the head row of a sandbox is enough to know it. A rotation of the master key changes no token.
"""

from __future__ import annotations

import hmac
from uuid import UUID

from app.domain.sandbox.address import AGENT_PORT
from app.domain.sandbox.endpoints import TOKEN_HEADER

__all__ = ["AGENT_PORT", "TOKEN_HEADER", "agent_token"]
_PURPOSE = b"agent"


def agent_token(key: bytes, object_id: UUID, generation: int) -> str:
    """The token in lower-case hex. `key` is the key `token` of the installation."""
    message = _PURPOSE + object_id.bytes + generation.to_bytes(8, "big")
    return hmac.digest(key, message, "sha256").hex()
