"""Probes of agents, outside the slots.

**Protocol.** A run that sees a sandbox up whose agent has not answered gives its claim back and calls `want`. One task
for each sandbox then asks the agent, soon and often at first. When it answers, `sandbox.ready` is appended. A reason
that lasts for a second is recorded as `sandbox.waiting` when it is new, and so is shown to clients.

**Who does not wait any more** (ready, ended, started again) is found out by `decide`, which appends nothing, and by a
look at the head row now and then.

**Invariants.** No claim is held here. An answer counts for the run that was asked about, because a later run has an
agent of its own. The end of the wait is not here but in the deadline `ready`, which any worker fires.

**How it fails.** A worker that dies stops asking. Its row falls due within a lease, and the run of another worker comes
to `want` again. Two workers may ask at once; the second answer appends nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from itertools import repeat
from uuid import UUID

from app.agent.probe import Prober, Trouble
from app.agent.token import agent_token
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.address import agent_at
from app.domain.sandbox.observed import Address
from app.domain.sandbox.plan import STEP_NAMES, Probe
from app.domain.sandbox.state import Sandbox
from app.domain.tenants import ANY_TENANT
from app.errors import SandledgerError
from app.service.sandboxes import Service
from app.work.agents import AgentPolicy
from app.work.reconcile.actors import Actors

_FIRST_PAUSES_S = (0.0, 0.005, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.18)
_PAUSE_S, _PAUSES = 0.5, 120
_LONG_PAUSE_S = 5.0
"""Between questions to an agent that has been silent for a minute."""
_REPORTED_AFTER_S = 1.0
_LOOK_EVERY = 4
"""Questions between two looks at the head row."""
_LOG = logging.getLogger(__name__)


class Probes:
    """The probes of one worker."""

    def __init__(self, *, service: Service, actors: Actors, policy: AgentPolicy) -> None:
        self._service = service
        self._actors = actors
        self._policy = policy
        self._prober = Prober()
        self._tasks: dict[tuple[UUID, int], asyncio.Task[None]] = {}
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether any agent is being asked."""
        return bool(self._tasks)

    def want(self, sandbox: Sandbox, cause: int | None) -> None:
        """Ask until it answers or does not wait any more. A second call for the same run changes nothing."""
        key = (sandbox.id, sandbox.run)
        if self._closed or key in self._tasks:
            return
        task = asyncio.create_task(self._probe(sandbox, cause), name=f"probe-{sandbox.id}")
        self._tasks[key] = task
        task.add_done_callback(lambda _: self._tasks.pop(key, None))

    async def close(self) -> None:
        """Stop asking. The rows of the sandboxes fall due for other workers."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._prober.close()

    async def _probe(self, sandbox: Sandbox, cause: int | None) -> None:
        try:
            await self._until_ready(sandbox, cause)
        except SandledgerError as error:
            _LOG.warning("the probe of sandbox %s ended, another run begins it again: %s", sandbox.id, error)
        except Exception:  # noqa: BLE001 - the row falls due by itself
            _LOG.exception("the probe of sandbox %s ended", sandbox.id)

    async def _until_ready(self, sandbox: Sandbox, cause: int | None) -> None:
        assert sandbox.object_id is not None, "it runs"
        token = agent_token(self._policy.token_key, sandbox.object_id, sandbox.generation)
        clock = asyncio.get_running_loop().time
        begun, reported = clock(), ""
        for asked, pause in enumerate(_pauses(), start=1):
            await asyncio.sleep(pause)
            trouble = await self._ask(sandbox.address, token)
            if trouble is None:
                await self._record(sandbox, cmd.RecordReady(sandbox.run), cause)
                return
            if trouble.reason != reported and clock() - begun >= _REPORTED_AFTER_S:
                reported = trouble.reason
                waiting = cmd.RecordWaiting(STEP_NAMES[Probe], trouble.reason, trouble.message)
                await self._record(sandbox, waiting, cause)
            if asked % _LOOK_EVERY == 0 and not await self._is_wanted(sandbox):
                return

    async def _ask(self, address: Address | None, token: str) -> Trouble | None:
        found = agent_at(address, self._policy.way)
        if found is None:
            return Trouble(
                "NETWORK_NOT_REACHABLE", "The engine shows no address of the container, so its agent cannot be asked."
            )
        return await self._prober.ask(str(found), token)

    async def _is_wanted(self, sandbox: Sandbox) -> bool:
        loaded = await self._service.view.load(sandbox.id, ANY_TENANT)
        if loaded is None or loaded[0].run != sandbox.run:
            return False
        return loaded[0].awaits_agent or loaded[0].agent_trouble is not None

    async def _record(self, sandbox: Sandbox, command: cmd.Command, cause: int | None) -> None:
        meta = self._actors.meta(self._actors.worker, cause)
        await self._service.execute(sandbox.id, ANY_TENANT, command, meta)


def _pauses() -> Iterator[float]:
    yield from _FIRST_PAUSES_S
    yield from repeat(_PAUSE_S, _PAUSES)
    yield from repeat(_LONG_PAUSE_S)
