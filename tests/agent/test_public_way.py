"""The stand-in agent as the public server installs it: `/execd` and `/bootstrap.sh` are copied by archive calls, and
nothing else; `EXECD` is not set. `/execd` is a folder in it, which must do there as well as in a volume of ours.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import aiodocker
import aiohttp
import pytest

from app.cli.local_image import entry, tar
from tests.agent.image import ensure_agent_image
from tests.drivers.rig import BUSYBOX

pytestmark = pytest.mark.engine
Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]
FOLDER = "/opt/opensandbox"


@pytest.fixture
async def docker(engine: str) -> AsyncIterator[aiodocker.Docker]:
    async with aiodocker.Docker(engine) as docker:
        yield docker


def packed(archive: tarfile.TarFile) -> bytes:
    """The archive again, as bytes."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as out:
        for member in archive.getmembers():
            out.addfile(member, archive.extractfile(member) if member.isfile() else None)
    return made.getvalue()


async def fetched(docker: aiodocker.Docker, image: str) -> list[bytes]:
    """What the public server takes out of the agent's image."""
    helper = await docker.containers.create({"Image": image, "Entrypoint": ["/nothing"]}, name=f"helper-{uuid4()}")
    try:
        return [packed(await helper.get_archive(path)) for path in ("/execd", "/bootstrap.sh")]
    finally:
        await helper.delete(force=True)


async def test_the_folder_form(docker: aiodocker.Docker, eventually: Eventually):
    image = os.environ.get("SANDLEDGER_AGENT_IMAGE") or await ensure_agent_image(docker)
    files = await fetched(docker, image)
    config = {
        "Image": BUSYBOX,
        "Entrypoint": [f"{FOLDER}/bootstrap.sh"],
        "Cmd": ["sleep", "3600"],
        "Env": ["OPENSANDBOX_ID=x"],
        "ExposedPorts": {"44772/tcp": {}},
        "HostConfig": {"PortBindings": {"44772/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}},
    }
    container = await docker.containers.create(config, name=f"public-{uuid4()}")
    try:
        folders = [entry(name, tarfile.DIRTYPE, 0o755) for name in ("opt", "opt/opensandbox")]
        await container.put_archive("/", tar(folders))
        for each in files:
            await container.put_archive(FOLDER, each)
        await container.start()
        ports = (await container.show())["NetworkSettings"]["Ports"]
        place = ports["44772/tcp"][0]["HostPort"]

        async def answers() -> bool:
            try:
                async with aiohttp.request("GET", f"http://127.0.0.1:{place}/ping") as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        assert await eventually(answers)
    finally:
        await container.delete(force=True)
