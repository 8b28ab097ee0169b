"""The error tree. Raised in the core and at the seams. `app.api.errors` gives each its HTTP status, not this module.

::

    SandledgerError
    ├── Rejected                 a command was refused; carries a wire code; becomes a refusal record
    │   ├── Invalid              the request breaks a rule
    │   ├── Forbidden            nobody may do that in this way
    │   ├── NotFound             no such sandbox for this tenant, or it has ended
    │   ├── Conflict             the sandbox is not in a state that allows it
    │   ├── PreconditionFailed   If-Match names another version
    │   ├── KeyReused            Idempotency-Key seen with another body
    │   ├── CursorExpired        the log was restored since the cursor was given out
    │   └── Unsupported          part of the contract that is not served yet, or not by this engine
    ├── RuntimeFault             the engine side
    │   ├── RuntimeUnavailable   cannot be reached or answers 5xx: retried, never counted, never a verdict
    │   └── RuntimeRejected      the engine's final word on this workload: the sandbox fails with this reason
    ├── StoreUnavailable         PostgreSQL cannot be reached, or may not write
    │   ├── StoreBusy            every connection of this process is in use
    │   ├── KeyRetired           the database takes nothing sealed by this server's master key: it is out of use
    │   └── StoreRefused         PostgreSQL answers and refuses: waiting does not help
    ├── IllegalTransition        an event that the declared table does not allow; a bug, never appended
    ├── UnknownEvent             a stored event this version cannot read; reading stops loudly
    └── SettingsError            configuration; the message names file, key, value and what is allowed
"""

from __future__ import annotations

from uuid import UUID


class SandledgerError(Exception):
    """Base of everything this project raises on purpose."""


class Rejected(SandledgerError):
    """A command was refused. `code` is the wire code, `message` is for people and never repeats secret input."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class Invalid(Rejected):
    """The request breaks a rule of the contract."""


class Forbidden(Rejected):
    """Nobody may do that in this way, whatever the state."""


class NotFound(Rejected):
    """No such sandbox for this tenant, or it has ended; the message then says when and why."""


class Conflict(Rejected):
    """The sandbox is not in a state that allows the command."""


class PreconditionFailed(Rejected):
    """`If-Match` names another version (RFC 9110, section 13.1.1)."""


class KeyReused(Rejected):
    """The `Idempotency-Key` was used before with a different body. `stream_id` is what the first request made."""

    def __init__(self, code: str, message: str, stream_id: UUID) -> None:
        super().__init__(code, message)
        self.stream_id = stream_id


class CursorExpired(Rejected):
    """A cursor belongs to another epoch of the log. The reader has to begin again."""


class Unsupported(Rejected):
    """Known to the contract but not served, or not by this engine."""


class RuntimeFault(SandledgerError):
    """Anything a driver raises on purpose."""


class RuntimeUnavailable(RuntimeFault):
    """The engine cannot be reached or is failing. Says nothing about any sandbox; retried without counting."""

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        """`retry_after` in seconds, when the engine said so."""
        super().__init__(message)
        self.retry_after = retry_after


class RuntimeRejected(RuntimeFault):
    """The engine's final word on a workload.

    `reason` is a stable upper-case word such as `IMAGE_NOT_FOUND`, `message` names the real cause.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


class StoreUnavailable(SandledgerError):
    """PostgreSQL cannot be reached, or may not write."""


class StoreBusy(StoreUnavailable):
    """Every connection of this process is in use. PostgreSQL is well."""


class KeyRetired(StoreUnavailable):
    """PostgreSQL does not take values that this server sealed: its master key is not in use any more."""


class StoreRefused(StoreUnavailable):
    """PostgreSQL answers and refuses: the login, the database or the schema is wrong. Waiting does not help."""


class IllegalTransition(SandledgerError):
    """An event that the declared transition table does not allow from the present state."""


class UnknownEvent(SandledgerError):
    """A stored event has a type or schema number that this version cannot read."""


class SettingsError(SandledgerError):
    """A setting is wrong. The message names file, key, value and what is allowed."""
