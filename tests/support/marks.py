"""What a worker leaves on an engine: its mark, our network. Tests share the engine, so each removes its own."""

from __future__ import annotations

from http import HTTPStatus
from uuid import UUID

import aiodocker

from app.runtime.docker import names


async def remove_mark(docker: aiodocker.Docker, installation: UUID) -> None:
    """The mark and the network of this installation. Those of others stay, whatever their names are."""
    for row in await docker.networks.list(filters={"label": [f"{names.INSTALLATION}={installation}"]}):
        try:
            await (await docker.networks.get(row["Id"])).delete()
        except aiodocker.DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
    found = await docker.volumes.list(filters={"label": [f"{names.INSTALLATION}={installation}"]})
    for volume in found["Volumes"] or []:
        try:
            await (await docker.volumes.get(volume["Name"])).delete()
        except aiodocker.DockerError as error:
            if error.status != HTTPStatus.NOT_FOUND:  # somebody removed it first
                raise
