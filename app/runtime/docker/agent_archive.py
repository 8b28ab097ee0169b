"""The agent's files out of an image without a shell: copied by the engine's archive calls, which need no program.

Protocol. The helper of `app.runtime.docker.agent` cannot be started, so it stays `created`, and its state says nothing.
The files go through this process into the volume, one after the other, and last the file `.complete` with their names
and sizes in KiB. What has that file is complete.

An archive call does not replace a file in one step, and a sandbox may begin to use the volume as soon as `.complete` is
there. So only one process copies: the one that made the container `<name>-fill`, which never runs either. It removes
that when it is done. One that was left by a process that died is removed by the next one, when it is old.

How it fails. A process that is stopped for longer than that and goes on while another one copies may hand a sandbox
half of a file for a moment; its agent then does not start. Unlike in the helper's own copy, files are not forced to the
disk: a loss of power right after it may leave `.complete` without all that it speaks of. Remove the volume then.
"""

from __future__ import annotations

import io
import tarfile
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Final

import aiohttp

from app.runtime.docker.agent_files import MODE, PREPARE, REQUIRED, TARGET, WANTED
from app.runtime.docker.answers import Created
from app.runtime.docker.containers import Containers
from app.runtime.docker.engine import Engine, Refused, trouble
from app.runtime.docker.spec import ContainerConfig
from app.runtime.faults import AttemptFailed

COMPLETE: Final = ".complete"
SUFFIX: Final = "-fill"
"""Of the name of the container whose maker copies."""
_OLD: Final = 3
"""Longest calls after which a maker is taken for dead."""
_KIB: Final = 1024


class ArchiveCopy:
    """One copy, through the helper that cannot run."""

    def __init__(self, engine: Engine, containers: Containers, name: str, helper_id: str, reference: str) -> None:
        self._engine = engine
        self._containers = containers
        self._name = name
        self._helper_id = helper_id
        self._reference = reference

    async def listing(self) -> str | None:
        """Names and sizes of the files; None = they are not all there."""
        found = await self._get(f"{TARGET}/{COMPLETE}")
        return None if found is None else _content(found).decode(errors="replace")

    async def run(self, config: ContainerConfig) -> None:
        """Copy. `config` is the helper's.

        Raises:
            AttemptFailed: the image lacks a file, or another process copies.
        """
        fill_id = await self._claim(config)
        try:
            if await self.listing() is None:
                await self._copy()
        finally:
            await self._containers.delete(fill_id, self._name + SUFFIX)

    async def _claim(self, config: ContainerConfig) -> str:
        name = self._name + SUFFIX
        try:
            made = await self._engine.create("containers/create", config, Created, params={"name": name})
        except Refused as refused:
            if refused.status != HTTPStatus.CONFLICT:
                raise trouble(f"create the container {name}", refused) from None
        else:
            return made.id
        holder = await self._containers.show(name)
        limit = timedelta(seconds=_OLD * self._engine.times.change)
        ours = holder is not None and all(holder.labels.get(key) == value for key, value in config.labels.items())
        if holder is not None and ours and holder.created.astimezone(UTC) < datetime.now(UTC) - limit:
            await self._containers.delete(holder.id, name)
        raise AttemptFailed("AGENT_INSTALLING", f"another process copies the agent's files of {self._reference}")

    async def _copy(self) -> None:
        listed: list[str] = []
        for path in WANTED:
            packed = await self._get(path)
            if packed is None:
                if path in REQUIRED:
                    raise AttemptFailed("AGENT_IMAGE_INCOMPLETE", f"{self._reference}: the image lacks {path}")
                continue
            await self._put(_with_mode(packed))
            listed.append(f"{path.rpartition('/')[2]} {-(-len(packed) // _KIB)}\n")
        await self._put(_file("prepare.sh", PREPARE.encode()))
        await self._put(_file(COMPLETE, "".join(listed).encode()))

    async def _get(self, path: str) -> bytes | None:
        """A tar of what is there; None = nothing."""
        timeout, params = aiohttp.ClientTimeout(total=self._engine.times.change), {"path": path}
        try:
            async with self._engine.open("GET", self._place, params=params, timeout=timeout) as response:
                return await response.read()
        except Refused as refused:
            if refused.status == HTTPStatus.NOT_FOUND and "no such container" not in refused.message.lower():
                return None
            raise trouble(f"read {path} of the container {self._name}", refused) from None

    async def _put(self, packed: bytes) -> None:
        timeout, params = aiohttp.ClientTimeout(total=self._engine.times.change), {"path": TARGET}
        headers = {"Content-Type": "application/x-tar"}
        try:
            async with self._engine.open(
                "PUT", self._place, params=params, body=packed, headers=headers, timeout=timeout
            ) as response:
                await response.read()
        except Refused as refused:
            raise trouble(f"write to the volume {self._name}", refused) from None

    @property
    def _place(self) -> str:
        return f"containers/{self._helper_id}/archive"


def _content(packed: bytes) -> bytes:
    """Of the one file in a tar."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            if (file := archive.extractfile(member)) is not None:
                return file.read()
    return b""


def _with_mode(packed: bytes) -> bytes:
    """The same tar, in which what it is about may be executed by everybody, and belongs to root."""
    made = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(packed)) as archive,
        tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as out,
    ):
        for number, member in enumerate(archive.getmembers()):
            member.uid = member.gid = 0
            if number == 0:
                member.mode = MODE
            out.addfile(member, archive.extractfile(member) if member.isfile() else None)
    return made.getvalue()


def _file(name: str, content: bytes) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as out:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), MODE
        out.addfile(member, io.BytesIO(content))
    return made.getvalue()
