"""How the Docker driver copies an agent's files, seen from behind its back."""

from __future__ import annotations

import asyncio
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import aiodocker
import aiohttp
import msgspec
import pytest

from app.agent import TOKEN_HEADER
from app.cli.local_image import ensure_local_image, entry, regular_file, root_filesystem, tar
from app.errors import RuntimeUnavailable
from app.runtime import workload
from app.runtime.docker import names
from app.runtime.faults import AttemptFailed
from app.runtime.workload import Agent
from tests.agent.image import ensure_agent_image, standin_layer
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
    """No program of it can copy, so the engine's archive calls do."""
    image = await make_image(*FILES, shell=False)
    installed = await docker_rig.driver.install_agent(image)
    assert installed.made
    assert installed.files == ("execd", "bootstrap.sh")
    assert installed.size_bytes > 0
    found = await in_volume(docker_rig, installed.volume)
    assert set(found) == {"execd", "bootstrap.sh", "prepare.sh", ".complete"}
    assert found["execd"] == (b"first", 0o755)
    assert {mode for _, mode in found.values()} == {0o755}
    again = await docker_rig.another().install_agent(image)
    assert (again.made, again.volume, again.files, again.size_bytes, again.helper) == (
        False,
        installed.volume,
        installed.files,
        installed.size_bytes,
        installed.helper,
    )
    assert await docker_rig.inspect(f"{installed.volume}-fill") is None


async def test_an_agent_out_of_an_image_without_a_shell_runs(
    docker_rig: DockerRig, make_image: MakeImage, eventually: Eventually
):
    """A folder, as the stand-in's, with its symbolic links and modes."""
    image = f"sandledger-distroless-agent-{uuid4().hex}:1"
    await ensure_local_image(docker_rig.direct, image, lambda: [standin_layer()])
    try:
        volume = (await docker_rig.driver.install_agent(image)).volume
        seen = await docker_rig.driver.ensure(docker_rig.work(agent=Agent(volume, TOKEN)))
        assert seen.address is not None
        place = seen.address.ports[workload.AGENT_PORT]

        async def answers() -> bool:
            try:
                async with aiohttp.request("GET", f"http://{place}/ping", headers={TOKEN_HEADER: TOKEN}) as answer:
                    return answer.status == 200
            except aiohttp.ClientError:
                return False

        assert await eventually(answers)
    finally:
        await docker_rig.clear()
        await docker_rig.direct.images.delete(image, force=True)


async def test_neither_a_shell_nor_an_agent(docker_rig: DockerRig, make_image: MakeImage):
    image = await make_image(FILES[0], shell=False)
    for _ in range(2):
        with pytest.raises(AttemptFailed, match=r"lacks /bootstrap\.sh") as caught:
            await docker_rig.driver.install_agent(image)
        assert caught.value.reason == "AGENT_IMAGE_INCOMPLETE"
    shown = await docker_rig.driver.image(image)
    assert shown is not None
    name = docker_rig.agent_name(shown.image_id)
    assert await docker_rig.inspect(name) is None
    assert await docker_rig.inspect(f"{name}-fill") is None


@pytest.mark.parametrize("call", ["put_archive", "get_archive", "create"])
async def test_a_copy_by_archive_that_was_cut(docker_rig: DockerRig, make_image: MakeImage, call: str):
    """A reply that is lost; the next one completes it. What is not complete is never taken for it."""
    image = await make_image(*FILES, shell=False)
    for _ in range(1 if call == "create" else 2):  # the client library itself repeats a GET or PUT once
        docker_rig.lose_reply(call)
    with pytest.raises(RuntimeUnavailable):
        await docker_rig.driver.install_agent(image)
    installed = await insist(docker_rig.another(), image)
    assert (await in_volume(docker_rig, installed.volume))["execd"] == (b"first", 0o755)


async def test_one_process_copies_by_archive(docker_rig: DockerRig, make_image: MakeImage, eventually: Eventually):
    """The naive way, both at once, replaces a file that a sandbox may be about to start."""
    image, gate = await make_image(*FILES, shell=False), docker_rig.hold("put_archive")
    first = asyncio.create_task(docker_rig.driver.install_agent(image))
    await eventually(lambda: docker_rig.calls["put_archive"])
    with pytest.raises(AttemptFailed, match="another process copies") as caught:
        await docker_rig.another().install_agent(image)
    assert caught.value.reason == "AGENT_INSTALLING"
    gate.open()
    assert (await first).made
    assert not (await docker_rig.another().install_agent(image)).made


async def test_a_maker_that_died_is_not_waited_for(docker_rig: DockerRig, make_image: MakeImage):
    image = await make_image(*FILES, shell=False)
    shown = await docker_rig.driver.image(image)
    assert shown is not None
    name = f"{docker_rig.agent_name(shown.image_id)}-fill"
    labels = names.agent_labels(docker_rig.options.installation)
    await docker_rig.direct.containers.create({"Image": image, "Entrypoint": ["/x"], "Labels": labels}, name=name)
    hasty = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, api_timeout=0.5))
    await asyncio.sleep(2)  # its age is what counts
    with pytest.raises(AttemptFailed, match="another process copies"):
        await hasty.install_agent(image)
    assert await docker_rig.inspect(name) is None
    assert (await docker_rig.driver.install_agent(image)).made


async def test_a_stranger_of_that_name_stays(docker_rig: DockerRig, make_image: MakeImage):
    image = await make_image(*FILES, shell=False)
    shown = await docker_rig.driver.image(image)
    assert shown is not None
    name = f"{docker_rig.agent_name(shown.image_id)}-fill"
    await docker_rig.stranger(name)
    with pytest.raises(AttemptFailed, match="another process copies"):
        await docker_rig.driver.install_agent(image)
    assert await docker_rig.exists(name)


# clean-up


async def test_agents_that_nobody_uses_go(docker_rig: DockerRig, make_image: MakeImage):
    driver, soon = docker_rig.driver, datetime.now(UTC) + timedelta(hours=1)
    old = await driver.install_agent(await make_image(*FILES))
    shellless = await driver.install_agent(await make_image(*FILES, shell=False))
    used = await driver.install_agent(await ensure_agent_image(docker_rig.direct))
    new = await driver.install_agent(await make_image(regular_file("execd", b"second"), FILES[1]))
    await driver.ensure(docker_rig.work(agent=Agent(used.volume, TOKEN)))
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    assert await driver.clean_agents(new.image_id, long_ago) == ()
    assert await docker_rig.elsewhere().clean_agents(new.image_id, soon) == (), "another installation's"
    assert set(await driver.clean_agents(new.image_id, soon)) == {old.volume, shellless.volume}
    assert set(await docker_rig.volumes()) == {used.volume, new.volume}
    assert await docker_rig.inspect(old.volume) is None
    assert await driver.clean_agents(new.image_id, soon) == ()


async def test_a_volume_whose_helper_has_gone_is_found(docker_rig: DockerRig, make_image: MakeImage):
    old = await docker_rig.driver.install_agent(await make_image(*FILES))
    await docker_rig.direct.containers.container(old.volume).delete()
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert await docker_rig.driver.clean_agents("sha256:" + "0" * 64, soon) == (old.volume,)


async def test_a_copy_under_way_is_left_alone(docker_rig: DockerRig):
    slow = await docker_rig.slow_agent()
    copying = asyncio.create_task(docker_rig.driver.install_agent(slow.reference))
    await slow.reached()
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert await docker_rig.another().clean_agents("sha256:" + "0" * 64, soon) == ()
    await slow.finish()
    assert (await copying).made


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
