"""The agent's files on the fake: the acts of `app.runtime.docker.agent`, in its order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeAlias
from uuid import UUID

from app.errors import RuntimeRejected
from app.runtime.driver import InstalledAgent, Power
from app.runtime.fake.engine import AGENT_FILES, INCOMPLETE_CODE, FakeContainer, FakeEngine, FakeVolume
from app.runtime.faults import AttemptFailed, ImageMissing

Enter: TypeAlias = Callable[[str], Awaitable[None]]
FILE_BYTES = 1 << 20


def agent_name(installation: UUID, image_id: str) -> str:
    """The volume, and the container that fills it."""
    return f"sandledger-agent-{installation.hex[:8]}-{image_id.removeprefix('sha256:')[:12]}"


class FakeAgents:
    """Installs agents on a `FakeEngine`."""

    def __init__(self, engine: FakeEngine, installation: UUID, enter: Enter, leave: Enter) -> None:
        self._engine = engine
        self._installation = installation
        self._enter = enter
        self._leave = leave
        self._one_by_one = asyncio.Lock()

    async def install(self, reference: str) -> InstalledAgent:
        """The files of this image, copied unless they are there."""
        async with self._one_by_one:
            await self._enter("image")
            image = self._engine.image(reference)
            await self._leave("image")
            if image is None:
                raise ImageMissing(reference, f"the engine does not have the agent image {reference}")
            return await self._run(reference, image.image_id, agent_name(self._installation, image.image_id))

    async def clean(self, keep: str, before: datetime) -> tuple[str, ...]:
        """Remove what no sandbox mounts, and was copied before that time."""
        await self._enter("volumes")
        await self._leave("volumes")
        mine = [name for name, each in self._engine.volumes.items() if each.installation == self._installation]
        removed = [name for name in mine if name != agent_name(self._installation, keep) and self._is_old(name, before)]
        for name in removed:
            await self._enter("remove")
            if name in self._engine.containers:
                self._engine.destroy(name)
            self._engine.volumes.pop(name, None)
            await self._leave("remove")
        return tuple(removed)

    def _is_old(self, name: str, before: datetime) -> bool:
        helper = self._engine.containers.get(name)
        works = [each.work for each in self._engine.containers.values() if each.work is not None]
        used = any(work.agent is not None and work.agent.volume == name for work in works)
        return not used and (helper is None or (helper.power is not Power.RUNNING and helper.created_at < before))

    async def _run(self, reference: str, image_id: str, name: str) -> InstalledAgent:
        filled = False
        while True:
            await self._enter("inspect")
            helper = self._engine.containers.get(name)
            await self._leave("inspect")
            if helper is None:
                await self._make(name)
                continue
            if helper.installation != self._installation:
                raise RuntimeRejected("NAME_TAKEN", f"the container {name} exists and is not ours")
            if helper.power is Power.CREATED:
                filled = True
                await self._fill(name, reference)
                continue
            if helper.exit is None:
                raise AttemptFailed("AGENT_INSTALLING", f"the container {name} copies the agent's files")
            await self._enter("logs")
            await self._leave("logs")
            if helper.exit.code == 0:
                return InstalledAgent(
                    image_id, name, AGENT_FILES, FILE_BYTES * len(AGENT_FILES), helper.runtime_id, filled
                )
            await self._clear(helper)
            if filled and helper.exit.code == INCOMPLETE_CODE:
                raise AttemptFailed("AGENT_IMAGE_INCOMPLETE", f"{reference}: the image lacks /{AGENT_FILES[0]}")
            if filled:
                raise AttemptFailed("AGENT_INSTALLING", f"the copy ended with exit code {helper.exit.code}")

    async def _make(self, name: str) -> None:
        await self._enter("make_volume")
        volume = self._engine.volumes.setdefault(name, FakeVolume(self._installation))
        await self._leave("make_volume")
        if volume.installation != self._installation:
            raise RuntimeRejected("NAME_TAKEN", f"the volume {name} exists and is not ours")
        await self._enter("create")
        if name not in self._engine.containers:
            self._engine.make(name, installation=self._installation)
        await self._leave("create")

    async def _fill(self, name: str, reference: str) -> None:
        await self._enter("start")
        helper = self._engine.containers.get(name)
        if helper is not None and helper.power is not Power.RUNNING:
            self._engine.start_fill(name, incomplete=reference.startswith("bare/"))
        await self._leave("start")
        await self._enter("wait")
        if (copy := self._engine.fills.get(name)) is not None:
            await asyncio.shield(copy)
        await self._leave("wait")

    async def _clear(self, helper: FakeContainer) -> None:
        await self._enter("remove")
        if self._engine.containers.get(helper.name) is helper:
            self._engine.destroy(helper.name)
        await self._leave("remove")
