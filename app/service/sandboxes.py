"""The only write path of sandboxes: load -> decide -> append -> retry.

`create` needs no load. A guarded insert makes the stream; with an `Idempotency-Key` the guard is the key's row, and a
key that is there already leads to the stream that the first request made.

`execute` loads the head row with the database's clock, lets the core decide, checks the declared transitions, and
appends behind the version guard. A conflict means that somebody else's event came first. After the first conflict the
head row is locked in a transaction, decided on again and appended to, so no caller is refused because others are many.
Two callers must not be retried: a client with `If-Match`, and a reconciler whose observation is about the state that
it read (`record`); both get the conflict.

Commands about one sandbox take turns within a process, in the order of their arrival. Else each would wait for the row
lock on a connection of its own, and a client that renews one sandbox many times at once would take the whole pool from
everybody. While the row is locked nothing else asks the pool for a connection, for the same reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import cache
from uuid import UUID
from weakref import WeakValueDictionary

import asyncpg
from msgspec import Struct

from app.domain.engine.decide import NoEngine, place
from app.domain.engine.state import Engine, EngineState
from app.domain.sandbox import commands as cmd
from app.domain.sandbox import deadlines as due
from app.domain.sandbox import events as ev
from app.domain.sandbox import transitions
from app.domain.sandbox.deadlines import Limits
from app.domain.sandbox.decide import decide, unknown, visible
from app.domain.sandbox.observed import Capabilities, Pausing
from app.domain.sandbox.spec import check_timeout
from app.domain.sandbox.state import RuntimeState, Sandbox, evolve
from app.domain.snapshot.decide import restorable
from app.domain.snapshot.decide import visible as visible_snapshot
from app.domain.stream import Meta
from app.domain.tenants import AnyTenant
from app.errors import Conflict, KeyRetired, KeyReused, PreconditionFailed, Unsupported
from app.service.snapshots import Snapshots
from app.service.streams import UNSET, Draft, StaleVersion, advance, decoded, refuse_newer
from app.store import addresses
from app.store.database.pool import Database
from app.store.database.statement import Executor, Statement
from app.store.deadlines import effects as deadlines
from app.store.log.append import append, append_statement, create_statement
from app.store.log.idempotency import IdempotencyKeys
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from app.store.queue import effects as queue
from app.store.tables import sandboxes
from app.store.vault import effects as vault
from app.store.vault.seal import Sealed
from app.views import current
from app.views.current import CurrentView
from app.views.engines import EnginesView
from app.views.snapshots import load_shared

KIND = ev.REGISTRY.kind
_ASKS_FOR_WORK = (
    cmd.Pause,
    cmd.Resume,
    cmd.Terminate,
    cmd.Expire,
    cmd.EndTransition,
    cmd.RecordPlaced,
    cmd.RecordFetched,
    cmd.Freeze,
    cmd.Thaw,
    cmd.EndFreeze,
)
"""Commands after which a reconciler has something to do. What it records about its own claim is not among them."""

__all__ = ["Completion", "Outcome", "Service", "StaleVersion"]


class Outcome(Struct, frozen=True):
    """The result of a command."""

    sandbox: Sandbox
    events: tuple[ev.Event, ...] = ()
    position: int | None = None
    """Of the last event appended; None when there was nothing to append."""
    completed: bool = False
    """The claim that came with it has ended."""
    replayed: bool = False
    """True when an Idempotency-Key met its earlier request; `sandbox` is then the state that was answered first."""


class Completion(Struct, frozen=True):
    """A claim that ends with an append, in the same statement, when nothing is left to do afterwards."""

    owner: UUID
    revision: int
    is_reached: Callable[[Sandbox], bool]
    """Whether the state after the append is the goal. Times of this state are not final yet."""


class _Attempt(Struct, frozen=True):
    """A command, with all that deciding it needs beside the sandbox."""

    command: cmd.Command
    meta: Meta
    if_match: int | None
    engines: Sequence[Engine]
    """Read for pause and resume only."""


@cache
def _create(*, keyed: bool, sets: bool) -> Statement:
    effects = [queue.touch, vault.seal, *([deadlines.set_deadlines] if sets else [])]
    return create_statement(KIND, current.begin, effects, keyed=keyed)


@cache
def _move(
    changed: frozenset[str], *, touch: bool, sets: bool, clears: bool, erase: bool, frees: bool, completes: bool
) -> Statement:
    effects = [
        *([queue.touch] if touch else []),
        *([deadlines.set_deadlines] if sets else []),
        *([deadlines.clear_deadlines] if clears else []),
        *([vault.erase] if erase else []),
        *([addresses.free] if frees else []),
    ]
    report = queue.complete if completes else None
    return append_statement(KIND, sandboxes, current.move(changed), effects, report=report)


class Service:
    """Runs commands on sandboxes and appends their events."""

    def __init__(self, database: Database, signal: Signal, limits: Limits | None = None) -> None:
        """On an open database, with the operator's limits of transitional phases."""
        self._database = database
        self._signal = signal
        self._limits = limits or Limits()
        self._keys = IdempotencyKeys(database)
        self._turns: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()
        self.log = EventLog(database)
        self.view = CurrentView(database)
        self.engines = EnginesView(database)
        self.snapshots = Snapshots(database, signal, self._limits, self.engines)

    async def create(
        self,
        sandbox_id: UUID,
        tenant: str,
        event: ev.Requested,
        sealed: Sealed | None,
        meta: Meta,
        *,
        key: str | None = None,
    ) -> Outcome:
        """Begin a stream, or answer as the first time when the same request began one already.

        `key` is the digest of the client's Idempotency-Key.

        Raises:
            KeyReused: the key came with another body before.
            KeyRetired: the values were sealed by a master key that is not in use any more.
            NotFound, Conflict: the snapshot that it is to be made from is not there or cannot be used.
            Invalid: the expiry would lie beyond the calendar.
        """
        check_timeout(event.timeout_s)
        source = event.spec.snapshot_id
        if source is not None and key is not None and await self._keys.find(tenant, key) is not None:
            return await self._replay(tenant, key, event)  # whatever has become of the snapshot since
        placed = await (self._placed(sandbox_id) if source is None else self._beside(sandbox_id, tenant, source))
        draft = Draft(sandbox_id, tenant, 0, (event, *placed), meta)
        after = advance(evolve, None, draft.recorded())
        changes = due.changes(None, after, draft.events, UNSET, self._limits)
        timeout = None if event.timeout_s is None else float(event.timeout_s)
        values = {
            "digest": key,
            "engine_queue": after.engine or "",
            "key_id_sealing": sealed and sealed.key_id,
            "wrapped_key": sealed and sealed.wrapped_key,
            "sealed": sealed and sealed.sealed,
            **deadlines.parameters(changes),
            **current.begin_values(after, timeout),
        }
        try:
            async with self._holding(source, tenant) as on:
                written = await append(
                    on,
                    _create(keyed=key is not None, sets=bool(changes)),
                    sandbox_id,
                    [ev.REGISTRY.encode(one) for one in draft.events],
                    after=0,
                    meta=meta,
                    **values,
                )
        except asyncpg.ObjectNotInPrerequisiteStateError as error:
            # The trigger on sealed_values: a rotation of the master key ended and this server has not noticed it.
            raise KeyRetired(f"{error}; repeat the request, or call another server") from None
        if written is None:
            assert key is not None, "only a key can be there before its stream"
            return await self._replay(tenant, key, event)
        made = advance(evolve, None, draft.recorded(written))
        self._signal.poke(sandbox_id, work=True)
        return Outcome(made, draft.events, written.position)

    async def _placed(self, sandbox_id: UUID) -> Sequence[ev.Event]:
        chosen = place(await self.engines.known())
        if isinstance(chosen, NoEngine):
            return ()
        return (ev.Placed(chosen.engine, chosen.epoch, sandbox_id, reason=chosen.reason, candidates=chosen.candidates),)

    async def _beside(self, sandbox_id: UUID, tenant: str, snapshot_id: UUID) -> Sequence[ev.Event]:
        """On the engine of the snapshot, which alone has its image."""
        snapshot = await self.snapshots.restorable(snapshot_id, tenant)
        engine = next((one for one in await self.engines.known() if one.name == snapshot.engine), None)
        if engine is None or engine.state is not EngineState.UP:
            raise Conflict(
                "SNAPSHOT::ENGINE_UNAVAILABLE",
                f"The image of snapshot {snapshot_id} is on engine {snapshot.engine}, which cannot be used now.",
            )
        return (ev.Placed(engine.name, engine.epoch, sandbox_id, reason="SNAPSHOT"),)

    @asynccontextmanager
    async def _holding(self, snapshot_id: UUID | None, tenant: str) -> AsyncGenerator[Executor]:
        """Where to append. Until that has ended, the snapshot cannot be deleted."""
        if snapshot_id is None:
            yield self._database
            return
        async with self._database.transaction() as connection:
            snapshot = await load_shared(connection, snapshot_id, tenant)
            restorable(visible_snapshot(snapshot, snapshot_id))
            yield connection

    async def _replay(self, tenant: str, key: str, event: ev.Requested) -> Outcome:
        first = await self._keys.find(tenant, key)
        assert first is not None, "keys are never deleted before their stream"
        if first.fingerprint != event.fingerprint:
            raise KeyReused(
                "SANDLEDGER::IDEMPOTENCY_KEY_REUSED",
                "This Idempotency-Key was used before with a different body; use a new key for a new request.",
                first.stream_id,
            )
        beginning = await self.view.beginning(first.stream_id, tenant)
        since = 0 if beginning is None else beginning.since
        begun = await self.log.history(first.stream_id, tenant, since=since, limit=2)
        recorded = [decoded(ev.REGISTRY, stored) for stored in begun]
        # What the first answer said: all that stands in the first append.
        original = advance(evolve, None, [one for one in recorded if one.at == recorded[0].at])
        return Outcome(original, replayed=True)

    async def execute(
        self,
        sandbox_id: UUID,
        tenant: str | AnyTenant,
        command: cmd.Command,
        meta: Meta,
        *,
        if_match: int | None = None,
    ) -> Outcome:
        """Decide and append. A sandbox of another tenant does not exist.

        Raises:
            Rejected: the core or the engine's abilities refuse, or `if_match` names another version.
            UnknownEvent: a newer version wrote to the stream.
        """
        engines = await self.engines.known() if isinstance(command, cmd.Pause | cmd.Resume) else ()
        attempt = _Attempt(command, meta, if_match, engines)
        turn = self._turns.get(sandbox_id)
        if turn is None:
            turn = self._turns[sandbox_id] = asyncio.Lock()
        async with turn:
            loaded = await self.view.load(sandbox_id, tenant)
            if loaded is None:
                raise unknown(sandbox_id)
            outcome = await self._try(self._database, loaded, attempt)
            if outcome is None:
                async with self._database.transaction() as connection:
                    locked = await current.load_locked(connection.fetch, sandbox_id, tenant)
                    assert locked is not None, "a head row is never deleted"
                    outcome = await self._try(connection, locked, attempt)
                    assert outcome is not None, "no other writer can append while the head row is locked"
        if outcome.position is not None:
            self._signal.poke(sandbox_id, work=isinstance(command, _ASKS_FOR_WORK), state=outcome.sandbox)
        return outcome

    async def _try(self, on: Executor, loaded: tuple[Sandbox, datetime], attempt: _Attempt) -> Outcome | None:
        """The outcome; None = somebody else's event came first."""
        sandbox, now = loaded
        command, if_match = attempt.command, attempt.if_match
        if if_match is not None and sandbox.version != if_match:
            visible(sandbox, sandbox.id)  # that it has ended, and why, says more than that it has changed
            raise PreconditionFailed(
                "SANDLEDGER::VERSION_MISMATCH",
                f"If-Match names version {if_match}, the sandbox is at version {sandbox.version}; read its ETag again.",
            )
        events = decide(sandbox, command, now)
        if not events:
            return Outcome(sandbox)
        _check_abilities(sandbox, attempt)
        touch = isinstance(command, _ASKS_FOR_WORK)
        return await self._append(on, sandbox, events, attempt.meta, now, touch=touch)

    async def record(
        self, sandbox: Sandbox, observation: cmd.Observation, meta: Meta, completion: Completion | None = None
    ) -> Outcome:
        """Append what was observed about exactly this state. No load: the guard is the comparison.

        With `completion`, the claim on the stream ends in the same statement when the goal is reached.

        Raises:
            StaleVersion: the stream is not at the version of `sandbox` any more.
        """
        events = decide(sandbox, observation, UNSET)
        if not events:
            return Outcome(sandbox)
        touch = isinstance(observation, _ASKS_FOR_WORK)
        outcome = await self._append(
            self._database, sandbox, events, meta, UNSET, touch=touch, completion=None if touch else completion
        )
        if outcome is None:
            raise StaleVersion(f"sandbox {sandbox.id} is not at version {sandbox.version} any more")
        self._signal.poke(sandbox.id, work=touch, state=outcome.sandbox)
        return outcome

    async def _append(
        self,
        on: Executor,
        before: Sandbox,
        events: tuple[ev.Event, ...],
        meta: Meta,
        now: datetime,
        *,
        touch: bool,
        completion: Completion | None = None,
    ) -> Outcome | None:
        refuse_newer(KIND, before.id, before.schema, ev.REGISTRY)
        draft = Draft(before.id, before.tenant, before.version, events, meta, now)
        after = advance(evolve, before, draft.recorded(), transitions.check)
        changes = due.changes(before, after, events, now, self._limits)
        statement = _move(
            current.changed_json(before, after),
            touch=touch,
            sets=any(change is not None for change in changes.values()),
            clears=any(change is None for change in changes.values()),
            erase=before.may_run and not after.may_run,
            frees=after.observed is RuntimeState.REMOVED and before.observed is not RuntimeState.REMOVED,
            completes=completion is not None and completion.is_reached(after),
        )
        written = await append(
            on,
            statement,
            before.id,
            [ev.REGISTRY.encode(event) for event in events],
            after=before.version,
            meta=meta,
            engine_queue=after.engine or "",
            lease_owner=completion and completion.owner,
            claimed_revision=completion and completion.revision,
            **deadlines.parameters(changes),
            **current.move_values(before, after),
        )
        if written is None:
            return None
        settled = advance(evolve, before, draft.recorded(written))
        return Outcome(settled, events, written.position, completed=written.reported)

    async def history(self, sandbox_id: UUID, tenant: str) -> list[ev.Recorded]:
        """Every event of a sandbox, live or gone. Empty when this tenant never had it."""
        beginning = await self.view.beginning(sandbox_id, tenant)
        if beginning is None:
            return []
        stored = self.log.whole_history(sandbox_id, tenant, since=beginning.since)
        return [decoded(ev.REGISTRY, one) async for one in stored]


def _check_abilities(sandbox: Sandbox, attempt: _Attempt) -> None:
    if not isinstance(attempt.command, cmd.Pause | cmd.Resume):
        return
    engine = next((engine for engine in attempt.engines if engine.name == sandbox.engine), None)
    can = Capabilities() if engine is None else engine.capabilities
    if can.pause == Pausing.NONE:
        raise Unsupported("SANDBOX::API_NOT_SUPPORTED", "The engine of this sandbox cannot pause sandboxes.")
