"""The images of snapshots, compared with the log as part of a sweep.

A listing is never a verdict: a snapshot that differs goes to the queue and its reconciler looks by itself. What
differs is a Ready snapshot without its image, or with it again; an image that should be gone, among them the images of
commits that an engine ended after all had given them up; and a snapshot that wants work and may have no queue row. An
image of a snapshot that the log does not know is a leftover, which the sweep treats as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from app.domain.snapshot.state import Snapshot, SnapshotState
from app.runtime.driver import Driver, Leftover, SnapshotImage
from app.store.queue.reconcile import BACKGROUND, Queue
from app.views.snapshots import SnapshotsView

SNAPSHOT, RAW = "snapshot", "raw"
"""Roles of leftovers that are images."""


class Artifacts:
    """The snapshots of one engine."""

    def __init__(self, driver: Driver, view: SnapshotsView, queue: Queue, page: int) -> None:
        """`page`: how many rows are read in one statement."""
        self._driver = driver
        self._view = view
        self._queue = queue
        self._page = page

    async def compare(self) -> list[Leftover]:
        """Have those that differ looked at. The answer is the images of unknown snapshots.

        Raises:
            RuntimeFault, StoreUnavailable: nothing was concluded.
        """
        images = await self._driver.snapshot_images()
        known = await self._view.some([image.snapshot_id for image in images])
        differing = {image.snapshot_id for image in images if _is_wrong(image, known)}
        usable = {image.image_id for image in images if not image.raw}
        after = UUID(int=0)
        while rows := await self._view.of_engine(self._driver.name, after, self._page):
            differing.update(snapshot.id for snapshot in rows if _wants_a_look(snapshot, usable))
            after = rows[-1].id
        if differing:
            await self._queue.enqueue_snapshots(sorted(differing), BACKGROUND)
        return [_leftover(image) for image in images if image.snapshot_id not in known]

    async def remove(self, leftover: Leftover) -> None:
        """Remove an image that `compare` answered."""
        await self._driver.drop_image(leftover.runtime_id)


def is_image(leftover: Leftover) -> bool:
    """Whether it came from here."""
    return leftover.role in (SNAPSHOT, RAW)


def _is_wrong(image: SnapshotImage, known: Mapping[UUID, Snapshot]) -> bool:
    snapshot = known.get(image.snapshot_id)
    if snapshot is None or snapshot.state is SnapshotState.CREATING:
        return False
    return image.raw or snapshot.state is not SnapshotState.READY


def _wants_a_look(snapshot: Snapshot, usable: set[str]) -> bool:
    if snapshot.state in (SnapshotState.CREATING, SnapshotState.DELETING):
        return True  # it has a row; if not, it gets one
    return snapshot.state is SnapshotState.READY and (snapshot.image_id in usable) is snapshot.is_missing


def _leftover(image: SnapshotImage) -> Leftover:
    role = RAW if image.raw else SNAPSHOT
    return Leftover(role, str(image.snapshot_id), image.image_id, image.snapshot_id, image.made_at, image.position)
