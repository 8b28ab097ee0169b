"""What an engine shows of a sandbox's object, without sealed values: for people who ask, and for the time after it.

**The values** are read from the object itself: its environment has them until it is removed, and the vault has erased
them by then (`app.store.vault.effects`). Which of its variables are secret is known from the request, which sealed
them, and from the driver, which added the agent's token. Nothing is shown of an object whose environment could not be
read.

**The end.** Before a removal, the end of the log and an inspection are stored (`app.store.diagnostics.kept`). That may
be repeated by any worker after a crash at any point: what has been kept stays.

**How it fails.** An engine that does not answer within `keep_end` seconds gives a row that says so, and the removal
goes on: a container that stays for the sake of its log would cost its owner money. A removal that fails is tried again
and again, and the log with it, but only for `keep_patience` seconds: later attempts must be cheap. A database that is
away ends the run, as it would end the removal.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime
from typing import Final

import asyncpg

from app.domain.sandbox.diagnostics import (
    KEPT_BYTES,
    LIVE_BYTES,
    Inspection,
    LogText,
    log_text,
    without_values,
)
from app.domain.sandbox.masking import Masker
from app.domain.sandbox.state import Sandbox
from app.domain.text import storable
from app.errors import RuntimeFault
from app.runtime.driver import Driver, Ref
from app.store.diagnostics.kept import End, KeptEnds, Run
from app.work.policy import WorkPolicy
from app.work.reconcile.workloads import ref_of

_KEPT_LINES: Final = 2200
"""A line is at least its time, so more of them could not be kept."""
_PIECES: Final = 4
"""An engine may count the pieces of long lines."""
_UTF8_BYTES: Final = 4
_IN_A_THREAD: Final = 16 * 1024
"""Bytes of a log from which it is masked in a thread."""
_LOG = logging.getLogger(__name__)


class Diagnostics:
    """Reads, for one engine."""

    def __init__(self, driver: Driver, kept: KeptEnds, policy: WorkPolicy) -> None:
        self._driver = driver
        self.kept = kept
        self._policy = policy

    async def inspect(self, sandbox: Sandbox) -> Inspection | None:
        """What the engine says of its object. None = it has none.

        Raises:
            RuntimeFault: the engine cannot be asked.
        """
        found = await self._driver.inspect(ref_of(sandbox))
        return None if found is None else _masked(found, sandbox)[0]

    async def logs(self, sandbox: Sandbox, tail: int, since: datetime | None = None) -> LogText | None:
        """The last lines of its log. None = it has no object, or the object's log is gone.

        Raises:
            RuntimeFault: the engine cannot be asked.
        """
        found = await self._driver.inspect(ref_of(sandbox))
        if found is None:
            return None
        masker = _masked(found, sandbox)[1]
        return await self._read(ref_of(sandbox), masker, tail, LIVE_BYTES, since)

    async def keep(self, sandbox: Sandbox) -> None:
        """Store the end of its object, which is about to be removed, unless that was done.

        Raises:
            StoreUnavailable: nothing is stored.
        """
        runtime = sandbox.runtime
        if runtime is None or runtime.main is None or self._policy.keep_days <= 0:
            return
        run = Run(sandbox.id, sandbox.generation, sandbox.run)
        if await self.kept.is_done(run, self._policy.keep_patience):
            return
        inspection: Inspection | None = None
        logs: LogText | None = None
        error = ""
        try:
            async with asyncio.timeout(self._policy.keep_end):
                found = await self._driver.inspect(ref_of(sandbox))
                if found is None:
                    return
                inspection, masker = _masked(found, sandbox)
                logs = await self._read(ref_of(sandbox), masker, _KEPT_LINES, KEPT_BYTES)
            if logs is None:
                error = "The engine had no log of it any more."
        except TimeoutError:
            error = f"The engine did not show it within {self._policy.keep_end:g} s."
        except RuntimeFault as fault:
            error = storable(str(fault))
        if error:
            _LOG.warning("the end of sandbox %s is kept without its log: %s", sandbox.id, error)
        await self._store(run, sandbox, End(logs, inspection, error))

    async def _store(self, run: Run, sandbox: Sandbox, end: End) -> None:
        try:
            await self.kept.keep(run, sandbox.tenant, end, days=self._policy.keep_days)
        except asyncpg.DataError as error:
            # A removal must not depend on what an image or a program has written.
            _LOG.error("the end of sandbox %s cannot be stored: %s", sandbox.id, type(error).__name__)
            lost = End(None, None, "What the engine showed cannot be stored.")
            await self.kept.keep(run, sandbox.tenant, lost, days=self._policy.keep_days)

    async def _read(
        self, ref: Ref, masker: Masker, tail: int, most: int, since: datetime | None = None
    ) -> LogText | None:
        # So much more than is shown that a line which is cut is cut outside of what is shown.
        window = most + masker.longest * _UTF8_BYTES
        logs = await self._driver.logs(ref, tail=tail + _PIECES, most=window, since=since)
        if logs is None:
            return None
        if sum(len(line.text) for line in logs.lines) < _IN_A_THREAD:
            return log_text(logs, masker, lines=tail, most=most)
        return await asyncio.to_thread(log_text, logs, masker, lines=tail, most=most)


def _masked(found: Inspection, sandbox: Sandbox) -> tuple[Inspection, Masker]:
    sealed = frozenset(sandbox.spec.env)
    masker = Masker(found.values_of(sealed))
    return without_values(found, sealed, masker), masker
