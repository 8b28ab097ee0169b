"""Workers that cannot use their engines, as they say themselves.

An engine that was never reached has no stream, since an engine is registered at its first contact. So this is the only
place where others can read that a worker is there and why it does nothing. A worker that can use its engine has no row.

**How it fails.** A worker that was killed leaves its row, which counts for `SAID_SECONDS` and is then deleted by any
worker. Without a database nothing is said; then nobody can read either.
"""

from __future__ import annotations

from sqlalchemy import Double, Text, bindparam, delete, func
from sqlalchemy.dialects.postgresql import insert

from app.domain.text import storable
from app.store.database.statement import Connections, Statement
from app.store.database.times import SECOND
from app.store.tables import stations

SAID_SECONDS = 30.0
"""For how long a row counts after it was written."""
_W = stations.c
_NOW = func.clock_timestamp()
_KEY = (_W.worker_id == bindparam("worker_id", type_=Text)) & (_W.engine == bindparam("engine", type_=Text))
_ROW = insert(stations).values(
    worker_id=bindparam("worker_id", type_=Text),
    engine=bindparam("engine", type_=Text),
    name=bindparam("name", type_=Text),
    trouble=bindparam("trouble", type_=Text),
    since=_NOW,
    said_at=_NOW,
)
_SAY = Statement(
    _ROW.on_conflict_do_update(
        index_elements=[_W.worker_id, _W.engine],
        set_={"name": _ROW.excluded.name, "trouble": _ROW.excluded.trouble, "said_at": _ROW.excluded.said_at},
    )
)
_CLEAR = Statement(delete(stations).where(_KEY))
_PURGE = Statement(
    delete(stations).where(_W.said_at < _NOW - bindparam("last_s", type_=Double) * SECOND).returning(_W.worker_id)
)


class Stations:
    """The row of one worker."""

    def __init__(self, connections: Connections, worker_id: str, name: str, engine: str) -> None:
        """`name` is for people."""
        self._connections = connections
        self._key = {"worker_id": worker_id, "engine": engine}
        self._name = name
        self._said = False

    async def say(self, trouble: str | None) -> None:
        """Why the engine cannot be used, again and again; None = it can.

        Raises:
            StoreUnavailable: nobody can read it either.
        """
        if trouble is not None:
            self._said = True
            await self._connections.fetch(_SAY, **self._key, name=self._name, trouble=storable(trouble))
        elif self._said:
            await self._connections.fetch(_CLEAR, **self._key)
            self._said = False
        await self._connections.fetch(_PURGE, last_s=SAID_SECONDS)
