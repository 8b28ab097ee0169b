"""Images of snapshots: commit, clean, list, remove.

**Why an image is cleaned.** A commit takes over the labels and the whole environment of the container. The body of the
call can only add to them, and the engine's older image format keeps the container's configuration beside. So the
environment of the source, secrets among it, would stay on the disk and in every sandbox that is made from the image.
Therefore a second image is made of the same layers, with the configuration of the image that the *source was made
from*, and the first one is removed. The engine gets the new configuration by `load` of an archive that holds no layers:
it has them. That moves a few kilobytes, whatever the size of the image.

**Names and labels.** An image is ours by its labels. They are asked for, and not names, because a commit that was sent
twice moves the name to the later image, and the earlier one stays without.

**How it fails.** The engine goes on with a commit whose caller has gone, so an image may appear later; the sweep finds
it. The id of the cleaned image follows from the layers and the configuration, so a repeated `clean` makes the same one.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from uuid import UUID

import aiohttp
import msgspec
from msgspec import Struct

from app.domain.text import storable
from app.errors import RuntimeRejected
from app.runtime.docker import names
from app.runtime.docker.answers import Committed, ImageDetail, ImageListed, PullLine
from app.runtime.docker.engine import Engine, Refused, lines, trouble
from app.runtime.docker.options import DockerOptions
from app.runtime.driver import Artifact, CommittedImage, SnapshotImage
from app.runtime.faults import AttemptFailed

KEPT = (
    *("Cmd", "Entrypoint", "Env", "ExposedPorts", "Healthcheck", "OnBuild", "Shell", "StopSignal", "User"),
    *("Volumes", "WorkingDir"),
)
"""Of the configuration of the source's image, beside its labels."""
_PREFIX = "sandledger.io/"


class _Body(Struct, frozen=True, rename="pascal"):
    labels: dict[str, str]


class SnapshotImages:
    """Images of snapshots on one engine."""

    def __init__(self, engine: Engine, slow: Engine, options: DockerOptions) -> None:
        """`slow` has connections of its own, for calls that take long."""
        self._engine = engine
        self._slow = slow
        self._options = options

    async def commit(self, container_id: str, artifact: Artifact) -> CommittedImage:
        """Make the raw image of a container."""
        labels = self._labels(artifact, raw=True)
        params = {
            "container": container_id,
            "repo": names.SNAPSHOTS,
            "tag": names.snapshot_tag(artifact.snapshot_id, raw=True),
            "pause": "0",
        }
        try:
            made = await self._slow.create(
                "commit", _Body(labels), Committed, params=params, limit=self._options.commit_timeout
            )
            shown = await self._show(made.id)
        except Refused as refused:
            raise _verdict("COMMIT_FAILED", "commit the container", refused) from None
        layers = None if shown is None else shown.root_fs.layers
        if not layers:
            raise AttemptFailed(
                "COMMIT_FAILED", "the image of the commit was removed by another program, or has no layer"
            )
        return CommittedImage(made.id, layers[-1])

    async def clean(self, artifact: Artifact, raw_id: str, source_image: str) -> SnapshotImage:
        """Make the image for use."""
        raw, source = await self._show(raw_id), await self._show(source_image)
        if raw is None or source is None:
            which = "of the commit" if raw is None else "that the source was made from"
            raise RuntimeRejected("SNAPSHOT_IMAGE_MISSING", f"the engine does not have the image {which} any more")
        configuration = self._configuration(artifact, raw, source)
        wanted = f"sha256:{hashlib.sha256(configuration).hexdigest()}"
        name = f"{names.SNAPSHOTS}:{names.snapshot_tag(artifact.snapshot_id)}"
        layers = len(raw.root_fs.layers or ())
        await self._load(archive(configuration, name, layers))
        shown = await self._show(name)
        if shown is None or shown.id != wanted:
            found = "nothing" if shown is None else shown.id
            raise AttemptFailed("CLEAN_FAILED", f"the engine made {found} of the configuration of {wanted}")
        return SnapshotImage(artifact.snapshot_id, shown.id, raw=False, size_bytes=shown.size)

    async def list(self, snapshot_id: UUID | None) -> list[SnapshotImage]:
        """Those of one snapshot, or all of ours."""
        label = [f"{names.INSTALLATION}={self._options.installation}"]
        if snapshot_id is not None:
            label.append(f"{names.OBJECT}={snapshot_id}")
        params = {"filters": msgspec.json.encode({"label": label}).decode()}
        try:
            rows = await self._engine.ask(
                "images/json", list[ImageListed], params=params, limit=self._engine.times.change
            )
        except Refused as refused:
            raise trouble("list images", refused) from None
        return [found for row in rows if (found := self._listed(row)) is not None]

    async def drop(self, image_id: str) -> None:
        """Remove an image with its names in our repository."""
        shown = await self._show(image_id)
        if shown is None:
            return
        ours = [tag for tag in shown.repo_tags or () if tag.partition(":")[0] == names.SNAPSHOTS]
        for name in [*ours, shown.id]:
            await self._delete(name)

    async def _delete(self, name: str) -> None:
        try:
            await self._engine.command("DELETE", f"images/{name}", params={"noprune": "1"})
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return
            raise _verdict("IMAGE_IN_USE", "remove the image of a snapshot", refused) from None

    async def _show(self, name: str) -> ImageDetail | None:
        try:
            return await self._engine.ask(f"images/{name}/json", ImageDetail)
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND:
                return None
            raise trouble("show an image", refused) from None

    async def _load(self, body: bytes) -> None:
        timeout = aiohttp.ClientTimeout(total=self._engine.times.change)
        headers = {"Content-Type": "application/x-tar"}
        try:
            async with self._engine.open(
                "POST", "images/load", params={"quiet": "1"}, body=body, headers=headers, timeout=timeout
            ) as response:
                async for line in lines(response):
                    if failure := _failure(line):
                        raise AttemptFailed("CLEAN_FAILED", f"the engine did not load the image: {storable(failure)}")
        except Refused as refused:
            raise _verdict("CLEAN_FAILED", "load the image of a snapshot", refused) from None

    def _labels(self, artifact: Artifact, *, raw: bool) -> dict[str, str]:
        return names.snapshot_labels(
            self._options.installation,
            artifact.snapshot_id,
            raw=raw,
            tenant=artifact.tenant,
            position=artifact.position,
        )

    def _configuration(self, artifact: Artifact, raw: ImageDetail, source: ImageDetail) -> bytes:
        known = source.config or {}
        given: dict[str, str] = known.get("Labels") or {}
        labels = {name: text for name, text in given.items() if not name.startswith(_PREFIX)}
        kept = {name: known[name] for name in KEPT if known.get(name)}
        image: dict[str, Any] = {
            "architecture": raw.architecture,
            "os": raw.os,
            "created": artifact.made_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            "config": kept | {"Labels": labels | self._labels(artifact, raw=False)},
            "rootfs": {"type": "layers", "diff_ids": raw.root_fs.layers or []},
            "history": [],
        }
        if raw.variant:
            image["variant"] = raw.variant
        return msgspec.json.encode(image, order="sorted")

    def _listed(self, row: ImageListed) -> SnapshotImage | None:
        labels = row.labels or {}
        found = names.snapshot_in(labels, self._options.installation)
        if found is None:
            return None
        made_at = datetime.fromtimestamp(row.created, UTC)
        return SnapshotImage(found[0], row.id, found[1], row.size, made_at, names.position_in(labels))


def archive(configuration: bytes, name: str, layers: int) -> bytes:
    """What `load` takes: a configuration and its name. The layers are named and not there, because they are known."""
    file = f"{hashlib.sha256(configuration).hexdigest()}.json"
    manifest = [{"Config": file, "RepoTags": [name], "Layers": [f"{number}/layer.tar" for number in range(layers)]}]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, content in ((file, configuration), ("manifest.json", msgspec.json.encode(manifest))):
            info = tarfile.TarInfo(path)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _failure(line: bytes) -> str:
    try:
        return msgspec.json.decode(line, type=PullLine).failure
    except msgspec.DecodeError:
        return ""


def _verdict(reason: str, what: str, refused: Refused) -> Exception:
    if refused.is_engine_trouble:
        return trouble(what, refused)
    return AttemptFailed(reason, f"the engine did not {what}: {storable(refused.message)}")
