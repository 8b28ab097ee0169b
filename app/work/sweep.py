"""Where the log and the engine are compared as wholes. A sweep judges no sandbox: it only marks what differs as due.

**Sweep.** At start, every `sweep_every`, and soon after a sweep has failed, the engine was away, or its event stream
broke: the inventory is read whole, then the open sandboxes, page by page. What differs goes to the queue, and a
reconciler looks at it on its own: adopts, records, or confirms that it is missing. A listing is never a verdict; one
that fails ends the sweep, one that is empty leads to observations that find everything. The order matters: objects are
made after their sandbox, so what the inventory shows is in the pages or is an orphan.

**Identity.** A sweep begins with `confirm_identity`, and asks it once more before it removes anything. An object that
the log does not know, with a position beyond the end of the log, ends the sweep: the log went back (`app.work.beyond`).

**Orphans and leftovers.** An object of ours that belongs to no open sandbox, or a part of one, is removed if this
worker saw it in two sweeps as the same object, it is older than `orphan_grace`, and its id is still not open when the
database is asked once more. What was seen once is kept in memory: a worker that saw something compares once more by
itself after `sweep_confirm` seconds, so the second sweep does not depend on which worker takes the next one. A worker
that dies meanwhile only delays the removal. Each removal is recorded as `engine.leftover_removed`. The inventory holds
only what bears our installation's label: strangers are out of reach. A container that bears our labels under another
name is reported and left alone, unless its id is the one that the log knows.

**Images of snapshots** are compared in the same sweep (`app.work.artifacts`); one of an unknown snapshot is a leftover.

**One sweep an engine.** `engines.swept_at` is compared and set in one statement, so one worker takes it. A worker that
needs one, because it may have missed something, takes it unless another began after the need arose. A sweep that fails
is given back. A worker that dies in a sweep leaves it to its own next start, or to the next `sweep_every`.

**Safety nets**, which must always find nothing and complain if they do: open sandboxes that want work and have no queue
row (they get one), deadlines that should have fired two minutes ago, and sandboxes of engines that no worker reaches.

**Hints** come from the engine's events: ids, gathered for a moment, put in the user lane. Lossy by contract. The
times that they tell are kept in `app.work.moments`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from msgspec import Struct

from app.domain.engine.decide import RecordLeftover
from app.domain.sandbox.state import Desired, RuntimeState
from app.domain.stream import Meta
from app.errors import RuntimeFault, RuntimeUnavailable, StoreUnavailable
from app.runtime.driver import Driver, Leftover, Misnamed, Observed, Power, Ref
from app.service.engines import Engines
from app.store.database.statement import Connections
from app.store.log.signal import Signal
from app.store.queue.reconcile import BACKGROUND, USER, Queue
from app.views import differences
from app.views.differences import Known
from app.views.snapshots import SnapshotsView
from app.work.artifacts import Artifacts, is_image
from app.work.beyond import Found, beyond
from app.work.policy import WorkPolicy
from app.work.station import Station

_REOPEN_S = 1.0
_LOG = logging.getLogger(__name__)


class Swept(Struct, frozen=True):
    """What a sweep compared, put into the queue and removed."""

    objects: int = 0
    sandboxes: int = 0
    enqueued: int = 0
    suspects: int = 0
    """Orphans and leftovers; the next sweep may remove them."""
    removed: tuple[str, ...] = ()
    """Their names."""
    stranded: int = 0
    overdue: int = 0
    unserved: int = 0
    """Open sandboxes of other engines, which no worker reaches."""


def contradicts(sandbox: Known, observed: Observed | None) -> bool:
    """Whether the sandbox is worth an observation of its own."""
    if sandbox.desired is Desired.TERMINATED:
        return False  # it has a queue row, or is found stranded
    if observed is None:
        return sandbox.observed in (RuntimeState.CREATED, RuntimeState.RUNNING, RuntimeState.PAUSED)
    match sandbox.observed:
        case RuntimeState.NONE | RuntimeState.CREATED:
            return not sandbox.queued  # who holds the row is about to find out
        case RuntimeState.RUNNING | RuntimeState.PAUSED:
            main = None if observed.main is None else observed.main.runtime_id
            stands = sandbox.frozen and observed.power is Power.PAUSED
            return (observed.power.value != sandbox.observed.value and not stands) or main != sandbox.runtime_id
        case RuntimeState.EXITED:
            return observed.power in (Power.RUNNING, Power.PAUSED)
        case RuntimeState.LOST | RuntimeState.REMOVED:
            return True


class Sweeper:
    """Sweeps of one engine, and its hints."""

    def __init__(
        self,
        *,
        station: Station,
        engines: Engines,
        connections: Connections,
        queue: Queue,
        signal: Signal,
        policy: WorkPolicy,
        meta: Meta,
    ) -> None:
        """`meta` names this worker in the log."""
        self._station = station
        self._driver: Driver = station.driver
        self._engines = engines
        self._connections = connections
        self._queue = queue
        self._signal = signal
        self._policy = policy
        self._meta = meta
        self._wanted_at: float | None = time.monotonic()
        self._confirm_at = float("inf")
        self._artifacts = Artifacts(self._driver, SnapshotsView(connections), queue, policy.sweep_page)
        self._failing = False
        self._suspects: frozenset[tuple[str, str]] = frozenset()
        self._reported: frozenset[str] = frozenset()
        station.when_usable(self.mark_due)

    def mark_due(self) -> None:
        """Something may have been missed: sweep at the next tick, unless another worker begins one after this."""
        self._wanted_at = time.monotonic()

    async def tick(self) -> None:
        """Sweep if it is time. Trouble is logged, never raised, and leaves the sweep due."""
        if self._station.open:
            return  # when it can be used again, a sweep is due
        try:
            await self._tick()
        except (RuntimeFault, StoreUnavailable) as error:
            level = logging.DEBUG if self._failing else logging.WARNING
            _LOG.log(level, "no sweep of %s yet: %s", self._driver.name, error)
        except Exception:  # noqa: BLE001 - the next one may work
            _LOG.exception("a sweep of %s failed", self._driver.name)
        else:
            self._failing = False
            return
        self._failing = True
        self.mark_due()

    async def _tick(self) -> None:
        name, view = self._driver.name, self._engines.view
        begun, wanted = time.monotonic(), self._wanted_at
        claimed: datetime | None = None
        if begun < self._confirm_at:
            age = self._policy.sweep_every * random.uniform(0.9, 1.1)  # noqa: S311 - jitter, not a secret
            if wanted is not None:
                age = min(age, begun - wanted)
            claimed = await view.claim_sweep(name, age=age)
        swept: Swept | None = None
        try:
            if claimed is not None or begun >= self._confirm_at:
                swept = await self.sweep()
        finally:
            if claimed is not None and swept is None:
                await view.return_sweep(name, claimed)
        if self._wanted_at == wanted:
            self._wanted_at = None  # this sweep, or one of another worker, began after it was wanted
        if swept is not None:
            _LOG.info("swept %s: %s", name, swept)

    async def sweep(self) -> Swept:
        """Compare everything once.

        Raises:
            RuntimeFault, StoreUnavailable: nothing was concluded.
        """
        name = self._driver.name
        stranded = await self._rescue_stranded()
        overdue = await self._count_overdue()
        unserved = await self._count_unserved()
        await self._confirm()
        listed = [one async for one in self._driver.inventory()]
        found: list[Found] = [one for one in listed if not isinstance(one, Misnamed)]
        objects: dict[UUID, Observed] = {one.object_id: one for one in found if isinstance(one, Observed)}
        renamed = {_runtime_id(one.observed): one.observed for one in listed if isinstance(one, Misnamed)}
        differing, known = await self._compare(objects, renamed)
        self._report_misnamed(renamed)
        strays = [one for one in found if one.object_id not in known] + await self._artifacts.compare()
        ahead = await beyond(self._connections, strays)
        if ahead is not None and not await self._station.log_went_back(ahead.last_position, ahead.found_position):
            raise RuntimeUnavailable(f"the log went back: {self._station.trouble}")
        enqueued = await self._queue.enqueue(differing, BACKGROUND) if differing else 0
        removed = await self._remove_strays(strays)
        suspects = len(strays) - len(removed)
        confirm = suspects > 0 and not self._policy.orphan_dry_run
        self._confirm_at = time.monotonic() + self._policy.sweep_confirm if confirm else float("inf")
        _LOG.debug("%s: %d differ", name, len(differing))
        return Swept(len(objects), len(known), enqueued, suspects, removed, stranded, overdue, unserved)

    async def _confirm(self) -> None:
        if not await self._station.confirm_identity():
            trouble = self._station.trouble or "its identity was in doubt a moment ago"
            raise RuntimeUnavailable(f"engine {self._driver.name} is not confirmed: {trouble}")

    async def _compare(
        self, objects: Mapping[UUID, Observed], renamed: dict[str, Observed]
    ) -> tuple[list[UUID], set[UUID]]:
        """Ids of sandboxes that differ, and of objects that the log knows. Takes what it accounts for out of `renamed`.

        The container that the log knows counts, even where another one with copied labels has its name.
        """
        differing: list[UUID] = []
        known: set[UUID] = set()
        async for sandbox in differences.open_sandboxes(self._connections, self._driver.name, self._policy.sweep_page):
            known.add(sandbox.object_id)
            shown = objects.get(sandbox.object_id)
            if (ours := renamed.pop(sandbox.runtime_id or "", None)) is not None:
                if shown is not None:
                    renamed[_runtime_id(shown)] = shown
                shown = ours
            if contradicts(sandbox, shown):
                differing.append(sandbox.id)
        return differing, known

    def _report_misnamed(self, unaccounted: Mapping[str, Observed]) -> None:
        """Say once of each that it is there. It may be a person's copy, so nobody removes it."""
        for runtime_id in unaccounted.keys() - self._reported:
            one = unaccounted[runtime_id]
            _LOG.warning(
                "container %s (%s) on %s bears the labels of object %s and is not the one that the log knows: it is a "
                "copy, or it was renamed before it was recorded. It is left alone; remove it yourself if you do not "
                "want it",
                _name(one),
                runtime_id[:12],
                self._driver.name,
                one.object_id,
            )
        self._reported = frozenset(unaccounted)

    async def _remove_strays(self, strays: Sequence[Found]) -> tuple[str, ...]:
        """Remove those that were there before; remember the others."""
        before, self._suspects = self._suspects, frozenset(map(_key, strays))
        twice = [one for one in strays if _key(one) in before]
        if not twice:
            return ()
        now = await differences.clock(self._connections)
        grace = timedelta(seconds=self._policy.orphan_grace)
        old = [one for one in twice if (at := _made_at(one)) is None or at < now - grace]
        await self._confirm()
        ids = [one.object_id for one in old if one.object_id is not None]
        open_now = await differences.still_open(self._connections, ids)
        removed = [one for one in old if one.object_id not in open_now and await self._remove(one)]
        return tuple(map(_name, removed))

    async def _remove(self, stray: Found) -> bool:
        what = f"{_name(stray)} ({_key(stray)[1][:12]}, made {_made_at(stray)})"
        why = f"it bears our label, object {stray.object_id} belongs to no open sandbox, and it was seen in two sweeps"
        if self._policy.orphan_dry_run:
            _LOG.warning("orphan kept, dry run: %s: %s", what, why)
            return False
        try:
            if isinstance(stray, Leftover) and is_image(stray):
                await self._artifacts.remove(stray)
            elif isinstance(stray, Leftover):
                await self._driver.remove_leftover(stray)
            elif not await self._driver.remove(Ref(stray.object_id)):
                return False  # it is going; the next sweep finds it gone or tries again
        except RuntimeFault as error:
            _LOG.warning("orphan %s could not be removed, the next sweep tries again: %s", what, error)
            return False
        _LOG.warning("orphan removed: %s: %s", what, why)
        role = stray.role if isinstance(stray, Leftover) else "main"
        removed = RecordLeftover(role, _name(stray), stray.object_id, stray.position)
        await self._engines.execute(self._driver.name, removed, self._meta)
        return True

    async def _rescue_stranded(self) -> int:
        ids = await differences.stranded(self._connections, self._driver.name, self._policy.stranded_after)
        if ids:
            _LOG.warning("sandboxes that wanted work had no queue row, which is a bug; they have one now: %s", ids)
            await self._queue.enqueue(ids, USER)
        found = await differences.stranded_snapshots(self._connections, self._driver.name, self._policy.stranded_after)
        if found:
            _LOG.warning("snapshots that wanted work had no queue row, which is a bug; they have one now: %s", found)
            await self._queue.enqueue_snapshots(found, USER)
        return len(ids) + len(found)

    async def _count_overdue(self) -> int:
        overdue = await differences.overdue_deadlines(self._connections)
        if overdue:
            _LOG.error("%d deadlines should have fired two minutes ago, which is a bug or a long outage", overdue)
        return overdue

    async def _count_unserved(self) -> int:
        found = await differences.unserved(self._connections, self._driver.name, self._policy.dark_after)
        for engine, sandboxes in found.items():
            _LOG.error(
                "%d open sandboxes are on engine %s, which no worker reaches. Start a worker for it, or name the "
                "engine in the settings as it was named before",
                sandboxes,
                engine,
            )
        return sum(found.values())

    async def follow_hints(self) -> None:
        """Put what changed on the queue, for ever."""
        changed: set[UUID] = set()
        news = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._gather(changed, news), name="hints-gather")
            tasks.create_task(self._flush(changed, news), name="hints-flush")

    def _missed(self) -> None:
        """The stream broke: what happened meanwhile is for the sweep, and it may be another engine now."""
        self.mark_due()
        self._station.doubt()
        self._station.moments.missed()

    async def _gather(self, changed: set[UUID], news: asyncio.Event) -> None:
        while True:
            try:
                async for hint in self._driver.hints():
                    if hint is None:
                        self._missed()
                        continue
                    self._station.moments.note(hint)
                    changed.add(hint.object_id)
                    news.set()
            except Exception as error:  # noqa: BLE001 - hints may fail in any way, the sweep makes up for it
                _LOG.warning("hints of %s ended, following them again: %s", self._driver.name, type(error).__name__)
            self._missed()
            await asyncio.sleep(_REOPEN_S)

    async def _flush(self, changed: set[UUID], news: asyncio.Event) -> None:
        while True:
            await news.wait()
            await asyncio.sleep(self._policy.hint_window)
            news.clear()
            ids = sorted(changed)
            changed.clear()
            try:
                due = await self._queue.enqueue_objects(ids, USER)
            except StoreUnavailable:
                changed.update(ids)
                news.set()
                await asyncio.sleep(_REOPEN_S)
            except Exception:  # noqa: BLE001
                _LOG.exception("hints could not be queued")
            else:
                for stream_id in due:
                    self._signal.poke(stream_id)


def _runtime_id(one: Observed) -> str:
    return "" if one.main is None else one.main.runtime_id


def _key(stray: Found) -> tuple[str, str]:
    """The same name and runtime ids = the same object."""
    if isinstance(stray, Leftover):
        return stray.name, stray.runtime_id
    return str(stray.object_id), " ".join(sorted(part.runtime_id for part in stray.parts))


def _name(stray: Found) -> str:
    if isinstance(stray, Leftover):
        return stray.name
    return next((part.name for part in stray.parts), str(stray.object_id)) if stray.main is None else stray.main.name


def _made_at(stray: Found) -> datetime | None:
    return stray.made_at if isinstance(stray, Leftover) else stray.created_at
