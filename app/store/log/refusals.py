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
        sandbox_id=bindparam("sandbox_id", type_=Uuid),
        command=bindparam("command", type_=Text),
        status=bindparam("status", type_=Integer),
        code=bindparam("code", type_=Text),
        message=bindparam("message", type_=Text),
        meta=cast(bindparam("meta", type_=Text), JSONB),
    )
)


class Refusals:
    """Writes refusals."""

    def __init__(self, database: Database) -> None:
        """On an open database."""
        self._database = database

    async def record(
        self,
        tenant: str,
        sandbox_id: UUID | None,
        command: str,
        refusal: tuple[int, str, str],
        meta: Mapping[str, Any],
    ) -> None:
        """`refusal` is (HTTP status, code, message)."""
        status, code, message = refusal
        await self._database.fetch(
            _RECORD,
            tenant=tenant,
            sandbox_id=sandbox_id,
            command=command,
            status=status,
            code=code,
            message=message,
            meta=msgspec.json.encode(meta).decode(),
        )
