"""Which request an Idempotency-Key belongs to. Rows are written by the append that begins the stream."""

from __future__ import annotations

from uuid import UUID

from msgspec import Struct
from sqlalchemy import Text, bindparam, select

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import idempotency_keys

_K = idempotency_keys.c
_FIND = Statement(
    select(_K.stream_id, _K.fingerprint).where(
        _K.tenant == bindparam("tenant", type_=Text), _K.digest == bindparam("digest", type_=Text)
    )
)


class FirstRequest(Struct, frozen=True):
    """What the first request with a key made."""

    stream_id: UUID
    fingerprint: str


class IdempotencyKeys:
    """Finds the stream that an Idempotency-Key made. Keys are written by the append itself."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, tenant: str, digest: str) -> FirstRequest | None:
        """The first request of this tenant with this key."""
        row = await self._database.fetch_one(_FIND, tenant=tenant, digest=digest)
        return None if row is None else FirstRequest(UUID(int=row["stream_id"].int), row["fingerprint"])
