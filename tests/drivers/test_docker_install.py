"""How the Docker driver copies an agent's files, seen from behind its back."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any
from uuid import uuid4

import aiodocker
import aiohttp
import msgspec
import pytest

from app.agent import TOKEN_HEADER
from app.cli.local_image import ensure_local_image, entry, regular_file, root_filesystem, tar
from app.runtime import workload
from app.runtime.faults import AttemptFailed
from app.runtime.workload import Agent
from tests.agent.image import ensure_agent_image
from tests.drivers.looks import insist
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine
Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]
MakeImage = Callable[..., Awaitable[str]]
OPTIONAL = (
    "usr/local/bin/bwrap",
    "usr/local/libexec/opensandbox-session-gate",
    "usr/local/libexec/opensandbox-launcher",
)
FILES = [regular_file("execd", b"first"), regular_file("bootstrap.sh", b"#!/bin/sh\n")]
TOKEN = "t0ken-of-a-sandbox"


@pytest.fixture
async def make_image(docker_rig: DockerRig) -> AsyncIterator[MakeImage]:
    """Makes an image of these files, with a shell unless it says otherwise; removes it at the end."""
    made: list[str] = []

    async def make(*files: tuple[tarfile.TarInfo, bytes], shell: bool = True) -> str:
        made.append(f"sandledger-files-{uuid4().hex}:1")
        layers = [root_filesystem(), tar(list(files))] if shell else [tar(list(files))]
        return await ensure_local_image(docker_rig.direct, made[-1], lambda: layers)

    yield make
    await docker_rig.clear()
    for reference in made:
        await docker_rig.direct.images.delete(reference, force=True)


async def in_volume(rig: DockerRig, volume: str) -> dict[str, tuple[bytes, int]]:
    archive = await rig.direct.containers.container(volume).get_archive("/t")
    files = {each.name.removeprefix("t/"): each for each in archive.getmembers() if each.isfile()}
    return {name: (archive.extractfile(file).read(), file.mode & 0o7777) for name, file in files.items()}  # type: ignore[union-attr]


async def test_all_files_that_an_agent_may_have(docker_rig: DockerRig, make_image: MakeImage):
    folders = [entry(name, tarfile.DIRTYPE, 0o755) for name in ("usr/local", "usr/local/bin", "usr/local/libexec")]
    image = await make_image(
        *FILES, *folders[:1], *folders[2:], *(regular_file(name, name.encode()) for name in OPTIONAL[1:])
    )
    installed = await docker_rig.driver.install_agent(image)
    names = [name.rpartition("/")[2] for name in OPTIONAL[1:]]
    assert installed.files == ("execd", "bootstrap.sh", *names), "bwrap is not there, and not missed"
    found = await in_volume(docker_rig, installed.volume)
    assert set(found) == {*installed.files, "prepare.sh"}, "nothing half done is left"
    assert found["execd"] == (b"first", 0o755)
    assert {mode for _, mode in found.values()} == {0o755}


async def test_the_copy_has_few_rights(docker_rig: DockerRig, make_image: MakeImage):
    installed = await docker_rig.driver.install_agent(await make_image(*FILES))
    helper = await docker_rig.inspect(installed.volume)
    assert helper is not None
    host = helper["HostConfig"]
    assert (host["NetworkMode"], host["CapDrop"], host["CapAdd"]) == ("none", ["ALL"], None)
    assert (host["ReadonlyRootfs"], host["Privileged"], host["SecurityOpt"]) == (True, False, ["no-new-privileges"])
    assert host["LogConfig"]["Type"] == "json-file", "its output is read, whatever the engine's default is"


async def test_the_engine_does_not_remove_the_volume(docker_rig: DockerRig, make_image: MakeImage):
    installed = await docker_rig.driver.install_agent(await make_image(*FILES))
    with pytest.raises(aiodocker.DockerError, match="409"):
        await (await docker_rig.direct.volumes.get(installed.volume)).delete()


async def test_a_tag_that_moves_is_another_agent(docker_rig: DockerRig, make_image: MakeImage):
    image, newer = await make_image(*FILES), await make_image(regular_file("execd", b"second"), FILES[1])
    old = await docker_rig.driver.install_agent(image)
    name, _, tag = image.partition(":")
    await docker_rig.direct.images.tag(newer, name, tag=tag)
    new = await docker_rig.driver.install_agent(image)
    assert (new.made, new.volume == old.volume) == (True, False)
    assert (await in_volume(docker_rig, old.volume))["execd"][0] == b"first"
    assert (await in_volume(docker_rig, new.volume))["execd"][0] == b"second"
    await docker_rig.clear()
    with suppress(aiodocker.DockerError):  # it has no name any more, so anybody may have removed it
        await docker_rig.direct.images.delete(old.image_id, force=True)


async def test_an_image_without_a_shell(docker_rig: DockerRig, make_image: MakeImage):
    image = await make_image(*FILES, shell=False)
    for _ in range(2):
        with pytest.raises(AttemptFailed, match="lacks /bin/sh") as caught:
            await docker_rig.driver.install_agent(image)
        assert caught.value.reason == "AGENT_IMAGE_INCOMPLETE"


async def test_a_copy_that_hangs_is_given_back(docker_rig: DockerRig):
    slow = await docker_rig.slow_agent()
    hasty = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, api_timeout=3.0))
    with pytest.raises(AttemptFailed, match="if it hangs, remove it") as caught:
        await hasty.install_agent(slow.reference)
    assert caught.value.reason == "AGENT_INSTALLING"
    await slow.finish()


async def test_a_second_copy_leaves_running_agents_alone(docker_rig: DockerRig, eventually: Eventually):
    """Somebody has removed the helper, and another worker has the files copied again."""
    image = await ensure_agent_image(docker_rig.direct)
    volume = (await docker_rig.driver.install_agent(image)).volume
    work = docker_rig.work(agent=Agent(volume, TOKEN))
    seen = await docker_rig.driver.ensure(work)
    assert seen.address is not None
    place = seen.address.ports[workload.AGENT_PORT]

    async def answers() -> bool:
        try:
            async with aiohttp.request("GET", f"http://{place}/metrics", headers={TOKEN_HEADER: TOKEN}) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    await eventually(answers)
    await docker_rig.direct.containers.container(volume).delete()
    again = await docker_rig.driver.install_agent(image)
    assert (again.volume, again.made) == (volume, True)
    assert not [name for name in await in_volume(docker_rig, volume) if ".new" in name]
    assert await answers()
    other = docker_rig.work(agent=Agent(volume, TOKEN))
    seen = await docker_rig.driver.ensure(other)
    assert seen.address is not None
    place = seen.address.ports[workload.AGENT_PORT]
    assert await eventually(answers)


async def test_the_copy_is_no_work_of_a_cancelled_caller_only(docker_rig: DockerRig):
    """A caller that is cancelled in the middle leaves what the next one finishes."""
    slow = await docker_rig.slow_agent()
    copying = asyncio.create_task(docker_rig.driver.install_agent(slow.reference))
    await slow.reached()
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    with pytest.raises(AttemptFailed, match="AGENT_INSTALLING"):
        await docker_rig.driver.install_agent(slow.reference)
    await slow.finish()
    assert not (await insist(docker_rig.driver, slow.reference)).made
