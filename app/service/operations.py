"""The write path of the operations stream. Its first event makes it."""

from __future__ import annotations

from uuid import UUID

import asyncpg
from sqlalchemy import Uuid, bindparam, select

from app.domain.operations import REGISTRY, Event, Operations, evolve
from app.domain.stream import PLATFORM_TENANT, Meta
from app.service.streams import Draft, advance, decoded, refuse_newer
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.append import append, append_statement, create_statement, head_columns, insert_head, update_head
from app.store.log.store import EventLog
from app.store.tables import operations as table

_HEAD = (table.c.version, table.c.schema)
_CREATE = create_statement(REGISTRY.kind, insert_head(table, lambda _parts: head_columns(_HEAD)))
_MOVE = append_statement(REGISTRY.kind, table, update_head(table, lambda _parts: head_columns(_HEAD)))
_LOAD = Statement(select(table).where(table.c.id == bindparam("id", type_=Uuid)))


class OperationsLog:
    """The operations stream of one installation: acts of administrators, and what they led to."""

    def __init__(self, database: Database, installation: UUID) -> None:
        self._database = database
        self._id = installation

    async def record(self, event: Event, meta: Meta) -> Operations:
        """Append, after whatever others append meanwhile: a conflict is another one's event, so the rounds end."""
        while True:
            before = await self._load()
            if before is not None:
                refuse_newer(REGISTRY.kind, self._id, before.schema, REGISTRY)
            draft = Draft(self._id, PLATFORM_TENANT, before.version if before else 0, (event,), meta)
            after = advance(evolve, before, draft.recorded())
            try:
                written = await append(
                    self._database,
                    _CREATE if before is None else _MOVE,
                    self._id,
                    [REGISTRY.encode(event)],
                    after=draft.after,
                    meta=meta,
                    tenant=PLATFORM_TENANT,
                    expected=draft.after,
                    version=after.version,
                    schema=after.schema,
                )
            except asyncpg.UniqueViolationError:
                continue
            if written is not None:
                return advance(evolve, before, draft.recorded(written))

    async def replaced_master_keys(self) -> set[str]:
        """Ids of the master keys that a recorded rotation took out of use, or is taking out of use."""
        stored = EventLog(self._database).whole_history(self._id, PLATFORM_TENANT)
        return {decoded(REGISTRY, one).event.old_key_id async for one in stored}

    async def _load(self) -> Operations | None:
        row = await self._database.fetch_one(_LOAD, id=self._id)
        if row is None:
            return None
        return Operations(UUID(int=row["id"].int), row["tenant"], row["version"], row["position"], row["schema"])
