"""The driver of the fake: the calls of the Docker driver, in its order.

Faults are put in from outside. `before(call)` is awaited before each call of one driver: it may wait (latency, a
barrier), raise `RuntimeUnavailable`, or raise anything else to play a crash at that point. `after(call)` is awaited
when the call has taken effect: what it raises is a reply that got lost. What the engine itself does wrong is set there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from typing import TypeAlias
from uuid import UUID, uuid4

from msgspec.structs import replace

from app.domain.engine.events import Capacity
from app.errors import RuntimeFault, RuntimeRejected, RuntimeUnavailable
from app.runtime.completion import to_completion
from app.runtime.driver import (
    Artifact,
    Capabilities,
    CommittedImage,
    EngineInfo,
    FetchedImage,
    Hint,
    Image,
    Inspection,
    InstalledAgent,
    Leftover,
    Logs,
    Misnamed,
    Observed,
    OwnNetwork,
    Power,
    Progress,
    Ref,
    SnapshotImage,
    Workload,
)
from app.runtime.fake import looks
from app.runtime.fake.agent import FakeAgents
from app.runtime.fake.engine import FakeContainer, FakeEngine, FakeVolume, Pull, name_of
from app.runtime.fake.network import FakeNetwork
from app.runtime.fake.snapshots import FakeSnapshots
from app.runtime.faults import AgentMissing, AttemptFailed, ImageMissing
from app.runtime.flights import Flights

Hook: TypeAlias = Callable[[str], Awaitable[None]]
RETRY_PAUSE_SECONDS = 0.01
MAX_REPEATED_STARTS = 8
CAPACITY = Capacity(4_000_000_000, 8 << 30)


class FakeDriver:
    """One server's view of a `FakeEngine`."""

    kind = "fake"

    def __init__(
        self,
        engine: FakeEngine,
        installation: UUID,
        *,
        before: Hook | None = None,
        after: Hook | None = None,
        name: str = "fake",
        subnet: str = "",  # of our own network; empty = sandboxes stand on another
    ) -> None:
        self.name = name
        self.can = Capabilities()
        self.engine = engine
        self.installation = installation
        self.before = before
        self.after = after
        self._fetches: Flights[Image, FetchedImage | RuntimeFault] = Flights()
        self._known: set[str] = set()
        self._network = FakeNetwork(engine, installation, subnet, self._enter, self._leave)
        self._agents = FakeAgents(engine, installation, self._enter, self._leave)
        self._snapshots = FakeSnapshots(engine, installation, self._enter, self._leave, self._refuse)

    async def ensure(self, workload: Workload) -> Observed:
        """Create or adopt, and start."""
        placed = await to_completion(self._place(workload))
        if workload.image.reference not in self._known:
            try:
                await self.image(workload.image.reference)
            except RuntimeUnavailable:
                return replace(placed, image_digest=None)
        return placed

    async def observe(self, ref: Ref) -> Observed | None:
        """Inspect one object."""
        await self._enter("inspect")
        found = self._ours(ref)
        await self._leave("inspect")
        return None if found is None else self._observed(found, ref.object_id)

    async def set_power(self, ref: Ref, power: Power) -> Observed | None:
        """Pause or resume what runs; everything else is returned as it is."""
        verb, needed = {Power.PAUSED: ("pause", Power.RUNNING), Power.RUNNING: ("unpause", Power.PAUSED)}[power]
        before = await self.observe(ref)
        if before is None or before.power is not needed:
            return before
        await self._enter(verb)
        found = self._ours(ref)
        refusal = self.engine.refusals.get(verb)
        if found is not None and found.power is needed and refusal is None:
            self.engine.set_power(found.name, power)
        await self._leave(verb)
        after = await self.observe(ref)
        if refusal is not None and after is not None and after.power is needed:
            raise _again(refusal)
        return after

    async def remove(self, ref: Ref) -> bool:
        """Remove the object."""
        observed = await self.observe(ref)
        if observed is None:
            return True
        found = self._ours(ref)
        if found is not None and found.removing:
            return False
        await self._enter("remove")
        self._refuse("remove")
        found = self._ours(ref)
        gone = True
        if found is not None and observed.main is not None and found.runtime_id == observed.main.runtime_id:
            gone = self.engine.remove(found.name)
        await self._leave("remove")
        # Where two were there, the one that has the name is left.
        again = gone and ref.runtime_id is not None and self._ours(ref) is not None
        return await self.remove(ref) if again else gone

    async def inventory(self) -> AsyncIterator[Observed | Leftover | Misnamed]:
        """Everything of ours, without exits, addresses and GPUs, from one listing."""
        await self._enter("list")
        rows = [] if self.engine.empty_listing else list(self.engine.containers.values())
        leftovers = [] if self.engine.empty_listing else list(self.engine.leftovers.values())
        await self._leave("list")
        for row in rows:
            object_id = row.object_id
            if object_id is None or row.installation != self.installation:
                continue
            shown = self._observed(row, object_id)
            shown = replace(shown, exit=None, started_at=None, address=None, image_digest=None, waiting=None, gpus=None)
            yield shown if row is self.engine.of(object_id) else Misnamed(shown)
        for installation, leftover in leftovers:
            if installation == self.installation:
                yield leftover

    async def remove_leftover(self, leftover: Leftover) -> None:
        """Take away what the inventory showed."""
        await self._enter("inspect")
        await self._leave("inspect")
        found = self.engine.leftovers.get(leftover.name)
        if found is not None and found[0] == self.installation and found[1].runtime_id == leftover.runtime_id:
            await self._enter("remove")
            self._refuse("remove")
            self.engine.leftovers.pop(leftover.name, None)
            await self._leave("remove")

    async def hints(self) -> AsyncIterator[Hint | None]:
        """Objects that may have changed."""
        stream = self.engine.open_stream()
        reopened = False
        try:
            while True:
                try:
                    await self._enter("events")
                except RuntimeUnavailable:
                    await asyncio.sleep(RETRY_PAUSE_SECONDS)
                    continue
                if reopened:
                    yield None
                reopened = True
                while (news := await stream.get()) is not None:
                    changed = news.container
                    if changed.installation == self.installation and changed.object_id is not None:
                        yield Hint(changed.object_id, changed.runtime_id, news.change, news.at)
        finally:
            self.engine.close_stream(stream)

    async def fetch(self, image: Image, progress: Progress) -> FetchedImage:
        """Pull unless it is there."""
        outcome = await self._fetches.join(image, lambda report: self._pull(image, report), progress)
        if isinstance(outcome, RuntimeFault):
            raise _again(outcome)
        return outcome

    async def image(self, reference: str) -> FetchedImage | None:
        """Inspect an image."""
        await self._enter("image")
        found = self.engine.image(reference)
        await self._leave("image")
        if found is not None:
            self._known.add(reference)
        return found

    async def commit(self, ref: Ref, artifact: Artifact) -> CommittedImage:
        """Make an image of the container."""
        return await self._snapshots.commit(self._ours(ref), artifact)

    async def clean(self, artifact: Artifact, raw_id: str, source_image: str) -> SnapshotImage:
        """Make the image for use."""
        return await self._snapshots.clean(artifact, raw_id, source_image)

    async def snapshot_images(self, snapshot_id: UUID | None = None) -> list[SnapshotImage]:
        """Images of snapshots of ours."""
        return await self._snapshots.list(snapshot_id)

    async def drop_image(self, image_id: str) -> None:
        """Remove one."""
        await self._snapshots.drop(image_id)

    async def install_agent(self, image: str) -> InstalledAgent:
        """Copy the agent's files unless they are there."""
        return await self._agents.install(image)

    async def clean_agents(self, keep: str, before: datetime) -> tuple[str, ...]:
        """Remove agents that no sandbox uses any more."""
        return await self._agents.clean(keep, before)

    async def prepare_network(self) -> OwnNetwork | None:
        """Make it unless it is there."""
        return await self._network.prepare()

    async def logs(self, ref: Ref, *, tail: int, most: int, since: datetime | None = None) -> Logs | None:
        """The last lines that it wrote."""
        await self._enter("inspect")
        await self._leave("inspect")
        if self._ours(ref) is None:
            return None
        await self._enter("logs")
        found = self._ours(ref)
        await self._leave("logs")
        if found is None or found.removing:
            return None
        return looks.last(self.engine.written.get(found.name, ()), tail, most, since)

    async def inspect(self, ref: Ref) -> Inspection | None:
        """What the engine says of it."""
        await self._enter("inspect")
        found = self._ours(ref)
        await self._leave("inspect")
        return None if found is None else looks.inspection(found)

    async def check(self) -> EngineInfo:
        """Ask the engine who it is."""
        for call in ("version", "info", "mark"):
            await self._enter(call)
            await self._leave(call)
        mark = self.engine.marks.get(self.installation)
        return EngineInfo(self.kind, "1", "1.0", self.engine.engine_id, "memory", mark, self.can, CAPACITY, True)

    async def prepare(self, mark: str | None = None) -> EngineInfo:
        """Leave our mark unless it is there, then check."""
        await self._enter("make_volume")
        self.engine.marks.setdefault(self.installation, mark or uuid4().hex)
        await self._leave("make_volume")
        return await self.check()

    async def close(self) -> None:
        """End what still runs."""
        await self._fetches.close()

    async def _pull(self, image: Image, report: Progress) -> FetchedImage | RuntimeFault:
        try:
            if (found := await self.image(image.reference)) is not None:
                return found
            await self._enter("pull")
            script = self.engine.pulls.get(image.reference, Pull())
            for text in script.progress:
                report(text)
            if script.gate is not None:
                await script.gate.wait()
            self._refuse("pull")
            if script.fault is not None:
                return script.fault
            if image.reference.startswith("missing/"):
                return RuntimeRejected("IMAGE_NOT_FOUND", f"manifest for {image.reference} not found")
            self.engine.to_pull.discard(image.reference)
            await self._leave("pull")
            found = await self.image(image.reference)
            return found or AttemptFailed("IMAGE_PULL_FAILED", f"{image.reference} was pulled and is gone again")
        except RuntimeFault as fault:
            return fault

    async def _place(self, work: Workload) -> Observed:
        """Create or adopt, start, inspect. Not cut by a cancellation."""
        object_id, reference = work.ref.object_id, work.image.reference
        name = name_of(object_id)
        while True:
            await self._enter("create")
            self._refuse("create")
            if self.engine.image(reference) is None:
                raise ImageMissing(reference, f"No such image: {reference}")
            if name not in self.engine.containers and self._ours(work.ref) is None:
                self.engine.make(name, work, self.installation)
                await self._leave("create")
                return await self._start(work, adopted=False)
            await self._leave("create")
            await self._enter("inspect")
            holder = self._ours(work.ref)
            if holder is not None and holder.removing:
                raise AttemptFailed("START_FAILED", f"{name} is being removed")
            if holder is not None and holder.power is Power.CREATED:
                return await self._start(work, adopted=True)
            if holder is not None:
                return self._observed(holder, object_id, adopted=True)
            if name in self.engine.containers:
                raise RuntimeRejected("NAME_TAKEN", f"{name} is somebody else's")

    async def _start(self, work: Workload, *, adopted: bool) -> Observed:
        object_id = work.ref.object_id
        await self._enter_start(work)
        created = self._ours(work.ref)
        if created is not None and created.power is Power.CREATED and object_id not in self.engine.waiting:
            try:
                self._refuse("start")
                self._refuse_without_agent(work)
                self._network.refuse_address(work)
                program = work.entrypoint[0].partition(" ")[0]
                if program.startswith("/missing/"):
                    raise RuntimeRejected("ENTRYPOINT_NOT_FOUND", f"{program}: no such file or directory")
            except RuntimeFault:
                self.engine.destroy(created.name)
                raise
            self.engine.start(created.name)
        await self._leave("start")
        await self._enter("inspect")
        found = self._ours(work.ref)
        if found is None:
            raise AttemptFailed("START_FAILED", f"{name_of(object_id)} was removed while it was started")
        return self._observed(found, object_id, adopted=adopted)

    async def _enter_start(self, work: Workload) -> None:
        """Again and again while the port to publish is taken."""
        await self._enter("start")
        for repeats in range(MAX_REPEATED_STARTS + 1):
            if work.agent is None or not self.engine.starts_without_port:
                return
            self.engine.starts_without_port -= 1
            await self._leave("start")
            if repeats < MAX_REPEATED_STARTS:
                await self._enter("start")
        self.engine.destroy(name_of(work.ref.object_id))
        raise AttemptFailed("PORTS_EXHAUSTED", "the engine has no free port to publish")

    def _refuse_without_agent(self, work: Workload) -> None:
        if work.agent is not None:
            volume = self.engine.volumes.setdefault(work.agent.volume, FakeVolume(self.installation))
            if not volume.filled:
                raise AgentMissing("START_FAILED", f"the volume {work.agent.volume} does not hold the agent")

    def _ours(self, ref: Ref) -> FakeContainer | None:
        """By the id that the log knows, else by its name."""
        if (recorded := self._recorded(ref)) is not None:
            return recorded
        found = self.engine.of(ref.object_id)
        return found if found is not None and self._is_of(found, ref) else None

    def _recorded(self, ref: Ref) -> FakeContainer | None:
        found = self.engine.with_id(ref.runtime_id)
        return found if found is not None and self._is_of(found, ref) else None

    def _is_of(self, found: FakeContainer, ref: Ref) -> bool:
        return found.installation == self.installation and found.object_id == ref.object_id

    def _refuse(self, call: str) -> None:
        if (refusal := self.engine.refusals.get(call)) is not None:
            raise _again(refusal)

    def _observed(self, found: FakeContainer, object_id: UUID, *, adopted: bool = False) -> Observed:
        return looks.observed(self.engine, found, object_id, adopted=adopted)

    async def _enter(self, call: str) -> None:
        self.engine.calls[call] += 1
        if self.before is not None:
            await self.before(call)
        if self.engine.down:
            raise RuntimeUnavailable("the fake engine is down: set `down` to False")

    async def _leave(self, call: str) -> None:
        if self.after is not None:
            await self.after(call)


def _again(fault: RuntimeFault) -> RuntimeFault:
    """The same fault as a new object: one that several callers raise would gather all their tracebacks."""
    match fault:
        case ImageMissing():
            return type(fault)(fault.reference, str(fault))
        case AttemptFailed() | RuntimeRejected():
            return type(fault)(fault.reason, fault.message)
        case RuntimeUnavailable():
            return type(fault)(str(fault), retry_after=fault.retry_after)
        case _:
            return fault
