"""A sandbox with the stand-in agent on a real engine, seen from outside and from behind the driver's back."""

from __future__ import annotations

import asyncio
import platform
import random
import socket
import struct
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import aiohttp
import msgspec
import pytest

from app.agent import AGENT_PORT, TOKEN_HEADER
from app.cli.local_image import _find_busybox, ensure_local_image, entry, regular_file, tar
from app.runtime import workload
from app.runtime.docker import DockerOptions, container_config
from app.runtime.docker.spec import OURS
from app.runtime.driver import Image, Power, Workload
from app.runtime.faults import AttemptFailed
from app.runtime.workload import Agent
from tests.agent.image import ensure_agent_image
from tests.drivers.looks import exited
from tests.drivers.rig import BUSYBOX
from tests.drivers.rig import workload as plain
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine
Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]
TOKEN = "t0ken-of-a-sandbox"
BARE = "sandledger-bare:1"


@pytest.fixture
async def agent(docker_rig: DockerRig) -> Agent:
    image = await ensure_agent_image(docker_rig.direct)
    return Agent((await docker_rig.driver.install_agent(image)).volume, TOKEN)


@pytest.fixture
async def with_user(docker_rig: DockerRig) -> AsyncIterator[Callable[[str], Awaitable[str]]]:
    """Makes images that run as this user."""
    made: list[str] = []

    async def make(user: str) -> str:
        container = await docker_rig.direct.containers.create({"Image": BUSYBOX}, name=f"user-{uuid4()}")
        name = f"sandledger-user-{uuid4().hex}"
        await container.commit(repository=name, tag="1", config={"User": user, "Env": ["PATH=/bin"], "Cmd": ["sh"]})
        await container.delete()
        made.append(f"{name}:1")
        return made[-1]

    yield make
    await docker_rig.clear()
    for image in made:
        await docker_rig.direct.images.delete(image, force=True)


@pytest.fixture
def free_range() -> tuple[int, int]:
    """Four ports in a row that nobody has, below those that the system and the engine give away by themselves."""
    while True:
        first = random.randrange(20000, 30000)
        with ExitStack() as stack:
            try:
                for port in range(first, first + 4):
                    taken = stack.enter_context(socket.socket())
                    taken.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first, first + 3


async def run(rig: DockerRig, work: Workload) -> str:
    """Where the agent is published."""
    seen = await rig.driver.ensure(work)
    assert seen.address is not None
    return seen.address.ports[workload.AGENT_PORT]


async def status(place: str, path: str = "/ping", token: str | None = TOKEN) -> int | None:
    """None = nobody answers yet."""
    headers = {} if token is None else {TOKEN_HEADER: token}
    try:
        async with aiohttp.ClientSession() as session, session.get(f"http://{place}{path}", headers=headers) as answer:
            return answer.status
    except aiohttp.ClientError:
        return None


async def output(rig: DockerRig, work: Workload) -> str:
    return "".join(await rig.direct.containers.container(f"sandbox-{work.ref.object_id}").log(stdout=True, stderr=True))


async def inside(rig: DockerRig, work: Workload, script: str) -> str:
    """What a shell in the sandbox says."""
    asked = await rig.direct.containers.container(f"sandbox-{work.ref.object_id}").exec(["sh", "-c", script])
    async with asked.start() as stream:
        message = await stream.read_out()
        return "" if message is None else message.data.decode()


def bare() -> bytes:
    """A root file system with a static busybox and the shell that it is, and nothing else."""
    busybox = regular_file("bin/busybox", _find_busybox().read_bytes(), 0o755)
    return tar([entry("bin", tarfile.DIRTYPE, 0o755), busybox, entry("bin/sh", tarfile.SYMTYPE, 0o777, "busybox")])


def test_one_word_for_the_port():
    assert str(AGENT_PORT) == workload.AGENT_PORT


@pytest.mark.parametrize("user", ["0:0", "1000:1000", "65534:65534"])
async def test_the_agent_answers_its_token_only(
    docker_rig: DockerRig, agent: Agent, with_user: Callable[[str], Awaitable[str]], eventually: Eventually, user: str
):
    work = docker_rig.work(image=await with_user(user), agent=agent, entrypoint=("sh", "-c", "id -u; exec sleep 3600"))
    place = await run(docker_rig, work)
    await eventually(lambda: status(place))
    assert await status(place) == 200
    assert await status(place, token=None) == 401
    assert await status(place, token="another") == 401
    assert await status(place, "/proxy/8080/", token=None) == 401
    uid = user.partition(":")[0]
    listed = await inside(docker_rig, work, "ls -ln /opt/opensandbox/.env")
    assert listed.split()[2] == uid
    assert (await output(docker_rig, work)).split() == [uid], "no warning either"


async def test_an_image_that_holds_nothing_but_busybox(docker_rig: DockerRig, agent: Agent, eventually: Eventually):
    image = await ensure_local_image(docker_rig.direct, BARE, lambda: [bare()])
    work = docker_rig.work(image=image, agent=agent, entrypoint=("/bin/busybox", "sleep", "3600"))
    place = await run(docker_rig, work)
    assert await eventually(lambda: status(place)) == 200


@pytest.mark.parametrize(
    ("entrypoint", "code"),
    [(("sh", "-c", "exit 7"), 7), (("true",), 0), (("nosuchprogram",), 127), (("sh -c 'exit 9'",), 9)],
)
async def test_the_end_of_the_command_is_the_end_of_the_sandbox(
    docker_rig: DockerRig, agent: Agent, eventually: Eventually, entrypoint: tuple[str, ...], code: int
):
    work = docker_rig.work(agent=agent, entrypoint=entrypoint)
    await docker_rig.driver.ensure(work)
    seen = await exited(docker_rig, work, eventually)
    assert seen.exit is not None
    assert seen.exit.code == code


async def test_a_stop_reaches_the_command(docker_rig: DockerRig, agent: Agent, eventually: Eventually):
    script = "trap 'echo told to stop; exit 0' TERM; echo ready; while :; do read x < /tmp; sleep 0.05; done"
    work = docker_rig.work(agent=agent, entrypoint=("sh", "-c", f"{script} 2>/dev/null"))
    await docker_rig.driver.ensure(work)

    async def ready() -> bool:
        return "ready" in await output(docker_rig, work)

    await eventually(ready)
    await docker_rig.direct.containers.container(f"sandbox-{work.ref.object_id}").stop(t=30)
    seen = await exited(docker_rig, work, eventually)
    assert seen.exit is not None
    assert seen.exit.code == 0, "137 would be the engine's kill"
    assert "told to stop" in await output(docker_rig, work)


async def test_the_environment_of_the_agent_is_not_the_requests(
    docker_rig: DockerRig, agent: Agent, eventually: Eventually
):
    forged = dict.fromkeys(OURS, "forged") | {"MINE": "1", "EXECD_ENVS": "/tmp/env"}
    work = docker_rig.work(agent=agent, entrypoint=("env",), env=forged)
    await docker_rig.driver.ensure(work)
    await exited(docker_rig, work, eventually)
    lines = set((await output(docker_rig, work)).splitlines())
    assert not {line for line in lines if line.endswith("=forged")}
    assert {
        "MINE=1",
        "EXECD_ENVS=/tmp/env",
        "EXECD=/opt/opensandbox/bin/execd",
        f"EXECD_ACCESS_TOKEN={TOKEN}",
        f"OPENSANDBOX_ID={work.ref.object_id}",
    } <= lines


async def test_as_process_one(docker_rig: DockerRig, agent: Agent, eventually: Eventually):
    init = msgspec.structs.replace(agent, init=True)
    work = docker_rig.work(agent=init, entrypoint=("sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '; exit 5"))
    await docker_rig.driver.ensure(work)
    seen = await exited(docker_rig, work, eventually)
    assert seen.exit is not None
    assert seen.exit.code == 5
    assert "--init" in await output(docker_rig, work)


async def test_the_agents_files_cannot_be_changed(docker_rig: DockerRig, agent: Agent, eventually: Eventually):
    script = (
        "echo x > /opt/opensandbox/bin/bootstrap.sh; rm -rf /opt/opensandbox/bin/execd; touch /opt/opensandbox/mine"
    )
    work = docker_rig.work(agent=agent, entrypoint=("sh", "-c", f"{script}; ls /opt/opensandbox/mine"))
    await docker_rig.driver.ensure(work)
    await exited(docker_rig, work, eventually)
    said = (await output(docker_rig, work)).splitlines()
    assert "sh: can't create /opt/opensandbox/bin/bootstrap.sh: Read-only file system" in said
    assert "/opt/opensandbox/mine" in said


async def test_ports_of_a_range(docker_rig: DockerRig, agent: Agent, free_range: tuple[int, int]):
    """Each sandbox takes two, as long as there are any."""
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, port_range=free_range))
    works = [docker_rig.work(agent=agent) for _ in range(2)]
    taken: set[int] = set()
    for work in works:
        seen = await driver.ensure(work)
        assert seen.address is not None
        taken |= {int(place.rpartition(":")[2]) for place in seen.address.ports.values()}
    assert taken == set(range(free_range[0], free_range[1] + 1))
    last = docker_rig.work(agent=agent)
    with pytest.raises(AttemptFailed, match=r"is full or taken: widen docker\.port_range_min") as caught:
        await driver.ensure(last)
    assert caught.value.reason == "PORTS_EXHAUSTED"
    assert f"{free_range[0]}-{free_range[1]}" in caught.value.message
    await driver.remove(works[0].ref)
    assert (await driver.ensure(last)).power is Power.RUNNING


async def test_a_port_that_a_stranger_has(docker_rig: DockerRig, agent: Agent, free_range: tuple[int, int]):
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", free_range[0])
    async with server:
        driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, port_range=free_range))
        seen = await driver.ensure(docker_rig.work(agent=agent))
    assert seen.address is not None
    taken = {int(place.rpartition(":")[2]) for place in seen.address.ports.values()}
    assert len(taken) == 2
    assert free_range[0] not in taken


@pytest.mark.parametrize("mode", ["host", "none", "container:other"])
def test_modes_in_which_nothing_can_be_published(mode: str):
    work = plain(agent=Agent("volume", TOKEN))
    options = DockerOptions(installation=work.ref.object_id, network_mode=mode)
    config = container_config(work, options)
    assert (config.exposed_ports, config.host_config.port_bindings) == ({}, {})


def test_a_named_network_publishes():
    work = plain(agent=Agent("volume", TOKEN), image="x")
    options = DockerOptions(installation=work.ref.object_id, network_mode="hostnames", publish_host="0.0.0.0")
    ports = container_config(work, options).host_config.port_bindings
    assert {port: (each[0].host_ip, each[0].host_port) for port, each in ports.items()} == {
        "44772/tcp": ("0.0.0.0", ""),
        "8080/tcp": ("0.0.0.0", ""),
    }


def test_the_token_is_in_no_repr():
    work = plain(agent=Agent("volume", TOKEN))
    options = DockerOptions(installation=work.ref.object_id)
    assert TOKEN not in f"{work!r}{work.agent!r}{container_config(work, options)!r}"
    assert TOKEN not in str(container_config(work, options).labels)
    assert work.image == Image(work.image.reference)


# images in which the agent cannot run


def foreign() -> bytes:
    """A root file system whose shell is for another processor."""
    machine = 183 if platform.machine() == "x86_64" else 62
    elf = (
        b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 0, 0, 0, 64, 0, 0, 0, 0, 0)
    )
    return tar([entry("bin", tarfile.DIRTYPE, 0o755), regular_file("bin/sh", elf + bytes(64), 0o755)])


async def test_a_shell_for_another_processor(docker_rig: DockerRig, agent: Agent, eventually: Eventually):
    image = await ensure_local_image(docker_rig.direct, "sandledger-foreign:1", lambda: [foreign()])
    work = docker_rig.work(image=image, agent=agent)
    await docker_rig.driver.ensure(work)
    seen = await exited(docker_rig, work, eventually)
    assert seen.verdict is not None
    assert seen.verdict.reason == "WRONG_PLATFORM"


@pytest.mark.parametrize(
    "script",
    [
        "echo exec bootstrap.sh: no such file or directory; echo more; exit 1",
        "sleep 2.2; echo exec bootstrap.sh: no such file or directory; exit 1",
        "echo exec bootstrap.sh: no such file or directory; exit 3",
    ],
)
async def test_what_a_program_says_is_no_verdict(
    docker_rig: DockerRig, agent: Agent, eventually: Eventually, script: str
):
    work = docker_rig.work(agent=agent, entrypoint=("sh", "-c", script))
    await docker_rig.driver.ensure(work)
    assert (await exited(docker_rig, work, eventually)).verdict is None


# where programs expect the agent's files


async def test_the_classic_places(docker_rig: DockerRig, agent: Agent, eventually: Eventually):
    links = "for each in execd bootstrap.sh; do readlink /opt/opensandbox/$each; done"
    script = f"{links}; ls /opt/opensandbox; set | grep ^name="
    work = docker_rig.work(agent=agent, entrypoint=("sh", "-c", script))
    await docker_rig.driver.ensure(work)
    await exited(docker_rig, work, eventually)
    said = (await output(docker_rig, work)).split()
    assert said[:2] == ["/opt/opensandbox/bin/execd", "/opt/opensandbox/bin/bootstrap.sh"]
    assert "prepare.sh" not in said
    assert "name=" not in " ".join(said), "the user's program inherits nothing of it"


async def test_a_script_of_the_request_comes_first(docker_rig: DockerRig, agent: Agent, eventually: Eventually):
    """Ours is then left out: there is one variable for it."""
    script = "ls /opt/opensandbox/execd 2>/dev/null || echo none"
    work = docker_rig.work(
        agent=agent, entrypoint=("sh", "-c", script), env={"EXECD_BOOTSTRAP_PRE_SCRIPT": "/tmp/mine.sh"}
    )
    await docker_rig.driver.ensure(work)
    await exited(docker_rig, work, eventually)
    assert "none" in await output(docker_rig, work)


@pytest.mark.parametrize("user", ["1000:1000", "65534:65534"])
async def test_the_classic_places_of_another_user(
    docker_rig: DockerRig, agent: Agent, with_user: Callable[[str], Awaitable[str]], eventually: Eventually, user: str
):
    work = docker_rig.work(image=await with_user(user), agent=agent, entrypoint=("ls", "/opt/opensandbox/execd/"))
    await docker_rig.driver.ensure(work)
    await exited(docker_rig, work, eventually)
    assert "modules.zip" in (await output(docker_rig, work)).split(), "/execd is a folder in this image"
