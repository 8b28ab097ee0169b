"""Events, and sandboxes without an object, as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final

import msgspec

from app.domain.sandbox.state import Sandbox
from app.domain.sandbox.status import status_of
from app.domain.stream import read_meta
from app.domain.text import printable
from app.store.log.store import StoredEvent

_SHOWN: Final = (
    "step",
    "reason",
    "message",
    "exit_code",
    "oom",
    "end_cause",
    "run",
    "attempt",
    "after_ms",
    "engine",
    "expires_at",
)
"""Fields of payloads that say why. The others are in the history."""
_PREFIX: Final = "sandbox."


def events_text(sandbox: Sandbox, stored: Sequence[StoredEvent]) -> str:
    """One line an event, oldest first, below the state."""
    status = status_of(sandbox)
    head = f"State:      {status.state.value} ({status.reason}) since {_instant(status.last_transition_at)}"
    return "\n".join([printable(head), *map(_line, stored)])


def _line(stored: StoredEvent) -> str:
    data: dict[str, Any] = msgspec.json.decode(stored.data)
    details = " ".join(f"{name}={data[name]}" for name in _SHOWN if name in data)
    actor = read_meta(stored.meta).actor
    name = stored.type.removeprefix(_PREFIX)
    return printable(f"{_instant(stored.recorded_at)} {name} by {actor.kind} {actor.name} {details}".rstrip())


def no_object_text(sandbox: Sandbox) -> str:
    """Of a sandbox that its engine has nothing of, and of whose end nothing is kept."""
    return "\n".join(map(printable, _no_object(sandbox)))


def _no_object(sandbox: Sandbox) -> Iterator[str]:
    status = status_of(sandbox)
    yield "Container ID:   N/A"
    yield f"Image:          {sandbox.spec.image}"
    yield f"Status:         {status.state.value} ({status.reason})"
    yield f"Message:        {status.message}"


def _instant(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")
