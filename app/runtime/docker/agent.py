"""The agent's files on an engine: copied once for each image id into a volume that sandboxes mount read-only.

Protocol. A helper container of the agent image fills the volume; both have one name, which is derived from the image's
id. What the helper does says how far it is, and each state leads to one act:

============== ==================================================
absent         make the volume unless it is there, then the helper
`created`      start it, and wait for its end
running        another process has it filled: `AGENT_INSTALLING`
`exited(0)`    complete
exited, other  remove it; then it is absent
============== ==================================================

So every act may be repeated by any process, and a process may die between any two. The helper stays: the engine removes
no volume that a container uses.

Invariants.

* The image is named by its id. A moved tag leads to another volume, and running sandboxes keep theirs.
* Each file is copied beside its place and renamed. A second fill (two processes start the helper, or somebody removed
  it) leaves running agents their files, and a new sandbox sees the old file or the new one, never half of one.
* All is on the disk before the helper ends, so that `exited(0)` outlives a loss of power together with the files.

How it fails. The helper's output is the message. An image without `/bin/sh` cannot run the helper, which then stays
`created`: its files are copied by archive calls (`app.runtime.docker.agent_archive`).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus
from uuid import UUID

from app.domain.text import storable
from app.errors import RuntimeFault, RuntimeRejected, RuntimeUnavailable
from app.runtime.docker import names
from app.runtime.docker.agent_archive import ArchiveCopy
from app.runtime.docker.agent_files import FILL, INCOMPLETE_CODE, PREPARE, SHELL, TARGET
from app.runtime.docker.answers import REMOVING, Created, Inspected, Volume
from app.runtime.docker.containers import Containers
from app.runtime.docker.engine import Engine, Refused, Silence, trouble
from app.runtime.docker.identity import VolumeConfig
from app.runtime.docker.images import Images
from app.runtime.docker.output import output
from app.runtime.docker.placing import Patience
from app.runtime.docker.spec import ContainerConfig, HostConfig, LogConfig, Mount, VolumeOptions
from app.runtime.docker.verdicts import ABSENT, has_any, is_image_missing
from app.runtime.driver import InstalledAgent
from app.runtime.faults import AttemptFailed, ImageMissing

OUTPUT_LINES = 50
KIB = 1024
PIDS_LIMIT = 64


class Agents:
    """Installs agents on one engine."""

    def __init__(self, engine: Engine, containers: Containers, images: Images, installation: UUID) -> None:
        self._engine = engine
        self._containers = containers
        self._images = images
        self._installation = installation
        self._one_by_one = asyncio.Lock()
        """Within a process, who comes later waits and finds the work done."""

    async def install(self, reference: str) -> InstalledAgent:
        """The files of this image, copied unless they are there."""
        async with self._one_by_one:
            shown = await self._images.show(reference)
            if shown is None:
                raise ImageMissing(reference, f"the engine does not have the agent image {reference}")
            return await Install(self._engine, self._containers, self._installation, reference, shown.id).run()


class Install:
    """One call: the table of the protocol."""

    def __init__(
        self, engine: Engine, containers: Containers, installation: UUID, reference: str, image_id: str
    ) -> None:
        self._engine = engine
        self._containers = containers
        self._installation = installation
        self._reference = reference
        self._image_id = image_id
        self._name = names.agent_name(installation, image_id)
        self._labels = names.agent_labels(installation)
        self._filled = False

    async def run(self) -> InstalledAgent:
        """Inspect and act, until it is complete."""
        wait = Patience()
        while True:
            helper = await self._containers.show(self._name)
            if helper is None:
                await self._make_volume()
                if not await self._make_helper():
                    await wait.a_little(f"the engine keeps the name {self._name} of a container that it does not show")
                continue
            if not names.is_agent(helper.labels, self._installation):
                raise self._taken("container")
            match helper.state.status:
                case "created" if not await self._fill(helper.id):
                    return await self._copied(helper)
                case "created":
                    pass  # the next inspect call shows how it went
                case "exited" if helper.state.exit_code == 0:
                    return await self._installed(helper)
                case "exited" | "dead":
                    await self._clear(helper)
                case status if status == REMOVING:
                    await wait.a_little(f"the engine still removes the container {self._name}")
                case _:
                    raise self._under_way()

    async def _make_volume(self) -> None:
        config = VolumeConfig(self._name, self._labels)
        try:
            volume = await self._engine.create("volumes/create", config, Volume, limit=self._engine.times.volume)
        except Refused as refused:
            raise trouble(f"make the volume {self._name}", refused) from None
        if not names.is_agent(volume.labels or {}, self._installation):
            raise self._taken("volume")

    async def _make_helper(self) -> bool:
        """False: somebody has the name."""
        config, params = helper_config(self._image_id, self._name, self._labels), {"name": self._name}
        try:
            await self._engine.create("containers/create", config, Created, params=params)
        except Refused as refused:
            if refused.status == HTTPStatus.CONFLICT:
                return False
            if is_image_missing(refused):
                raise ImageMissing(self._reference, storable(refused.message)) from None
            raise self._refused("create", refused) from None
        return True

    async def _fill(self, runtime_id: str) -> bool:
        """False: the image has no shell that could copy."""
        try:
            await self._engine.command("POST", f"containers/{runtime_id}/start")
            self._filled = True
            await self._engine.command("POST", f"containers/{runtime_id}/wait")
        except Silence:
            raise self._under_way() from None
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND and "no such container" in refused.message.lower():
                return True  # somebody removed it; the next inspect call shows that
            if not refused.is_engine_trouble and SHELL in refused.message and has_any(refused.message, ABSENT):
                return False
            verdict = self._refused("start", refused)
            if not isinstance(verdict, RuntimeUnavailable):
                with suppress(RuntimeFault):
                    await self._containers.delete(runtime_id, self._name)
            raise verdict from None
        return True

    async def _copied(self, helper: Inspected) -> InstalledAgent:
        """Without a shell."""
        copy = ArchiveCopy(self._engine, self._containers, self._name, helper.id, self._reference)
        listing = await copy.listing()
        if listing is None:
            try:
                await copy.run(helper_config(self._image_id, self._name, self._labels))
            except AttemptFailed as failed:
                if failed.reason == "AGENT_IMAGE_INCOMPLETE":
                    await self._containers.delete(helper.id, self._name)
                raise
            self._filled, listing = True, await copy.listing()
        return self._answer(helper, listing or "")

    async def _clear(self, helper: Inspected) -> None:
        """Remove a helper that failed. Raise what it said if this call had started it; else try again at once."""
        said = storable((await self._output(helper.id)).strip())
        await self._containers.delete(helper.id, self._name)
        if self._filled and helper.state.exit_code == INCOMPLETE_CODE:
            raise AttemptFailed("AGENT_IMAGE_INCOMPLETE", f"{self._reference}: {said}")
        if self._filled:
            code = helper.state.exit_code
            raise AttemptFailed(
                "AGENT_INSTALLING", f"the copy of the files of {self._reference} ended with exit code {code}: {said}"
            )

    async def _installed(self, helper: Inspected) -> InstalledAgent:
        return self._answer(helper, await self._output(helper.id))

    def _answer(self, helper: Inspected, listing: str) -> InstalledAgent:
        words = (line.split() for line in listing.splitlines())
        sizes = {line[0]: int(line[1]) * KIB for line in words if len(line) == 2 and line[1].isdecimal()}  # noqa: PLR2004
        return InstalledAgent(self._image_id, self._name, tuple(sizes), sum(sizes.values()), helper.id, self._filled)

    async def _output(self, runtime_id: str) -> str:
        try:
            return await output(self._engine, runtime_id, lines=OUTPUT_LINES)
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return ""
            raise trouble(f"show the output of {self._name}", refused) from None

    def _under_way(self) -> AttemptFailed:
        return AttemptFailed(
            "AGENT_INSTALLING", f"the container {self._name} copies the agent's files; if it hangs, remove it"
        )

    def _taken(self, what: str) -> RuntimeRejected:
        return RuntimeRejected("NAME_TAKEN", f"the {what} {self._name} exists and is not ours: remove it, or rename it")

    def _refused(self, verb: str, refused: Refused) -> RuntimeFault:
        message = storable(refused.message)
        if refused.is_engine_trouble:
            return trouble(f"{verb} the container {self._name}", refused, message)
        return AttemptFailed("AGENT_INSTALLING", f"the engine did not {verb} the container {self._name}: {message}")


def helper_config(image_id: str, name: str, labels: dict[str, str]) -> ContainerConfig:
    """The container that copies. It has no network, may write to the volume only, and is root without privileges."""
    return ContainerConfig(
        image=image_id,
        entrypoint=(SHELL,),
        cmd=("-c", FILL),
        env=(f"PREPARE={PREPARE}",),
        labels=labels,
        user="0:0",  # the image's own user could not write to the volume
        host_config=HostConfig(
            network_mode="none",
            log_config=LogConfig("json-file", {"max-size": "1m", "max-file": "1"}),
            cap_drop=("ALL",),
            security_opt=("no-new-privileges",),
            pids_limit=PIDS_LIMIT,
            # With labels, because the engine makes the volume again if somebody removed it a moment ago.
            mounts=(Mount(name, TARGET, VolumeOptions(labels)),),
            readonly_rootfs=True,
        ),
    )
