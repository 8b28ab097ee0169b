"""The write path of engines: the same append as for sandboxes, with another aggregate."""

from __future__ import annotations

from uuid import UUID

import asyncpg
from sqlalchemy import BigInteger, bindparam, func, select

from app.domain.engine import events as ev
from app.domain.engine.decide import LOG_WENT_BACK, Command, Sighting, Trust, begin, decide
from app.domain.engine.state import Engine, EngineState, evolve, stream_of
from app.domain.stream import PLATFORM_TENANT, Meta
from app.errors import SettingsError
from app.service.streams import Draft, advance, decoded, refuse_newer
from app.store.database.statement import Connections, Statement
from app.store.log.append import append, append_statement, create_statement
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from app.store.tables import engines as table
from app.views import engines
from app.views.engines import EnginesView

KIND = ev.REGISTRY.kind
_MAX_POSITION = 2**47
"""The keys of the announced horizon have room for 48 bits."""
_SKIP = Statement(select(func.sandledger.log_skip_to(bindparam("position", type_=BigInteger)).label("position")))
_CREATE = create_statement(KIND, engines.begin)
_MOVE = append_statement(KIND, table, engines.move)


def position_beyond(engine: Engine) -> int | None:
    """The position beyond the log's end that an object on the engine bears. None = the log did not go back."""
    word = engine.trouble.rpartition(" ")[2]
    if engine.state is not EngineState.MISMATCH or not engine.trouble.startswith(f"{LOG_WENT_BACK}:"):
        return None
    return min(int(word), _MAX_POSITION) if word.isascii() and word.isdigit() else None


class Engines:
    """The write path of the engines' streams."""

    def __init__(self, database: Connections, signal: Signal, installation: UUID, view: EnginesView) -> None:
        self._database = database
        self._log = EventLog(database)
        self._signal = signal
        self._installation = installation
        self.view = view

    def stream_id(self, name: str) -> UUID:
        """The id of this engine's stream, whether or not it is registered."""
        return stream_of(self._installation, name)

    async def load(self, name: str) -> Engine | None:
        """The engine as the log knows it now."""
        loaded = await self.view.load(stream_of(self._installation, name))
        return None if loaded is None else loaded[0]

    async def register(self, sighting: Sighting, meta: Meta) -> Engine:
        """First contact; when another server was first, what it registered.

        Whether that is the same engine is the caller's to compare: it has just been reached, so a server whose address
        leads elsewhere must not call it a mismatch for all.
        """
        engine_id = stream_of(self._installation, sighting.name)
        draft = Draft(engine_id, PLATFORM_TENANT, 0, begin(sighting), meta)
        after = advance(evolve, None, draft.recorded())
        encoded = [ev.REGISTRY.encode(event) for event in draft.events]
        try:
            written = await append(
                self._database, _CREATE, engine_id, encoded, after=0, meta=meta, **engines.values(after)
            )
        except asyncpg.UniqueViolationError:
            known = await self.load(sighting.name)
            assert known is not None, "engines are never deleted"
            return known
        assert written is not None, "the guard of a new stream always has its row"
        self._changed(engine_id)
        return advance(evolve, None, draft.recorded(written))

    async def history(self, name: str, *, after: int = 0, limit: int = 1000) -> list[ev.Recorded]:
        """Events of one engine whose version is above `after`, in order."""
        stored = await self._log.history(stream_of(self._installation, name), PLATFORM_TENANT, after=after, limit=limit)
        return [decoded(ev.REGISTRY, one) for one in stored]

    async def execute(self, name: str, command: Command, meta: Meta) -> Engine:
        """Decide and append; the state afterwards.

        A conflict is another server's event, so some server succeeds in every round, and no server is refused.
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

    async def trust(self, name: str, meta: Meta) -> Engine:
        """An operator says that the log, although it went back, is to be followed from here on.

        The log first leaves the positions behind that the objects on the engine bear. So no event gets a position that
        an event of the lost part had, and the objects are no sign of a lost part any more.

        Raises:
            SettingsError: there is no such engine, or its log did not go back.
        """
        engine = await self.load(name)
        if engine is None:
            raise SettingsError(f"no engine named {name} is registered; `sandledger engines ls` shows the names")
        found = position_beyond(engine)
        if found is None:
            raise SettingsError(
                f"engine {name} is {engine.state}{f' ({engine.trouble})' if engine.trouble else ''}; only an engine "
                f"whose trouble is {LOG_WENT_BACK} can be trusted"
            )
        await self._database.fetch(_SKIP, position=found)
        return await self.execute(name, Trust(), meta)

    def _changed(self, engine_id: UUID) -> None:
        self.view.forget()
        self._signal.poke(engine_id, work=False)
