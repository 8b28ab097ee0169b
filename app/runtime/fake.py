"""A container engine in memory, and its driver: the whole `Driver` protocol without containers.

Several `FakeDriver` on one `FakeEngine` are several servers on one engine. The driver makes the same calls in the same
order as the Docker one (create, pull, start, inspect, ...), and the same conformance suite runs against both.

Faults are put in from outside. `before(call)` is awaited before each call of one driver: it may wait (latency, a
barrier), raise `RuntimeUnavailable`, or raise anything else to play a crash at that point. `after(call)` is awaited
when the call has taken effect: what it raises is a reply that got lost. The engine itself can be `down`, answer an
`empty_listing`, drop its event streams, and let a container exit.

By convention images named `missing/...` are in no registry, and entrypoints below `/missing/` in no image.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeAlias
from uuid import UUID

import msgspec
from msgspec import Struct

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.completion import to_completion
from app.runtime.driver import Capabilities, EngineInfo, Exit, Observed, Power, Workload

Hook: TypeAlias = Callable[[str], Awaitable[None]]
Clock: TypeAlias = Callable[[], datetime]
RETRY_PAUSE = 0.01
KILLED = 137


def name_of(sandbox_id: UUID) -> str:
    """The name of a sandbox's container."""
    return f"sandbox-{sandbox_id}"


class FakeContainer(Struct, frozen=True):
    """One container. `sandbox_id` None = made by a stranger."""

    name: str
    runtime_id: str
    power: Power
    created_at: datetime
    installation: UUID | None = None
    sandbox_id: UUID | None = None
    work: Workload | None = None
    started_at: datetime | None = None
    exit: Exit | None = None


class FakeEngine:
    """What several drivers share. Tests read and set the public fields."""

    def __init__(self, clock: Clock = lambda: datetime.now(UTC)) -> None:
        self.containers: dict[str, FakeContainer] = {}
        """By name."""
        self.calls: Counter[str] = Counter()
        self.to_pull: set[str] = set()
        """Images that exist but are not on the engine yet; all others are."""
        self.scripts: dict[UUID, Exit] = {}
        """Workloads that end by themselves right after their start."""
        self.down = False
        self.empty_listing = False
        self._clock = clock
        self._streams: set[asyncio.Queue[FakeContainer | None]] = set()
        self._made = 0

    def of(self, sandbox_id: UUID) -> FakeContainer | None:
        """The container that has this sandbox's name."""
        return self.containers.get(name_of(sandbox_id))

    def make(self, name: str, work: Workload | None = None, installation: UUID | None = None) -> FakeContainer:
        """Create without start. Without `work` it is a stranger's."""
        self._made += 1
        sandbox_id = work.sandbox_id if work else None
        runtime_id = f"{self._made:064x}"
        made = FakeContainer(name, runtime_id, Power.CREATED, self._clock(), installation, sandbox_id, work)
        self.containers[name] = made
        return made

    def start(self, name: str) -> None:
        """Run what was created."""
        container = self.containers[name]
        # No hint: as with the real driver, a start that a driver makes is known to whoever asked for it.
        self.containers[name] = msgspec.structs.replace(container, power=Power.RUNNING, started_at=self._clock())
        ends = self.scripts.get(container.sandbox_id) if container.sandbox_id else None
        if ends is not None:
            self._change(self.containers[name], power=Power.EXITED, exit=_dated(ends, self._clock))

    def exit(self, sandbox_id: UUID, code: int = 0, *, oom: bool = False, message: str = "") -> None:
        """Let a workload end by itself."""
        ends = Exit(KILLED if oom else code, oom, message, self._clock())
        self._change(self.containers[name_of(sandbox_id)], power=Power.EXITED, exit=ends)

    def set_power(self, name: str, power: Power) -> None:
        """Pause or resume."""
        self._change(self.containers[name], power=power)

    def destroy(self, name: str) -> None:
        """Take away."""
        self._publish(self.containers.pop(name))

    def drop_streams(self) -> None:
        """Cut every event stream; the drivers open them again and miss nothing."""
        for stream in self._streams:
            stream.put_nowait(None)

    def open_stream(self) -> asyncio.Queue[FakeContainer | None]:
        """Events from now on."""
        stream: asyncio.Queue[FakeContainer | None] = asyncio.Queue()
        self._streams.add(stream)
        return stream

    @property
    def listeners(self) -> int:
        """How many event streams are open."""
        return len(self._streams)

    def close_stream(self, stream: asyncio.Queue[FakeContainer | None]) -> None:
        """No more events."""
        self._streams.discard(stream)

    def _change(
        self,
        container: FakeContainer,
        *,
        power: Power,
        exit: Exit | None = None,  # noqa: A002
    ) -> None:
        changed = msgspec.structs.replace(container, power=power, exit=exit)
        self.containers[container.name] = changed
        self._publish(changed)

    def _publish(self, container: FakeContainer) -> None:
        for stream in self._streams:
            stream.put_nowait(container)


class FakeDriver:
    """One server's view of a `FakeEngine`."""

    name = "fake"

    def __init__(
        self, engine: FakeEngine, installation: UUID, *, before: Hook | None = None, after: Hook | None = None
    ) -> None:
        self.can = Capabilities(pause=True)
        self.engine = engine
        self.installation = installation
        self.before = before
        self.after = after

    async def ensure(self, work: Workload) -> Observed:
        """Pull if absent, create or adopt, start."""
        placed = await to_completion(self._place(work))
        if placed is not None:
            return placed
        await self._enter("pull")
        if work.image.startswith("missing/"):
            raise RuntimeRejected("IMAGE_NOT_FOUND", f"manifest for {work.image} not found")
        self.engine.to_pull.discard(work.image)
        await self._leave("pull")
        placed = await to_completion(self._place(work))
        assert placed is not None, "the image has just been pulled"
        return placed

    async def observe(self, sandbox_id: UUID) -> Observed | None:
        """Look at one object."""
        await self._enter("inspect")
        seen = self._ours(sandbox_id)
        await self._leave("inspect")
        return None if seen is None else _observed(seen, sandbox_id)

    async def set_power(self, sandbox_id: UUID, power: Power) -> Observed | None:
        """Pause or resume what runs; everything else is returned as it is."""
        verb, needed = {Power.PAUSED: ("pause", Power.RUNNING), Power.RUNNING: ("unpause", Power.PAUSED)}[power]
        before = await self.observe(sandbox_id)
        if before is None or before.power is not needed:
            return before
        await self._enter(verb)
        found = self._ours(sandbox_id)
        if found is not None and found.power is needed:
            self.engine.set_power(found.name, power)
        await self._leave(verb)
        return await self.observe(sandbox_id)

    async def remove(self, sandbox_id: UUID) -> None:
        """Take away."""
        seen = await self.observe(sandbox_id)
        if seen is None:
            return
        await self._enter("remove")
        found = self._ours(sandbox_id)
        if found is not None and found.runtime_id == seen.runtime_id:
            self.engine.destroy(found.name)
        await self._leave("remove")

    async def inventory(self) -> AsyncIterator[Observed]:
        """Everything of ours, without exits, from one listing."""
        await self._enter("list")
        rows = [] if self.engine.empty_listing else list(self.engine.containers.values())
        await self._leave("list")
        for row in rows:
            if row.installation == self.installation and row.sandbox_id is not None:
                yield msgspec.structs.replace(_observed(row, row.sandbox_id), exit=None, started_at=None)

    async def hints(self) -> AsyncIterator[UUID | None]:
        """Ids that may have changed."""
        stream = self.engine.open_stream()
        anew = False
        try:
            while True:
                try:
                    await self._enter("events")
                except RuntimeUnavailable:
                    await asyncio.sleep(RETRY_PAUSE)
                    continue
                if anew:
                    yield None
                anew = True
                while (changed := await stream.get()) is not None:
                    if changed.installation == self.installation and changed.sandbox_id is not None:
                        yield changed.sandbox_id
        finally:
            self.engine.close_stream(stream)

    async def check(self) -> EngineInfo:
        """Ask the engine who it is."""
        await self._enter("version")
        await self._leave("version")
        return EngineInfo(self.name, "1", "fake", "memory")

    async def close(self) -> None:
        """Nothing to release."""

    async def _place(self, work: Workload) -> Observed | None:
        """Create or adopt, start, look; None = the image is missing. Not cut by a cancellation."""
        name = name_of(work.sandbox_id)
        while True:
            await self._enter("create")
            if work.image.startswith("missing/") or work.image in self.engine.to_pull:
                return None
            if name not in self.engine.containers:
                self.engine.make(name, work, self.installation)
                await self._leave("create")
                return await self._start(work, adopted=False)
            await self._leave("create")
            await self._enter("inspect")
            holder = self._ours(work.sandbox_id)
            if holder is not None and holder.power is Power.CREATED:
                return await self._start(work, adopted=True)
            if holder is not None:
                return _observed(holder, work.sandbox_id, adopted=True)
            if name in self.engine.containers:
                raise RuntimeRejected("NAME_TAKEN", f"{name} is somebody else's")

    async def _start(self, work: Workload, *, adopted: bool) -> Observed:
        await self._enter("start")
        created = self._ours(work.sandbox_id)
        if created is not None and created.power is Power.CREATED:
            program = work.entrypoint[0].partition(" ")[0]
            if program.startswith("/missing/"):
                self.engine.destroy(created.name)
                raise RuntimeRejected("ENTRYPOINT_NOT_FOUND", f"{program}: no such file or directory")
            self.engine.start(created.name)
        await self._leave("start")
        await self._enter("inspect")
        seen = self._ours(work.sandbox_id)
        if seen is None:
            raise RuntimeUnavailable(f"{name_of(work.sandbox_id)} vanished while it was started; try again")
        return _observed(seen, work.sandbox_id, adopted=adopted)

    def _ours(self, sandbox_id: UUID) -> FakeContainer | None:
        found = self.engine.of(sandbox_id)
        mine = found is not None and found.installation == self.installation and found.sandbox_id == sandbox_id
        return found if mine else None

    async def _enter(self, call: str) -> None:
        self.engine.calls[call] += 1
        if self.before is not None:
            await self.before(call)
        if self.engine.down:
            raise RuntimeUnavailable("the fake engine is down: set `down` to False")

    async def _leave(self, call: str) -> None:
        if self.after is not None:
            await self.after(call)


def _dated(ends: Exit, clock: Clock) -> Exit:
    return msgspec.structs.replace(ends, at=ends.at or clock())


def _observed(seen: FakeContainer, sandbox_id: UUID, *, adopted: bool = False) -> Observed:
    return Observed(
        sandbox_id=sandbox_id,
        runtime_id=seen.runtime_id,
        name=seen.name,
        power=seen.power,
        generation=seen.work.generation if seen.work else 1,
        image_digest=f"sha256:{seen.work.image}" if seen.work else None,
        created_at=seen.created_at,
        started_at=seen.started_at,
        exit=seen.exit,
        adopted=adopted,
    )
