"""The engine of the fake: what several drivers share. Tests read and set the public fields, and play every accident.

By convention images named `missing/...` are in no registry, and entrypoints below `/missing/` in no image. An image in
`to_pull` exists and is not on the engine yet; all others are on it. Images named `bare/...` hold no agent, and those
named `noshell/...` no shell: a sandbox with an agent ends in them at once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import TypeAlias
from uuid import UUID, uuid4

import msgspec
from msgspec import Struct

from app.domain.sandbox.address import own_network
from app.domain.sandbox.diagnostics import LogLine
from app.domain.sandbox.observed import Address, Waiting
from app.errors import RuntimeFault
from app.runtime.driver import Artifact, Change, Exit, FetchedImage, Leftover, OwnNetwork, Power, Workload
from app.runtime.workload import AGENT_PORT, HTTP_PORT

Clock: TypeAlias = Callable[[], datetime]
KILLED_CODE = 137
INCOMPLETE_CODE = 3
AGENT_FILES = ("execd", "bootstrap.sh")
FIRST_PORT = 32768
IMAGE_BYTES = 1_000_000


def name_of(object_id: UUID) -> str:
    """The name of an object's container."""
    return f"sandbox-{object_id}"


class FakeContainer(Struct, frozen=True):
    """One container. `object_id` None = made by a stranger."""

    name: str
    runtime_id: str
    power: Power
    created_at: datetime
    installation: UUID | None = None
    object_id: UUID | None = None
    work: Workload | None = None
    started_at: datetime | None = None
    exit: Exit | None = None
    address: Address | None = None
    removing: bool = False
    """Somebody asked for its removal, and it is not gone yet."""


def is_stillborn(container: FakeContainer) -> bool:
    """Nothing can run in it: its agent needs a shell, and its image has none."""
    work = container.work
    return work is not None and work.agent is not None and work.image.reference.startswith("noshell/")


class News(Struct, frozen=True):
    """One event of the engine."""

    container: FakeContainer
    change: Change
    at: datetime


class Pull(Struct, frozen=True):
    """How the pull of one image goes."""

    progress: tuple[str, ...] = ()
    fault: RuntimeFault | None = None
    """Raised at its end: as a fresh one for each caller."""
    gate: asyncio.Event | None = None
    """Waited for between the progress and the end."""


class FakeVolume(Struct, frozen=True):
    """A volume with an agent's files. `installation` None = made by a stranger."""

    installation: UUID | None = None
    filled: bool = False


class FakeImage(Struct, frozen=True):
    """An image of a snapshot."""

    artifact: Artifact
    image_id: str
    layer: str
    """What the container had written, as far as the fake has files: its id and how often it was started."""
    raw: bool
    made_at: datetime
    installation: UUID
    env: dict[str, str] = {}
    """Of the source; only in raw ones."""
    size_bytes: int = IMAGE_BYTES


class FakeEngine:
    """An engine in memory that tests can break; several drivers may share it."""

    def __init__(self, clock: Clock = lambda: datetime.now(UTC)) -> None:
        self.containers: dict[str, FakeContainer] = {}
        """By name."""
        self.leftovers: dict[str, tuple[UUID, Leftover]] = {}
        """Parts without a `main`, by name, with their installation."""
        self.calls: Counter[str] = Counter()
        self.engine_id = str(uuid4())
        self.marks: dict[UUID, str] = {}
        """By installation."""
        self.to_pull: set[str] = set()
        """Images that exist but are not on the engine yet; all others are."""
        self.pulls: dict[str, Pull] = {}
        """How pulls go, by reference; the others succeed at once."""
        self.scripts: dict[UUID, Exit] = {}
        """Workloads that end by themselves right after their start."""
        self.waiting: dict[UUID, Waiting] = {}
        """Objects that are created and not started before `settle`."""
        self.refusals: dict[str, RuntimeFault] = {}
        """Calls that a healthy engine refuses, by name: `pause`, `unpause`, `remove`, `create`, `start`, `pull`,
        `commit`, `load`, `drop_image`."""
        self.networks: dict[UUID, OwnNetwork] = {}
        """Networks of ours, by installation."""
        self.taken: set[str] = set()
        """Addresses that strangers have."""
        self.volumes: dict[str, FakeVolume] = {}
        """By name."""
        self.fills: dict[str, asyncio.Task[None]] = {}
        """Copies of an agent's files, by the name of volume and helper."""
        self.snapshots: dict[str, FakeImage] = {}
        """Images of snapshots, by their ids."""
        self.commit_gate: asyncio.Event | None = None
        """Waited for by each commit, half way."""
        self.commits: set[asyncio.Task[FakeImage]] = set()
        """Under way. They end although their callers have gone."""
        self.image_ids: set[str] = set()
        """Ids of the images that were shown."""
        self.fill_gates: dict[str, asyncio.Event] = {}
        """Waited for by the copy of this name, half way."""
        self.written: dict[str, list[LogLine]] = {}
        """What containers wrote, by name. It goes with the container."""
        self.starts_without_port = 0
        """How many starts of sandboxes with an agent find their port taken."""
        self.gpus: int | None = None
        """How many GPUs "all" are. None = the engine does not say."""
        self.slow_removals = False
        """A removal is only begun; `finish_removals` ends it."""
        self.down = False
        self.empty_listing = False
        self._clock = clock
        self._streams: set[asyncio.Queue[News | None]] = set()
        self._made = 0
        self._published = 0

    def of(self, object_id: UUID) -> FakeContainer | None:
        """The container that has this object's name."""
        return self.containers.get(name_of(object_id))

    def with_id(self, runtime_id: str | None) -> FakeContainer | None:
        """The container that the engine knows by this id, whatever its name is."""
        return next((one for one in self.containers.values() if one.runtime_id == runtime_id), None)

    def write(self, object_id: UUID, *texts: str) -> None:
        """Its program writes these lines."""
        lines = self.written.setdefault(name_of(object_id), [])
        lines += [LogLine(self._clock().isoformat(), text) for text in texts]

    def rename(self, object_id: UUID, name: str) -> None:
        """From outside, as `docker rename`."""
        renamed = self.containers.pop(name_of(object_id))
        self.written[name] = self.written.pop(name_of(object_id), [])
        self.containers[name] = msgspec.structs.replace(renamed, name=name)

    def make(self, name: str, work: Workload | None = None, installation: UUID | None = None) -> FakeContainer:
        """Create without start. Without `work` it is a stranger's."""
        self._made += 1
        object_id = work.ref.object_id if work else None
        made = FakeContainer(name, f"{self._made:064x}", Power.CREATED, self._clock(), installation, object_id, work)
        self.containers[name] = made
        return made

    def start(self, name: str) -> None:
        """Run what was created."""
        # No hint: as with the real driver, a start that a driver makes is known to its caller.
        self._run(name)
        container = self.containers[name]
        ends = self.scripts.get(container.object_id) if container.object_id else None
        if is_stillborn(container):
            ends = Exit(1)
        if ends is not None:
            self.end(container, msgspec.structs.replace(ends, at=ends.at or self._clock()))

    def start_fill(self, name: str, *, incomplete: bool) -> None:
        """Start a helper, which copies the agent's files and ends by itself."""
        self._run(name)
        self.fills[name] = asyncio.create_task(self._fill(name, incomplete))

    async def _fill(self, name: str, incomplete: bool) -> None:
        if (gate := self.fill_gates.get(name)) is not None:
            await gate.wait()
        helper = self.containers.get(name)
        if helper is not None and helper.power is Power.RUNNING:
            if not incomplete:
                self.volumes[name] = FakeVolume(helper.installation, filled=True)
            self.end(helper, Exit(INCOMPLETE_CODE if incomplete else 0, at=self._clock()))

    def settle(self, object_id: UUID) -> None:
        """What was waiting is up now, as when the engine itself starts it."""
        self.waiting.pop(object_id, None)
        self.start(name_of(object_id))
        self._publish(self.containers[name_of(object_id)])

    def exit(self, object_id: UUID, code: int = 0, *, oom: bool = False, message: str = "") -> None:
        """Let a workload end by itself."""
        self.end(self.containers[name_of(object_id)], Exit(KILLED_CODE if oom else code, oom, message, self._clock()))

    def restart(self, object_id: UUID) -> None:
        """From outside, as `docker restart`: the same container is started again."""
        name = name_of(object_id)
        self.end(self.containers[name], Exit(KILLED_CODE, at=self._clock()))
        self._run(name)
        self._publish(self.containers[name])

    def lose_power(self, *, forgetting: Collection[UUID] = ()) -> None:
        """The host goes down and comes back: nothing runs any more, and there are no events about it.

        Of the objects in `forgetting` the disk has the create only, since they were so young.
        """
        for name, container in self.containers.items():
            if container.power not in (Power.RUNNING, Power.PAUSED):
                continue
            after = msgspec.structs.replace(
                container, power=Power.EXITED, exit=Exit(KILLED_CODE, at=self._clock()), address=None
            )
            if container.object_id in forgetting:
                after = msgspec.structs.replace(after, power=Power.CREATED, started_at=None, exit=None)
            self.containers[name] = after
        self.drop_streams()

    def become_another(self) -> None:
        """Another engine answers at this address: other id, no mark, nothing of ours."""
        self.engine_id = str(uuid4())
        self.marks.clear()
        self.containers.clear()
        self.volumes.clear()
        self.networks.clear()
        self.leftovers.clear()
        self.snapshots.clear()
        self.drop_streams()

    def set_power(self, name: str, power: Power) -> None:
        """Pause or resume."""
        changed = msgspec.structs.replace(self.containers[name], power=power, exit=None)
        self.containers[name] = changed
        self._publish(changed, Change.PAUSED if power is Power.PAUSED else Change.RESUMED)

    def remove(self, name: str) -> bool:
        """Take away, or only begin to. False = not gone yet."""
        if self.slow_removals:
            changed = msgspec.structs.replace(
                self.containers[name], removing=True, power=Power.EXITED, exit=Exit(KILLED_CODE, at=self._clock())
            )
            self.containers[name] = changed
            return False
        self.destroy(name)
        return True

    def finish_removals(self) -> None:
        """What was being removed is gone."""
        for container in [one for one in self.containers.values() if one.removing]:
            self.destroy(container.name)

    def destroy(self, name: str) -> None:
        """Remove a container behind the drivers' backs, as an outsider would."""
        self.written.pop(name, None)
        self._publish(self.containers.pop(name), Change.REMOVED)

    def leave(self, installation: UUID, leftover: Leftover) -> None:
        """Put a part without `main` there."""
        self.leftovers[leftover.name] = installation, leftover

    def image(self, reference: str) -> FetchedImage | None:
        """The image, if it is here."""
        if reference in self.snapshots:
            return FetchedImage(reference, None, self.snapshots[reference].size_bytes)
        if reference.startswith(("missing/", "sha256:")) or reference in self.to_pull:
            return None
        image_id = _digest(f"id of {reference}")
        self.image_ids.add(image_id)
        return FetchedImage(image_id, _digest(reference), IMAGE_BYTES)

    def begin_commit(self, source: FakeContainer, artifact: Artifact, installation: UUID) -> asyncio.Task[FakeImage]:
        """Make the raw image of a container."""
        task = asyncio.create_task(self._commit(source, artifact, installation))
        self.commits.add(task)
        task.add_done_callback(self.commits.discard)
        return task

    async def _commit(self, source: FakeContainer, artifact: Artifact, installation: UUID) -> FakeImage:
        if self.commit_gate is not None:
            await self.commit_gate.wait()
        self._made += 1
        layer = _digest(f"{source.runtime_id} {source.started_at}")
        env = source.work.env if source.work else {}
        image_id = _digest(f"raw {self._made}")
        made = FakeImage(artifact, image_id, layer, raw=True, made_at=self._clock(), installation=installation, env=env)
        self.snapshots[image_id] = made
        return made

    def load(self, raw: FakeImage, artifact: Artifact) -> FakeImage:
        """The same layers with another configuration."""
        image_id = _digest(f"{raw.layer} {artifact.snapshot_id}")
        self.snapshots[image_id] = msgspec.structs.replace(raw, image_id=image_id, raw=False, env={})
        return self.snapshots[image_id]

    def drop_streams(self) -> None:
        """Cut every event stream; the drivers open them again and miss nothing."""
        for stream in self._streams:
            stream.put_nowait(None)

    def open_stream(self) -> asyncio.Queue[News | None]:
        """A queue of all events from now on."""
        stream: asyncio.Queue[News | None] = asyncio.Queue()
        self._streams.add(stream)
        return stream

    @property
    def listeners(self) -> int:
        """How many event streams are open."""
        return len(self._streams)

    def close_stream(self, stream: asyncio.Queue[News | None]) -> None:
        """End an event stream."""
        self._streams.discard(stream)

    def _run(self, name: str) -> None:
        self.containers[name] = msgspec.structs.replace(
            self.containers[name],
            power=Power.RUNNING,
            started_at=self._clock(),
            exit=None,
            address=self._address(name),
        )

    def _address(self, name: str) -> Address:
        container = self.containers[name]
        work, ports = container.work, self._ports(name)
        if work is None or not work.ip or container.installation is None:
            return Address("fake", f"10.0.0.{self._made % 250 + 1}", ports)
        return Address(own_network(container.installation), work.ip, ports)

    def has_address(self, ip: str) -> bool:
        """Whether something has it that runs."""
        running = [each.address for each in self.containers.values() if each.address is not None]
        return ip in self.taken or any(address.ip == ip for address in running)

    def _ports(self, name: str) -> dict[str, str]:
        """Others than the last time, as on a real engine."""
        work = self.containers[name].work
        if work is None or work.agent is None:
            return {}
        self._published += 2
        first = FIRST_PORT + self._published
        return {AGENT_PORT: f"127.0.0.1:{first}", HTTP_PORT: f"127.0.0.1:{first + 1}"}

    def end(self, container: FakeContainer, end: Exit) -> None:
        """Let this container's workload end, whatever its name is."""
        changed = msgspec.structs.replace(container, power=Power.EXITED, exit=end, address=None)
        self.containers[container.name] = changed
        self._publish(changed)

    def _publish(self, container: FakeContainer, change: Change = Change.OTHER) -> None:
        news = News(container, change, self._clock())
        for stream in self._streams:
            stream.put_nowait(news)


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
