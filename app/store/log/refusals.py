"""Commands that were refused, for the auditor: who asked for what, when, and why not. Append-only like the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Integer, Text, Uuid, bindparam, cast, insert
from sqlalchemy.dialects.postgresql import JSONB

from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.tables import refusals

_RECORD = Statement(
    insert(refusals).values(
        tenant=bindparam("tenant", type_=Text),
        kind=bindparam("kind", type_=Text),
        stream_id=bindparam("stream_id", type_=Uuid),
        command=bindparam("command", type_=Text),
        status=bindparam("status", type_=Integer),
        code=bindparam("code", type_=Text),
        message=bindparam("message", type_=Text),
        meta=cast(bindparam("meta", type_=Text), JSONB),
    )
)


class Refusals:
    """Writes refused commands to the table `refusals`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(
        self,
        tenant: str,
        stream_id: UUID | None,
        command: str,
        refusal: tuple[int, str, str],
        meta: Mapping[str, Any],
        *,
        kind: str = "sandbox",
    ) -> None:
        """`refusal` is (HTTP status, code, message)."""
        status, code, message = refusal
        await self._database.fetch(
            _RECORD,
            tenant=tenant,
            kind=None if stream_id is None else kind,
            stream_id=stream_id,
            command=command,
            status=status,
            code=code,
            message=message,
            meta=msgspec.json.encode(meta).decode(),
        )
