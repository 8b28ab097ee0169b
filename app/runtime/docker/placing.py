"""Create or adopt, and start: what `ensure` does to one container.

Protocol. Create is tried at once, without an inspect call before it: three calls (create, start, inspect) when all goes
well. 409: somebody holds the name; an inspect call shows whether it is ours (adopt) or not (reject).

Invariants.

* Only an object in the state `created` is started. One that has ended is reported, never run again.
* Where the log knows a container already, it is looked for by its id first: under another name it would not be met.
* After a start that the engine refuses, the container is removed, so that the next attempt begins with a new one.
  Where that fails too, the verdict on the start counts; what is left is removed with the sandbox.

How it fails. A process that dies between create and start leaves a `created` container; the next `ensure` adopts and
starts it. A reply that is lost is the same case. Two processes that start one fresh container at the same moment are
safe as long as its entrypoint outlives the slower call; the engine has no conditional start, so the lease of the
work queue is what keeps a stalled process from starting an entrypoint that has meanwhile ended.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus
from uuid import UUID

from app.errors import RuntimeFault, RuntimeRejected, RuntimeUnavailable
from app.runtime.docker import names
from app.runtime.docker.answers import REMOVING, Created, Inspected, observed, power
from app.runtime.docker.containers import Containers
from app.runtime.docker.engine import Engine, Refused
from app.runtime.docker.spec import ContainerConfig
from app.runtime.docker.verdicts import clean, create_verdict, is_about_ports, start_verdict
from app.runtime.driver import Observed, Power, Workload
from app.runtime.faults import AttemptFailed

SETTLE_SECONDS = 5.0
"""How long the engine may keep a name that no visible container has: a removal under way, or another create not yet
visible."""
POLL_FIRST, POLL_LONGEST = 0.02, 0.5
MAX_REPEATED_STARTS = 8
"""For ports. The engine only learns at the start that somebody else has a port, and takes the next one at the next."""


class Placing:
    """One placement of one workload."""

    def __init__(
        self, engine: Engine, containers: Containers, installation: UUID, work: Workload, config: ContainerConfig
    ) -> None:
        self._engine = engine
        self._containers = containers
        self._work = work
        self._config = config
        self._identity = names.Identity(
            work.ref.object_id, names.MAIN, names.container_name(work.ref.object_id, names.MAIN)
        )
        self._installation = installation

    async def place(self) -> Observed:
        """Create or adopt, start, inspect. The caller sees to it that a cancellation does not cut this."""
        wait, name = Patience(), self._identity.name
        if (known := await self._containers.known(self._work.ref)) and known[0].state.status != REMOVING:
            return await self._adopt(*known)
        while True:
            created = await self._create()
            if isinstance(created, Created):
                return await self._start(created.id, adopted=False)
            holder = await self._containers.show(name)
            if holder is not None and holder.identity(self._installation) != self._identity:
                raise RuntimeRejected("NAME_TAKEN", f"{name} is somebody else's: {created}")
            if holder is not None and self._has_another_address(holder):
                # Made by an attempt that was refused. With it the sandbox would get an address that it does not hold.
                await self._containers.delete(holder.id, name)
            elif holder is not None and holder.state.status != REMOVING:
                return await self._adopt(holder, self._identity)
            # No container has the name any more, or a removal is about to free it, or a create is not visible yet.
            await wait.a_little(f"the engine keeps the name of a container that it does not show: {created}")

    async def _adopt(self, holder: Inspected, identity: names.Identity) -> Observed:
        shown = observed(holder, identity, adopted=True)
        return await self._start(holder.id, adopted=True) if shown.power is Power.CREATED else shown

    def _has_another_address(self, holder: Inspected) -> bool:
        fixed = holder.fixed_ip
        return bool(self._work.ip) and power(holder.state.status) is Power.CREATED and fixed not in ("", self._work.ip)

    async def _create(self) -> Created | str:
        """What was made, or the engine's words about who has the name."""
        platform = self._work.image.platform
        params = {"name": self._identity.name} | ({"platform": platform} if platform else {})
        try:
            return await self._engine.create("containers/create", self._config, Created, params=params)
        except Refused as refused:
            if refused.status == HTTPStatus.CONFLICT:
                return clean(refused.message, self._work)
            raise create_verdict(self._work, refused) from None

    async def _start(self, runtime_id: str, *, adopted: bool) -> Observed:
        conflict, name = "", self._identity.name
        try:
            await self._start_on_free_ports(runtime_id)
        except Refused as refused:
            conflict = await self._start_refused(runtime_id, refused)
        shown = await self._containers.show(runtime_id)
        if shown is None:
            raise AttemptFailed("START_FAILED", f"{name} was removed by somebody else while it was started")
        result = observed(shown, self._identity, adopted=adopted)
        if conflict and result.power is Power.CREATED:
            raise AttemptFailed("START_FAILED", f"the engine did not start {name}: {conflict}")
        return result

    async def _start_on_free_ports(self, runtime_id: str) -> None:
        for repeats in range(MAX_REPEATED_STARTS + 1):
            try:
                await self._engine.command("POST", f"containers/{runtime_id}/start")
            except Refused as refused:
                if repeats == MAX_REPEATED_STARTS or not is_about_ports(refused):
                    raise
            else:
                return

    async def _start_refused(self, runtime_id: str, refused: Refused) -> str:
        """Raise the verdict; return only when the state that the next inspect call shows says everything."""
        gone = refused.status == HTTPStatus.NOT_FOUND and "no such container" in refused.message.lower()
        if refused.status == HTTPStatus.CONFLICT or gone:
            return clean(refused.message, self._work)
        ranges = {each.host_port for port in self._config.host_config.port_bindings.values() for each in port}
        verdict = start_verdict(self._work, refused, max(ranges, default=""))
        if not isinstance(verdict, RuntimeUnavailable):
            with suppress(RuntimeFault):
                await self._containers.delete(runtime_id, self._identity.name)
        raise verdict from None


class Patience:
    """Waiting in growing steps for something that the engine does by itself, within a bound."""

    def __init__(self) -> None:
        self._until = asyncio.get_running_loop().time() + SETTLE_SECONDS
        self._step = POLL_FIRST

    async def a_little(self, complaint: str) -> None:
        """Wait one step; AttemptFailed with `complaint` when the bound is reached."""
        if asyncio.get_running_loop().time() > self._until:
            raise AttemptFailed("START_FAILED", complaint)
        await asyncio.sleep(self._step)
        self._step = min(self._step * 2, POLL_LONGEST)
