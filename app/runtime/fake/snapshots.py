"""Images of snapshots on the fake: the acts of `app.runtime.docker.snapshots`, in its order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias
from uuid import UUID

from app.errors import RuntimeRejected
from app.runtime.driver import Artifact, CommittedImage, SnapshotImage
from app.runtime.fake.engine import FakeContainer, FakeEngine, FakeImage
from app.runtime.faults import AttemptFailed

Enter: TypeAlias = Callable[[str], Awaitable[None]]
Refuse: TypeAlias = Callable[[str], None]


class FakeSnapshots:
    """Makes images of snapshots on a `FakeEngine`."""

    def __init__(self, engine: FakeEngine, installation: UUID, enter: Enter, leave: Enter, refuse: Refuse) -> None:
        self._engine = engine
        self._installation = installation
        self._enter = enter
        self._leave = leave
        self._refuse = refuse

    async def commit(self, source: FakeContainer | None, artifact: Artifact) -> CommittedImage:
        """The engine goes on with it when the caller has gone."""
        await self._enter("commit")
        self._refuse("commit")
        if source is None:
            raise AttemptFailed("COMMIT_FAILED", "the engine has no container of the source")
        image = await asyncio.shield(self._engine.begin_commit(source, artifact, self._installation))
        await self._leave("commit")
        return CommittedImage(image.image_id, image.layer)

    async def clean(self, artifact: Artifact, raw_id: str, source_image: str) -> SnapshotImage:
        """The image for use."""
        await self._enter("image")
        raw = self._engine.snapshots.get(raw_id)
        source = self._engine.snapshots.get(source_image) or source_image in self._engine.image_ids
        await self._leave("image")
        if raw is None or not source:
            which = "of the commit" if raw is None else "that the source was made from"
            raise RuntimeRejected("SNAPSHOT_IMAGE_MISSING", f"the engine does not have the image {which} any more")
        await self._enter("load")
        self._refuse("load")
        image = self._engine.load(raw, artifact)
        await self._leave("load")
        return _shown(image)

    async def list(self, snapshot_id: UUID | None) -> list[SnapshotImage]:
        """Those of one snapshot, or all of ours."""
        await self._enter("images")
        found = [] if self._engine.empty_listing else list(self._engine.snapshots.values())
        await self._leave("images")
        ours = [image for image in found if image.installation == self._installation]
        return [_shown(image) for image in ours if snapshot_id in (None, image.artifact.snapshot_id)]

    async def drop(self, image_id: str) -> None:
        """Unless a container uses it."""
        await self._enter("drop_image")
        self._refuse("drop_image")
        containers = self._engine.containers.values()
        if any(one.work is not None and one.work.image.reference == image_id for one in containers):
            raise AttemptFailed("IMAGE_IN_USE", f"a container uses {image_id}")
        self._engine.snapshots.pop(image_id, None)
        await self._leave("drop_image")


def _shown(image: FakeImage) -> SnapshotImage:
    artifact = image.artifact
    size = image.size_bytes
    return SnapshotImage(artifact.snapshot_id, image.image_id, image.raw, size, image.made_at, artifact.position)
