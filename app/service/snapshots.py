"""The write path of snapshots: the same append as for sandboxes, with another aggregate.

Requests for snapshots of one sandbox are taken one after the other, so that the bound on their number is exact.
A delete and a create from the snapshot exclude each other. The create reads the row with a shared lock in the
transaction of its append (`app.service.sandboxes`), the delete takes the row for itself before it looks for users.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.decide import unknown as unknown_sandbox
from app.domain.sandbox.decide import visible as visible_sandbox
from app.domain.snapshot import events as ev
from app.domain.snapshot.decide import Command, Delete, begin, changes, decide, restorable, unknown, visible
from app.domain.snapshot.state import Snapshot, SnapshotState, evolve
from app.domain.stream import Meta
from app.domain.tenants import AnyTenant
from app.errors import Unsupported
from app.service.streams import UNSET, Draft, advance, refuse_newer
from app.store.database.pool import Database
from app.store.database.statement import Executor, Statement
from app.store.deadlines import effects as deadlines
from app.store.log.append import append, append_statement, create_statement
from app.store.log.signal import Signal
from app.store.queue import effects as queue
from app.store.tables import snapshots as table
from app.views import snapshots
from app.views.current import CurrentView
from app.views.engines import EnginesView
from app.views.snapshots import SnapshotsView

KIND = ev.REGISTRY.kind
_CREATE = create_statement(KIND, snapshots.begin, [queue.touch, deadlines.set_deadlines])
_ASKS_FOR_WORK = (ev.Failed, ev.DeleteRequested, ev.Requested)
"""Events after which a reconciler has something to do that it is not doing already."""


@cache
def _move(*, touch: bool, clears: bool) -> Statement:
    effects = [*([queue.touch] if touch else []), *([deadlines.clear_deadlines] if clears else [])]
    return append_statement(KIND, table, snapshots.move, effects)


class SnapshotOutcome(Struct, frozen=True):
    """The result of a command."""

    snapshot: Snapshot
    events: tuple[ev.Event, ...] = ()
    position: int | None = None
    """Of the last event appended; None when there was nothing to append."""


class Snapshots:
    """The write path of the snapshots' streams."""

    def __init__(self, database: Database, signal: Signal, limits: Limits, engines: EnginesView) -> None:
        self._database = database
        self._signal = signal
        self._limits = limits
        self._sources = CurrentView(database)
        self._engines = engines
        self.view = SnapshotsView(database)

    async def create(
        self, snapshot_id: UUID, tenant: str, sandbox_id: UUID, name: str | None, meta: Meta
    ) -> SnapshotOutcome:
        """Begin a snapshot of a Running sandbox.

        Raises:
            NotFound: this tenant has no such sandbox.
            Conflict: it is not Running, or too many of it are Creating.
            Unsupported: its engine cannot make snapshots.
        """
        loaded = await self._sources.load(sandbox_id, tenant)
        if loaded is None:
            raise unknown_sandbox(sandbox_id)
        source = visible_sandbox(loaded[0], sandbox_id)
        begin(source, name)  # most refusals need no connection of their own
        await self._check_abilities(source.engine)
        async with self._database.transaction() as connection:
            events = begin(source, name, await snapshots.creating_of(connection, sandbox_id))
            draft = Draft(snapshot_id, tenant, 0, events, meta)
            after = advance(evolve, None, draft.recorded())
            written = await append(
                connection,
                _CREATE,
                snapshot_id,
                [ev.REGISTRY.encode(event) for event in events],
                after=0,
                meta=meta,
                engine_queue=after.engine,
                **deadlines.parameters(changes(None, after, self._limits)),
                **snapshots.values(after),
            )
        assert written is not None, "the guard of a new stream always has its row"
        self._signal.poke(snapshot_id, work=True)
        return SnapshotOutcome(advance(evolve, None, draft.recorded(written)), events, written.position)

    async def restorable(self, snapshot_id: UUID, tenant: str) -> Snapshot:
        """The snapshot that a sandbox can be made from now.

        Raises:
            NotFound, Conflict: it is not there, not Ready, or without its image.
        """
        loaded = await self.view.load(snapshot_id, tenant)
        snapshot = visible(None if loaded is None else loaded[0], snapshot_id)
        restorable(snapshot)
        return snapshot

    async def execute(
        self, snapshot_id: UUID, tenant: str | AnyTenant, command: Command, meta: Meta
    ) -> SnapshotOutcome:
        """Decide and append. A snapshot of another tenant does not exist.

        A conflict is another writer's event, so some writer succeeds in every round.

        Raises:
            Rejected: the core refuses.
            UnknownEvent: a newer version wrote to the stream.
        """
        while True:
            loaded = await self.view.load(snapshot_id, tenant)
            if loaded is None:
                raise unknown(snapshot_id)
            outcome = await self._try(self._database, *loaded, command, meta)
            if outcome is not None:
                return self._told(outcome)

    async def delete(self, snapshot_id: UUID, tenant: str, meta: Meta) -> SnapshotOutcome:
        """Have it deleted, unless something uses it.

        Raises:
            NotFound: this tenant has no such snapshot.
            Conflict: it is being created, or sandboxes that were made from it have not ended.
        """
        async with self._database.transaction() as connection:
            loaded = await snapshots.load_locked(connection, snapshot_id, tenant)
            if loaded is None:
                raise unknown(snapshot_id)
            users = await snapshots.users(connection, snapshot_id, tenant)
            outcome = await self._try(connection, *loaded, Delete(users), meta)
            assert outcome is not None, "no other writer can append while the head row is locked"
        return self._told(outcome)

    def _told(self, outcome: SnapshotOutcome) -> SnapshotOutcome:
        if outcome.position is not None:
            self._signal.poke(outcome.snapshot.id, work=_touches(outcome.events))
        return outcome

    async def _try(
        self, on: Executor, before: Snapshot, now: datetime, command: Command, meta: Meta
    ) -> SnapshotOutcome | None:
        """The outcome; None = another event came first."""
        events = decide(before, command, now)
        if not events:
            return SnapshotOutcome(before)
        refuse_newer(KIND, before.id, before.schema, ev.REGISTRY)
        draft = Draft(before.id, before.tenant, before.version, events, meta, now or UNSET)
        after = advance(evolve, before, draft.recorded())
        ended = changes(before, after, self._limits)
        written = await append(
            on,
            _move(touch=_touches(events), clears=bool(ended)),
            before.id,
            [ev.REGISTRY.encode(event) for event in events],
            after=before.version,
            meta=meta,
            expected=before.version,
            engine_queue=after.engine,
            state_moved=after.state is not before.state,
            removes=after.state is SnapshotState.REMOVED,
            **deadlines.parameters(ended),
            **snapshots.values(after),
        )
        if written is None:
            return None
        return SnapshotOutcome(advance(evolve, before, draft.recorded(written)), events, written.position)

    async def _check_abilities(self, engine: str | None) -> None:
        known = next((one for one in await self._engines.known() if one.name == engine), None)
        if known is not None and known.capabilities.snapshots == "none":
            raise Unsupported(
                "SNAPSHOT::NOT_IMPLEMENTED",
                f"Engine {known.name} cannot make snapshots: its image store takes no image without its layers.",
            )


def _touches(events: tuple[ev.Event, ...]) -> bool:
    return any(isinstance(event, _ASKS_FOR_WORK) for event in events)
