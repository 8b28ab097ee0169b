"""The only write path: load -> decide -> append -> retry.

`create` needs no load: a guarded insert either makes the stream or meets the one that an earlier try with the same
`Idempotency-Key` made. `execute` loads the head row with the database's clock, lets the core decide, checks the
declared transitions, and appends behind the version guard. A conflict means that somebody else's event came first: it
is loaded and decided again, at most three times with jitter. Two callers want no second chance: a client with
`If-Match`, and a reconciler whose facts are about the state it looked at (`record`); both get the conflict.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox import transitions
from app.domain.sandbox.decide import decide, unknown, visible
from app.domain.sandbox.observed import Capabilities
from app.domain.sandbox.spec import check_timeout
from app.domain.sandbox.state import Sandbox, evolve
from app.errors import Conflict, KeyReused, PreconditionFailed, SandledgerError, Unsupported
from app.store.database.pool import Database
from app.store.database.statement import Statement
from app.store.log.append import append_statement
from app.store.log.signal import Signal
from app.store.log.store import EventLog, StoredEvent
from app.store.queue import effects as work
from app.store.vault import effects as vault
from app.store.vault.seal import Sealed
from app.views.current import CurrentView, head_insert, head_update, insert_values, update_values

_RETRIES = 3
_CREATE = append_statement(head_insert, [work.touch, work.schedule_expiry, vault.seal])
_ASKS_FOR_WORK = (cmd.Pause, cmd.Resume, cmd.Terminate, cmd.Expire)


class StaleVersion(SandledgerError):
    """The stream moved on since `at_version`; look again before saying anything about it."""


class Outcome(Struct, frozen=True):
    """What a command led to."""

    sandbox: Sandbox
    events: tuple[ev.Event, ...] = ()
    position: int | None = None
    """Of the last event appended; None when there was nothing to append."""
    replayed: bool = False
    """True when an Idempotency-Key met its earlier request; `sandbox` is then the state that was answered first."""


@lru_cache
def _update(*, touch: bool, schedule: bool, end: bool, erase: bool) -> Statement:
    effects = [
        *([work.touch] if touch else []),
        *([work.schedule_expiry] if schedule else []),
        *([work.cancel_expiry] if end else []),
        *([vault.erase] if erase else []),
    ]
    return append_statement(head_update, effects)


class Service:
    """Commands in, events out."""

    def __init__(self, database: Database, signal: Signal, can: Capabilities | None = None) -> None:
        """On an open database, for a driver that can do this much (None = everything)."""
        self._can = can or Capabilities()
        self._database = database
        self._signal = signal
        self.log = EventLog(database)
        self.view = CurrentView(database)

    async def create(self, sandbox_id: UUID, event: ev.Requested, sealed: Sealed | None, meta: ev.Meta) -> Outcome:
        """Begin a stream, or answer as the first time when the same request began it already.

        Raises:
            KeyReused: the id was derived from a key that came with another body.
            Invalid: the deadline would lie beyond the calendar.
        """
        check_timeout(event.spec.timeout_s)
        first = _provisional(sandbox_id, 1, event, meta)
        row = await self._database.fetch_one(
            _CREATE,
            facts=_facts([event], 0),
            meta=msgspec.json.encode(meta).decode(),
            key_id=sealed and sealed.key_id,
            wrapped_key=sealed and sealed.wrapped_key,
            sealed=sealed and sealed.sealed,
            **insert_values(evolve(None, first)),
        )
        if row is None:
            return await self._replay(sandbox_id, event)
        self._signal.poke(sandbox_id)
        fact = msgspec.structs.replace(first, position=row["position"], at=row["recorded_at"])
        return Outcome(evolve(None, fact), (event,), row["position"])

    async def _replay(self, sandbox_id: UUID, event: ev.Requested) -> Outcome:
        begun = [recorded(stored) for stored in await self.log.history(sandbox_id, event.tenant, limit=1)]
        original = evolve(None, begun[0]) if begun else None
        if original is None or original.fingerprint != event.fingerprint:
            raise KeyReused(
                "SANDLEDGER::IDEMPOTENCY_KEY_REUSED",
                "This Idempotency-Key was used before with a different body; use a new key for a new request.",
            )
        return Outcome(original, replayed=True)

    async def execute(
        self,
        sandbox_id: UUID,
        command: cmd.Command,
        meta: ev.Meta,
        *,
        tenant: str | None = None,
        if_match: int | None = None,
        at_version: int | None = None,
    ) -> Outcome:
        """Decide and append.

        Raises:
            Rejected: the core or the runtime's abilities refuse, or `if_match` names another version.
            StaleVersion: the stream is not at `at_version` any more.
        """
        if isinstance(command, cmd.Pause | cmd.Resume) and not self._can.pause:
            raise Unsupported("SANDBOX::API_NOT_SUPPORTED", "This runtime cannot pause sandboxes.")
        for attempt in range(_RETRIES + 1):
            loaded = await self.view.load(sandbox_id, tenant)
            if loaded is None:
                raise unknown(sandbox_id)
            box, now = loaded
            if at_version is not None and box.version != at_version:
                raise StaleVersion(f"sandbox {sandbox_id} is at version {box.version}, not {at_version}")
            if if_match is not None and box.version != if_match:
                visible(box, sandbox_id)  # that it has ended, and why, says more than that it has changed
                raise PreconditionFailed(
                    "SANDLEDGER::VERSION_MISMATCH",
                    f"If-Match names version {if_match}, the sandbox is at version {box.version}; read its ETag again.",
                )
            events = decide(box, command, now)
            if not events:
                return Outcome(box)
            outcome = await self._append(box, events, meta, now, touch=isinstance(command, _ASKS_FOR_WORK))
            if outcome is not None:
                return outcome
            await asyncio.sleep(random.uniform(0, 0.005 * 2**attempt))  # noqa: S311 - jitter, not a secret
        raise Conflict(
            "SANDLEDGER::CONCURRENT_CHANGE", "The sandbox is being changed by too many callers at once; try again."
        )

    async def record(self, box: Sandbox, fact: cmd.Fact, meta: ev.Meta) -> Outcome:
        """Append a fact that was found out about exactly this state. No load: the guard is the comparison.

        Raises:
            StaleVersion: the stream is not at the version of `box` any more.
        """
        events = decide(box, fact, _UNSET)
        if not events:
            return Outcome(box)
        outcome = await self._append(box, events, meta, _UNSET, touch=False)
        if outcome is None:
            raise StaleVersion(f"sandbox {box.id} is not at version {box.version} any more")
        return outcome

    async def _append(
        self, before: Sandbox, events: Sequence[ev.Event], meta: ev.Meta, now: datetime, *, touch: bool
    ) -> Outcome | None:
        facts = [_provisional(before.id, before.version + n, event, meta, now) for n, event in enumerate(events, 1)]
        after = _advance(before, facts, checked=True)
        ends = after.ending is not None and before.ending is None
        statement = _update(
            touch=touch,
            schedule=not ends and after.expires_at != before.expires_at,
            end=ends,
            erase=ends or (after.failure is not None and before.failure is None),
        )
        row = await self._database.fetch_one(
            statement,
            facts=_facts(events, before.version),
            meta=msgspec.json.encode(meta).decode(),
            **update_values(before, after),
        )
        if row is None:
            return None
        self._signal.poke(before.id)
        last, at = row["position"], row["recorded_at"]
        settled = [msgspec.structs.replace(fact, at=at) for fact in facts]
        return Outcome(_advance(before, settled), tuple(events), last)

    async def history(self, sandbox_id: UUID, tenant: str) -> list[ev.Recorded]:
        """Every event of a sandbox, live or gone. Empty when this tenant never had it."""
        return [recorded(stored) async for stored in self.log.whole_history(sandbox_id, tenant)]


def recorded(stored: StoredEvent) -> ev.Recorded:
    """Decode a row of the log.

    Raises:
        UnknownEvent: written by a newer version.
    """
    event = ev.from_payload(stored.type, stored.schema, stored.data)
    meta = ev.read_meta(stored.meta)
    return ev.Recorded(stored.position, stored.stream_id, stored.version, stored.recorded_at, event, meta)


def _advance(before: Sandbox, facts: Sequence[ev.Recorded], *, checked: bool = False) -> Sandbox:
    box = before
    for fact in facts:
        if checked:
            transitions.check(box, fact.event)
        box = evolve(box, fact)
    return box


_UNSET = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


def _provisional(sandbox_id: UUID, version: int, event: ev.Event, meta: ev.Meta, at: datetime = _UNSET) -> ev.Recorded:
    """An event before the database has given it a position and its final time."""
    return ev.Recorded(0, sandbox_id, version, at, event, meta)


def _facts(events: Sequence[ev.Event], after: int) -> str:
    rows: list[dict[str, Any]] = []
    for version, event in enumerate(events, after + 1):
        name = ev.wire_name(event)
        rows.append({"v": version, "t": name, "s": ev.SCHEMA[name], "d": ev.to_payload(event)})
    return msgspec.json.encode(rows).decode()
