"""What all aggregates share: who did something, and how an event is stored and read.

An aggregate has a registry: its event types by their wire names. Rules of change (the catalogue of events, part 1):

* A type never changes its meaning. A new field with a default needs no new schema number; an older reader ignores it.
* Anything else raises `Registry.revision` by one and gives the changed or new type that number as its schema. A changed
  type also gets one pure function in `upcasts`, from the payload of the old number to that of the next one. Upcasts are
  chained, and run before msgspec converts.
* So the schema number of an event says which revision of the registry can read it. The head row keeps the highest
  number of its stream; a server with a lower revision leaves such a stream alone instead of counting failures.
* A field that has its default is left out, and an instant is UTC with six digits. No payload holds a float or an
  integer beyond 2^53. So one event has one text, and the stored bytes do not depend on a printer
  (`app.domain.canonical`).
* Lists of words (kinds of actors, causes of ends, reasons, capabilities) are open. Their fields are text in the
  structs: a word that this version does not know is kept and shown. Only an unknown type stops a reader.

Golden files in `tests/golden` hold one stored payload for each (type, schema).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import UUID

import msgspec
from msgspec import Struct

from app.domain.canonical import canonical
from app.errors import UnknownEvent

E = TypeVar("E")
Payload: TypeAlias = dict[str, Any]
Upcast: TypeAlias = Callable[[Payload], Payload]

PLATFORM_TENANT = "_platform"
"""The tenant of streams that belong to the installation. A tenant's own slug never begins with an underscore."""


class ActorKind(StrEnum):
    """Who can make something happen (decision 9)."""

    API_KEY = "api_key"
    TIMER = "timer"
    RECONCILER = "reconciler"
    RUNTIME = "runtime"
    OPERATOR = "operator"
    PROXY = "proxy"


class Actor(Struct, frozen=True, omit_defaults=True):
    """Who did it. `id` is stable (a key's digest, a worker's id), `name` is for people."""

    kind: str
    """An `ActorKind`, or a word of a newer version."""
    id: str
    name: str

    def __str__(self) -> str:
        """`api_key default`, for messages."""
        return f"{self.kind} {self.name}"


class Meta(Struct, frozen=True, omit_defaults=True):
    """Who and what led to an event; stored beside each, in the log for ever."""

    actor: Actor
    app_version: str
    request_id: str | None = None
    cause: int | None = None
    """Position of the event that led here."""
    client: str | None = None
    """Client address, for API actors."""
    idempotency_key: str | None = None
    """SHA-256 of the key, so that an auditor can match a client's own record."""
    trace: str | None = None
    """Reserved: the trace that the request belongs to (W3C traceparent)."""


class Recorded(Struct, Generic[E], frozen=True):
    """An event as the log stores it."""

    position: int
    stream_id: UUID
    tenant: str
    version: int
    at: datetime
    """`recorded_at`, the database's clock."""
    event: E
    meta: Meta
    schema: int | None = None
    """The number that it was stored with, which an upcast may have left behind. None: it is not stored yet."""


class Encoded(Struct, frozen=True):
    """An event as the append takes it."""

    type: str
    schema: int
    data: msgspec.Raw


_decode_meta = msgspec.json.Decoder(Meta).decode
_encode = msgspec.json.Encoder(order="deterministic").encode


class Registry(Generic[E]):
    """The event types of one aggregate. Immutable."""

    def __init__(
        self,
        kind: str,
        types: Mapping[str, type[E]],
        *,
        revision: int = 1,
        schemas: Mapping[str, int] | None = None,
        upcasts: Mapping[tuple[str, int], Upcast] | None = None,
    ) -> None:
        """`types` by wire name. `schemas` names the types whose schema number is not 1."""
        self.kind = kind
        self.revision = revision
        """The highest schema number that this version can read."""
        self.types = dict(types)
        self.schemas = {name: (schemas or {}).get(name, 1) for name in types}
        self.upcasts = dict(upcasts or {})
        self._names = {cls: name for name, cls in types.items()}
        self._decoders = {name: msgspec.json.Decoder(cls).decode for name, cls in types.items()}

    def name_of(self, event: E | type[E]) -> str:
        """The stable type name, e.g. `sandbox.requested`."""
        return self._names[event if isinstance(event, type) else type(event)]

    def schema_of(self, recorded: Recorded[E]) -> int:
        """The number that it was stored with, or will be."""
        return recorded.schema or self.schemas[self.name_of(recorded.event)]

    def encode(self, event: E) -> Encoded:
        """Name, schema number and payload. The same event is always the same bytes.

        Raises:
            ValueError: an integer beyond 2^53, or an instant without a time zone; a bug, so nothing is stored.
        """
        name = self.name_of(event)
        return Encoded(name, self.schemas[name], msgspec.Raw(_encode(canonical(event))))

    def decode(self, type_: str, schema: int, data: str | bytes) -> E:
        """Read a stored payload of any schema number up to the current one.

        Raises:
            UnknownEvent: a newer version wrote it, or the payload does not read. It is never skipped.
        """
        newest = self.schemas.get(type_)
        if newest is None or not 0 < schema <= newest:
            raise UnknownEvent(
                f"event {type_} schema {schema} was written by a newer version; upgrade this server first"
            )
        try:
            if schema == newest:
                return self._decoders[type_](data)
            return msgspec.convert(self._raised(type_, schema, newest, msgspec.json.decode(data)), self.types[type_])
        except msgspec.DecodeError as error:
            raise UnknownEvent(f"event {type_} schema {schema} does not read: {error}") from error

    def _raised(self, type_: str, schema: int, newest: int, data: Payload) -> Payload:
        for number in range(schema, newest):
            upcast = self.upcasts.get((type_, number))
            data = data if upcast is None else upcast(data)
        return data


def read_meta(stored: str | bytes) -> Meta:
    """The `meta` column.

    Raises:
        UnknownEvent: it has not the shape that this version knows.
    """
    try:
        return _decode_meta(stored)
    except msgspec.DecodeError as error:
        raise UnknownEvent(f"meta of an event does not read: {error}; upgrade this server first") from error
