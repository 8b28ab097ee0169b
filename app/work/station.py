"""A station: our side of one engine. It knows whether the engine answers, and whether it is the one that the log knows.

**Contact.** At first contact with an engine that the log does not know, `prepare` leaves our mark there and the engine
is registered. The mark is made at no other time. Every later contact asks `check`, and compares the mark with the one
in the log. A contact is made at the start, every `engine_beat` seconds, every `engine_probe` seconds while the engine
cannot be used, when its event stream began again, when a call was answered with "unavailable", and whenever a run
wants to conclude that an object is absent (`confirm_identity`).

=========== ============================================================ ======================
state       means                                                        what is done
=========== ============================================================ ======================
`unknown`   no contact yet                                               nothing is claimed
`away`      it does not answer                                           nothing is claimed
`wrong`     it answers, and another mark or none is there; or an object  nothing is claimed, no
            shows that the log went back (`app.work.beyond`)             verb but `check`
`usable`    it answers, and the mark agrees                              work
=========== ============================================================ ======================

**What is recorded in the log.** `engine.dark` when no worker at all has reached the engine for `dark_after` seconds,
once, by any worker; `engine.back` by the first that finds the right engine again. A worker that finds the *wrong*
engine stops at once, but says `engine.mismatch` only when no other worker has reached the right one lately. So two
workers of which one is misled do not contradict each other in the log for ever.

**Invariants.** Absence is concluded only after `confirm_identity` was true: it asks the engine after the call began,
and is false for `missing_grace` seconds after a wrong engine was found, so that two observations of a wrong engine
cannot be confirmed by the right one. Before an engine is used again, its objects' positions are compared with the end
of the log; also when the database turns out to be another one than at the last contact, restored or failed over.

**How it fails.** A check that is not answered within `engine_check` seconds counts as no answer. Without a database
nothing can be compared: the state stays what it was, and `confirm_identity` raises.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

from app.domain.engine.decide import RecordLogWentBack, RecordSighting, RecordSilence, Sighting, agrees, decide
from app.domain.engine.state import Engine, EngineState
from app.domain.stream import Meta
from app.errors import RuntimeFault, StoreUnavailable
from app.runtime.driver import Driver, EngineInfo, Misnamed, Observed
from app.service.engines import Engines
from app.store.database.statement import Connections
from app.store.log.store import EventLog, LogIdentity
from app.store.queue.wake import make_engine_due
from app.views.engines import Standing
from app.work.beyond import beyond
from app.work.moments import Moments
from app.work.outages import Outages
from app.work.policy import WorkPolicy

_INVENTORY_S = 60.0
_HISTORY = 100
_MAX_STREAKS = 10_000
_LOG = logging.getLogger(__name__)


class State(StrEnum):
    """What this worker may do with the engine."""

    UNKNOWN = "unknown"
    AWAY = "away"
    WRONG = "wrong"
    USABLE = "usable"


class Station:
    """One worker's side of one engine."""

    def __init__(
        self, *, driver: Driver, engines: Engines, connections: Connections, policy: WorkPolicy, meta: Meta
    ) -> None:
        """`connections` are those for statements of the workers' loops. `meta` names this worker."""
        self.driver = driver
        self.name = driver.name
        self.state = State.UNKNOWN
        self.trouble = ""
        """Why it cannot be used, in words for people."""
        self.outages = Outages()
        self.moments = Moments()
        self.alive_at = time.monotonic()
        """When `run` last made a contact or tried to: its sign of life."""
        self._engines = engines
        self._connections = connections
        self._policy = policy
        self._meta = meta
        self._log = EventLog(connections)
        self._log_identity: LogIdentity | None = None
        self._engine: Engine | None = None
        self._last_contact: Any = None
        self._doubted = False
        self._wrong_at = float("-inf")
        self._asking = asyncio.Lock()
        self._asked = 0
        self._covered = 0
        self._asked_at = float("-inf")
        self._wake = asyncio.Event()
        self._streaks: dict[UUID, int] = {}
        self._when_usable: list[Callable[[], None]] = []
        self._started = time.monotonic()

    @property
    def open(self) -> bool:
        """The breaker is open: nothing may be claimed."""
        return self.state is not State.USABLE

    @property
    def mismatch(self) -> str:
        """Why the engine that answers is not used; empty = it is the right one, or none answers."""
        return self.trouble if self.state is State.WRONG else ""

    @property
    def trusted(self) -> bool:
        """The last contact found the right engine, and nothing has happened since that makes it doubtful."""
        return self.state is State.USABLE and not self._doubted

    @property
    def alive(self) -> bool:
        """Whether `run` goes round. One round takes at most a check and a listing."""
        limit = 3 * (self._policy.engine_check + self._policy.engine_beat) + _INVENTORY_S
        return time.monotonic() - self.alive_at < limit

    def when_usable(self, callback: Callable[[], None]) -> None:
        """Call this each time the engine can be used again, the first time included."""
        self._when_usable.append(callback)

    async def confirm_identity(self) -> bool:
        """Ask the engine now. True = it is the right one, so what it says about absence may be believed.

        Raises:
            StoreUnavailable: nothing can be compared.
        """
        if not await self.contact():
            return False
        return asyncio.get_running_loop().time() - self._wrong_at >= self._policy.missing_grace

    async def contact(self) -> bool:
        """Ask who it is and compare. Callers that come while one asks share the next one.

        Raises:
            StoreUnavailable: nothing can be compared.
        """
        self._asked += 1
        ticket = self._asked
        async with self._asking:
            if self._covered < ticket:
                await self._pace()
                covers = self._asked
                await self._ask()
                self._covered = covers
            return self.trusted

    async def _pace(self) -> None:
        """Many removals a second each want a contact. Those that come within a moment share one."""
        clock = asyncio.get_running_loop().time
        early = self._asked_at + self._policy.contact_every - clock()
        if early > 0:
            await asyncio.sleep(early)
        self._asked_at = clock()

    def doubt(self) -> None:
        """Something says that it may have gone and come back: compare again before anything is concluded."""
        if self.state is State.USABLE:
            self._doubted = True
        self._wake.set()

    async def suspect(self, stream_id: UUID, error: Exception) -> float:
        """A call for this stream was answered with "unavailable". Ask the engine, and say how many seconds to wait.

        The engine as a whole is away only if it does not say who it is. One stream whose calls fail while the engine is
        well waits by itself, longer each time.
        """
        if not self.open:
            await self.contact()
        if self.open:
            _LOG.debug("stream %s waits for engine %s: %s", stream_id, self.name, error)
            return random.uniform(0.5, 1) * self._policy.engine_probe  # noqa: S311 - jitter, not a secret
        if len(self._streaks) >= _MAX_STREAKS:
            self._streaks.clear()
        times = self._streaks[stream_id] = self._streaks.get(stream_id, 0) + 1
        longest = min(self._policy.breaker_max, self._policy.breaker_base * 2 ** min(times - 1, 30))
        return random.uniform(longest / 2, longest)  # noqa: S311

    def refusals(self, stream_id: UUID) -> int:
        """How many times in a row an engine that works failed to do what was asked for this stream."""
        return 0 if self.open else self._streaks.get(stream_id, 0)

    def succeeded(self, stream_id: UUID) -> None:
        """The engine did what was asked for this stream. An engine that seemed to be away is asked again at once."""
        self._streaks.pop(stream_id, None)
        if self.state is State.AWAY:
            self._wake.set()

    def annotate(self, observed: Observed) -> Observed:
        """The observation; when an outage of the engine explains an exit, the exit says so."""
        return self.outages.annotate(observed)

    async def run(self) -> None:
        """Keep contact, for ever. No error ends it."""
        while True:
            self._wake.clear()
            try:
                await self.contact()
            except StoreUnavailable as error:
                _LOG.info("engine %s cannot be compared with the log: %s", self.name, error)
            except Exception:  # noqa: BLE001 - the next contact may work
                _LOG.exception("a contact with engine %s failed", self.name)
            await self._report_silence()
            self.alive_at = time.monotonic()
            pause = self._policy.engine_probe if self.open else self._policy.engine_beat
            with suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.9, 1.1)):  # noqa: S311
                    await self._wake.wait()
                    # Calls that succeed while the check fails must not turn this into a spin.
                    await asyncio.sleep(self._policy.engine_probe / 10)

    async def _ask(self) -> None:
        standings: Sequence[Standing] | None = None
        if self._engine is None:
            standings = await self._engines.view.standings()
        mine = _named(standings or (), self.name)
        try:
            async with asyncio.timeout(self._policy.engine_check):
                fresh = self._engine is None and mine is None
                info = await (self.driver.prepare() if fresh else self.driver.check())
        except TimeoutError:
            return self._gone(mine, f"no answer within {self._policy.engine_check:g} s")
        except RuntimeFault as error:
            return self._gone(mine, str(error))
        if fresh:
            if info.mark is None:
                return self._gone(mine, "it did not keep the mark that was made on it")
            self._engine = await self._engines.register(self._sighting(info), self._meta)
            _LOG.warning("engine %s is registered: %s at %s, mark %s", self.name, info.kind, info.address, info.mark)
        mine = _named(await self._engines.view.standings(), self.name)
        if mine is None:  # engines are never deleted, so this is another database than at the last contact
            return self._wrong("the log does not know this engine any more: the database was replaced", info)
        await self._compare(mine, info)
        return None

    def _gone(self, standing: Standing | None, why: str) -> None:
        level = logging.INFO if self.state is State.AWAY else logging.WARNING
        _LOG.log(
            level, "engine %s does not answer, asking again in %.1f s: %s", self.name, self._policy.engine_probe, why
        )
        self.outages.begin(self._last_contact or (None if standing is None else standing.last_seen_at))
        self.state, self.trouble = State.AWAY, why

    async def _compare(self, standing: Standing, info: EngineInfo) -> None:
        sighting = self._sighting(info)
        why = agrees(standing.engine, sighting)
        if why is not None:
            return await self._mismatch(standing, sighting, info, why)
        first = self._engine is None or self._last_contact is None
        if first and self.outages.since is None and standing.engine.state is EngineState.DARK:
            self.outages.begin(standing.last_seen_at)
        if standing.silent_s >= self._policy.seen_throttle or standing.last_seen_at is None:
            # Before `engine.back`: another worker would otherwise find it up and silent, and call it dark again.
            await self._engines.view.saw(self.name, throttle=self._policy.seen_throttle)
        engine = standing.engine
        if decide(engine, RecordSighting(sighting), standing.now):
            engine = await self._engines.execute(self.name, RecordSighting(sighting), self._meta)
        if first:
            await self._read_outages(engine)
        self._engine = engine
        if engine.state is EngineState.MISMATCH:
            return self._wrong(engine.trouble, info)
        await self._compare_log()
        if self.open and not await self._is_covered(info):
            return None
        before, self._last_contact = self._last_contact, standing.now
        await self._use(standing, before)
        return None

    async def _compare_log(self) -> None:
        """Another log than at the last contact may be an older copy: look at the objects before going on."""
        before, self._log_identity = self._log_identity, await self._log.identity()
        if before is not None and not self._log_identity.follows(before, before.last_position):
            _LOG.warning("engine %s: the database was restored or failed over; its objects are compared", self.name)
            self.state = State.UNKNOWN

    async def _use(self, standing: Standing, last_contact: Any) -> None:
        """The right engine answers."""
        if self._doubted and last_contact is not None:
            self.outages.add(last_contact, standing.now)
        self.outages.end(standing.now)
        was, self._doubted, self.trouble = self.state, False, ""
        if was is State.USABLE:
            return
        self.state = State.USABLE
        if was is not State.UNKNOWN:
            _LOG.warning("engine %s can be used again", self.name)
        due = await make_engine_due(self._connections, self.name)
        _LOG.info("engine %s: %d sandboxes that waited are due", self.name, due)
        for callback in self._when_usable:
            callback()

    async def _mismatch(self, standing: Standing, sighting: Sighting, info: EngineInfo, why: str) -> None:
        found = sighting.mark or "none"
        self._wrong(f"{why}: expected {standing.engine.mark}, found {found}", info)
        if standing.engine.state is EngineState.UP and standing.silent_s < self._policy.dark_after:
            return  # another worker reaches the right one
        self._engine = await self._engines.execute(self.name, RecordSighting(sighting), self._meta)

    def _wrong(self, trouble: str, info: EngineInfo) -> None:
        self._wrong_at = asyncio.get_running_loop().time()
        if self.state is not State.WRONG or self.trouble != trouble:
            _LOG.error(
                "engine %s at %s is not used, because it does not fit this log: %s. Nothing is concluded about its "
                "sandboxes, and nothing is removed. Correct the address of the engine or of the database. If the "
                "database is a restored copy that is to be followed, run `sandledger engines trust %s`. If the engine "
                "is the right one and has lost our mark, run `sandledger engines restore-mark %s`",
                self.name,
                info.address,
                trouble,
                self.name,
                self.name,
            )
        self.state, self.trouble = State.WRONG, trouble

    async def _is_covered(self, info: EngineInfo) -> bool:
        """Whether the log reaches as far as the objects on the engine."""
        try:
            async with asyncio.timeout(_INVENTORY_S):
                # Labels travel with copies, so what has another name proves nothing.
                objects = [found async for found in self.driver.inventory() if not isinstance(found, Misnamed)]
        except (RuntimeFault, TimeoutError) as error:
            self._gone(None, f"its objects could not be listed: {error or type(error).__name__}")
            return False
        found = await beyond(self._connections, objects)
        if found is None:
            return True
        return await self.log_went_back(found.last_position, found.found_position, info)

    async def log_went_back(self, last: int, found: int, info: EngineInfo | None = None) -> bool:
        """An object shows it. True = an operator has said already that the log is to be followed."""
        command = RecordLogWentBack(last, found)
        self._engine = engine = await self._engines.execute(self.name, command, self._meta)
        if engine.state is not EngineState.MISMATCH:
            return True
        self._wrong(engine.trouble, info or EngineInfo(engine.kind, "", "", engine.engine_id, engine.name, engine.mark))
        return False

    async def _read_outages(self, engine: Engine) -> None:
        history = await self._engines.history(self.name, after=max(0, engine.version - _HISTORY))
        self.outages.read(history)

    async def _report_silence(self) -> None:
        """Engines that no worker has reached for a while are dark."""
        try:
            for standing in await self._engines.view.standings():
                engine, silent = standing.engine, standing.silent_s
                settled = time.monotonic() - self._started >= self._policy.dark_after
                mine = engine.name == self.name
                if engine.state is not EngineState.UP or silent < self._policy.dark_after or not (mine or settled):
                    continue
                if mine and self.state in (State.USABLE, State.WRONG):
                    continue  # the next contact writes what is there
                reason = self.trouble if mine else "no worker has reached it"
                since = standing.now - timedelta(seconds=silent)
                after = await self._engines.execute(engine.name, RecordSilence(since, reason), self._meta)
                if after.version != engine.version:
                    _LOG.warning("engine %s is dark: no worker has reached it since %s: %s", engine.name, since, reason)
        except StoreUnavailable:
            pass
        except Exception:  # noqa: BLE001 - the next round may work
            _LOG.exception("engines that do not answer could not be reported")

    def _sighting(self, info: EngineInfo) -> Sighting:
        return Sighting(
            self.name,
            info.kind,
            info.engine_id,
            info.mark,
            info.version,
            info.api,
            info.capabilities,
            info.capacity,
        )


def _named(standings: Sequence[Standing], name: str) -> Standing | None:
    return next((standing for standing in standings if standing.engine.name == name), None)
