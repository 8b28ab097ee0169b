"""Which tests of the proxy are not run through nginx, and why."""

from __future__ import annotations

CORE: frozenset[str] = frozenset()
EXCEPTIONS: dict[str, str] = {}
