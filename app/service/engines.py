"""The write path of engines: the same append as for sandboxes, with another aggregate."""

from __future__ import annotations

from uuid import UUID

import asyncpg

from app.domain.engine import events as ev
from app.domain.engine.decide import Command, RecordSighting, Sighting, begin, decide
from app.domain.engine.state import Engine, evolve, stream_of
from app.domain.stream import PLATFORM_TENANT, Meta
from app.service.streams import Draft, advance, refuse_newer
from app.store.database.pool import Database
from app.store.log.append import append, append_statement, create_statement
from app.store.log.signal import Signal
from app.store.tables import engines as table
from app.views import engines
from app.views.engines import EnginesView

KIND = ev.REGISTRY.kind
_CREATE = create_statement(KIND, engines.begin)
_MOVE = append_statement(KIND, table, engines.move)


class Engines:
    """Commands about engines."""

    def __init__(self, database: Database, signal: Signal, installation: UUID, view: EnginesView) -> None:
        """On an open database."""
        self._database = database
        self._signal = signal
        self._installation = installation
        self.view = view

    async def load(self, name: str) -> Engine | None:
        """The engine as the log knows it now."""
        loaded = await self.view.load(stream_of(self._installation, name))
        return None if loaded is None else loaded[0]

    async def register(self, sighting: Sighting, meta: Meta) -> Engine:
        """First contact; when another server was first, compare with what it registered."""
        engine_id = stream_of(self._installation, sighting.name)
        draft = Draft(engine_id, PLATFORM_TENANT, 0, begin(sighting), meta)
        after = advance(evolve, None, draft.recorded())
        encoded = [ev.REGISTRY.encode(event) for event in draft.events]
        try:
            written = await append(
                self._database, _CREATE, engine_id, encoded, after=0, meta=meta, **engines.values(after)
            )
        except asyncpg.UniqueViolationError:
            return await self.execute(sighting.name, RecordSighting(sighting), meta)
        assert written is not None, "the guard of a new stream always has its row"
        self._changed(engine_id)
        return advance(evolve, None, draft.recorded(written))

    async def execute(self, name: str, command: Command, meta: Meta) -> Engine:
        """Decide and append; the state afterwards.

        A conflict is another server's event, so every round brings somebody forward, and nobody is refused.
        """
        engine_id = stream_of(self._installation, name)
        while True:
            loaded = await self.view.load(engine_id)
            if loaded is None:
                msg = f"engine {name} is not registered"
                raise LookupError(msg)
            before, now = loaded
            events = decide(before, command, now)
            if not events:
                return before
            refuse_newer(KIND, engine_id, before.schema, ev.REGISTRY)
            draft = Draft(engine_id, PLATFORM_TENANT, before.version, events, meta, now)
            after = advance(evolve, before, draft.recorded())
            written = await append(
                self._database,
                _MOVE,
                engine_id,
                [ev.REGISTRY.encode(event) for event in events],
                after=before.version,
                meta=meta,
                expected=before.version,
                state_moved=after.state is not before.state,
                **engines.values(after),
            )
            if written is not None:
                self._changed(engine_id)
                return advance(evolve, before, draft.recorded(written))

    def _changed(self, engine_id: UUID) -> None:
        self.view.forget()
        self._signal.poke(engine_id, work=False)
