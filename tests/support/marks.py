"""The mark that a worker leaves on an engine. Tests share the engine, so each removes the marks of its own servers."""

from __future__ import annotations

from http import HTTPStatus
from uuid import UUID

import aiodocker

from app.runtime.docker import names


async def remove_mark(docker: aiodocker.Docker, installation: UUID) -> None:
    """The mark of this installation. Those of others stay, whatever their names are."""
    found = await docker.volumes.list(filters={"label": [f"{names.INSTALLATION}={installation}"]})
    for volume in found["Volumes"] or []:
        try:
            await (await docker.volumes.get(volume["Name"])).delete()
        except aiodocker.DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:  # somebody removed it first
                raise
