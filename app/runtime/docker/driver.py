"""The Docker driver: `app.runtime.driver` over a Docker engine (API 1.41 or later, Docker 20.10).

Invariants.

* Verbs act on the container id that an inspect call has shown to be ours, never on a name. The id that the log knows
  comes before the name, so a container that a person has renamed is found, and a copy under its name is not taken for
  it.
* "None" was answered by the engine; anything less raises `RuntimeUnavailable`.
* No verb waits for what the engine does by itself: `ensure` never pulls, `remove` answers False while a removal that
  somebody else asked for is under way.
* `RuntimeUnavailable` is for an engine in trouble. An engine that answers and refuses is healthy, and other sandboxes
  must not wait for this one.

What the engine itself may miss: on cgroup v1 it watches the memory limit only from just after the start. Of programs
that run into it within their first milliseconds, about one in ten is reported with exit code 137 and nothing more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from uuid import UUID

import aiodocker
import aiohttp
import msgspec

from app.errors import SettingsError
from app.runtime.completion import to_completion
from app.runtime.docker import events, identity, inspection, names, output
from app.runtime.docker.agent import Agents
from app.runtime.docker.agent_clean import clean
from app.runtime.docker.answers import REMOVING, Inspected, observed
from app.runtime.docker.containers import Containers
from app.runtime.docker.engine import Engine, Refused
from app.runtime.docker.images import Images
from app.runtime.docker.network import prepare_network
from app.runtime.docker.options import DockerOptions, with_seccomp_document
from app.runtime.docker.placing import Placing
from app.runtime.docker.pull import Pulls
from app.runtime.docker.snapshots import SnapshotImages
from app.runtime.docker.spec import container_config
from app.runtime.docker.stillborn import judged
from app.runtime.docker.verdicts import power_verdict
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
    Pausing,
    Power,
    Progress,
    Ref,
    SnapshotImage,
    Workload,
)
from app.runtime.faults import AttemptFailed

DEFAULT_ADDRESS = "unix:///var/run/docker.sock"


class DockerDriver:
    """The verbs of `Driver` on one Docker engine."""

    kind = identity.KIND

    def __init__(self, docker: aiodocker.Docker, pulling: aiodocker.Docker, options: DockerOptions) -> None:
        """`pulling` is a second client of the same engine: a client has a limited number of connections, and pulls that
        hang must not take those of the other verbs.
        """
        self.name = options.name
        self.can = Capabilities(Pausing.FREEZE)
        self._docker = docker
        self._pulling = pulling
        self._options = with_seccomp_document(options)
        self._engine = Engine(docker, options.times)
        self._containers = Containers(self._engine, options.installation)
        self._images = Images(self._engine)
        self._snapshots = SnapshotImages(self._engine, Engine(pulling, options.times), options)
        self._agents = Agents(self._engine, self._containers, self._images, options.installation)
        self._pulls = Pulls(Engine(pulling, options.times), self._images, options.pull_timeout)

    async def ensure(self, workload: Workload) -> Observed:
        """Create or adopt, and start."""
        config = container_config(workload, self._options)
        placing = Placing(self._engine, self._containers, self._options.installation, workload, config)
        placed = await to_completion(placing.place())
        digest = await self._images.digest_of(placed.image_id, workload.image.reference)
        return await judged(self._engine, msgspec.structs.replace(placed, image_digest=digest))

    async def observe(self, ref: Ref) -> Observed | None:
        """Inspect one object."""
        found = await self._containers.ours(ref)
        if found is None:
            return None
        shown, whose = found
        seen = observed(shown, whose, digest=self._images.known_digest(shown.image, shown.config.image))
        return await judged(self._engine, seen)

    async def set_power(self, ref: Ref, power: Power) -> Observed | None:
        """Pause or unpause what runs; everything else is returned as it is."""
        verb, needed = {Power.PAUSED: ("pause", Power.RUNNING), Power.RUNNING: ("unpause", Power.PAUSED)}[power]
        before = await self.observe(ref)
        if before is None or before.main is None or before.power is not needed:
            return before
        refused: Refused | None = None
        try:
            path = f"containers/{before.main.runtime_id}/{verb}"
            await self._engine.command("POST", path, limit=self._engine.times.power)
        except Refused as error:
            refused = error
        after = await self.observe(ref)
        # The engine refuses what is already so, or has ended or gone meanwhile: then the second inspect call shows it.
        if refused is not None and after is not None and after.power is needed:
            raise power_verdict(power, before.main.name, refused)
        return after

    async def remove(self, ref: Ref) -> bool:
        """Kill and remove, anonymous volumes too."""
        found = await self._containers.named(ref.object_id)
        gone = found is None or await self._remove(*found)
        if found is not None and found[0].id == ref.runtime_id:
            return gone
        # The one that the log knows may run under a name that a person gave it.
        known = await self._containers.known(ref)
        return (known is None or await self._remove(*known)) and gone

    async def _remove(self, shown: Inspected, whose: names.Identity) -> bool:
        # A container that the engine is removing would answer a second request with "in progress".
        return shown.state.status != REMOVING and await self._containers.delete(shown.id, whose.name)

    async def inventory(self) -> AsyncIterator[Observed | Leftover | Misnamed]:
        """Everything of ours, by object."""
        for one in await self._containers.list():
            yield one

    async def remove_leftover(self, leftover: Leftover) -> None:
        """Take away what the inventory showed."""
        await self._containers.delete_leftover(leftover)

    async def hints(self) -> AsyncIterator[Hint | None]:
        """Objects that may have changed."""
        async for hint in events.hints(self._engine, self._options.installation, self._options.event_silence):
            yield hint

    async def fetch(self, image: Image, progress: Progress) -> FetchedImage:
        """Pull unless it is there."""
        return await self._pulls.fetch(image, progress)

    async def image(self, reference: str) -> FetchedImage | None:
        """Inspect an image."""
        shown = await self._images.show(reference)
        return None if shown is None else self._images.fetched(shown, reference)

    async def commit(self, ref: Ref, artifact: Artifact) -> CommittedImage:
        """Make an image of the object's files, without a pause."""
        found = await self._containers.ours(ref)
        if found is None:
            raise AttemptFailed("COMMIT_FAILED", "the engine has no container of the source")
        return await self._snapshots.commit(found[0].id, artifact)

    async def clean(self, artifact: Artifact, raw_id: str, source_image: str) -> SnapshotImage:
        """Load another configuration over the same layers."""
        return await self._snapshots.clean(artifact, raw_id, source_image)

    async def snapshot_images(self, snapshot_id: UUID | None = None) -> list[SnapshotImage]:
        """Images that bear our labels."""
        return await self._snapshots.list(snapshot_id)

    async def drop_image(self, image_id: str) -> None:
        """Untag and remove."""
        await self._snapshots.drop(image_id)

    async def install_agent(self, image: str) -> InstalledAgent:
        """Copy the agent's files unless they are there."""
        return await self._agents.install(image)

    async def clean_agents(self, keep: str, before: datetime) -> tuple[str, ...]:
        """Remove agents that no sandbox uses any more."""
        return await clean(self._engine, self._containers, self._options.installation, keep, before)

    async def prepare_network(self) -> OwnNetwork | None:
        """Make it unless it is there."""
        return await prepare_network(self._engine, self._options)

    async def logs(self, ref: Ref, *, tail: int, most: int, since: datetime | None = None) -> Logs | None:
        """The last lines of both streams."""
        found = await self._containers.ours(ref)
        return None if found is None else await output.last(self._engine, found[0].id, tail, most, since)

    async def inspect(self, ref: Ref) -> Inspection | None:
        """What the engine says of it."""
        found = await self._containers.ours(ref)
        return None if found is None else await inspection.inspect(self._engine, found[0].id, self._options)

    async def check(self) -> EngineInfo:
        """Ask the engine who it is."""
        return await identity.check(self._engine, self._options.installation, self.can)

    async def prepare(self, mark: str | None = None) -> EngineInfo:
        """Leave our mark unless it is there, then check."""
        await identity.leave_mark(self._engine, self._options.installation, mark)
        return await self.check()

    async def close(self) -> None:
        """Release connections."""
        await self._pulls.close()
        await self._pulling.close()
        await self._docker.close()


def connect(options: DockerOptions, docker_host: str | None) -> DockerDriver:
    """A driver for the engine at `docker_host`; None = DOCKER_HOST, the chosen Docker context, or the usual socket.

    Does not talk to the engine, so it succeeds while the engine is still down. Needs a running event loop.
    """
    options = with_seccomp_document(options)  # before there is a client that would have to be closed
    return DockerDriver(_client(options, docker_host), _client(options, docker_host), options)


def _client(options: DockerOptions, docker_host: str | None) -> aiodocker.Docker:
    timeout = aiohttp.ClientTimeout(total=options.api_timeout)
    try:
        return aiodocker.Docker(url=docker_host, timeout=timeout)
    except AssertionError:
        # The library asserts that some socket exists at this moment; the engine may come up later.
        return aiodocker.Docker(url=DEFAULT_ADDRESS, timeout=timeout)
    except (ValueError, OSError, ImportError, aiodocker.DockerError) as error:
        raise SettingsError(
            f"docker.host (or DOCKER_HOST): cannot be used ({error}); give a URL such as {DEFAULT_ADDRESS}"
        ) from None
