"""A process that is killed in the middle of a verb: another one repeats the verb, and it is as if done once."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable

import pytest

from app.runtime.docker import connect
from app.runtime.driver import Driver, Power, Workload
from tests.drivers.looks import id_of, insist, inventory, power_of
from tests.drivers.proxy import Gate
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine

VERBS: dict[str, tuple[str, Callable[[Driver, Workload], Awaitable[object]], Power | None]] = {
    "create": ("ensure", lambda driver, work: driver.ensure(work), Power.RUNNING),
    "start": ("ensure", lambda driver, work: driver.ensure(work), Power.RUNNING),
    "pause": ("pause", lambda driver, work: driver.set_power(work.ref, Power.PAUSED), Power.PAUSED),
    "unpause": ("resume", lambda driver, work: driver.set_power(work.ref, Power.RUNNING), Power.RUNNING),
    "remove": ("remove", lambda driver, work: driver.remove(work.ref), None),
}
"""By the call at which the process dies: what it does, how another one repeats it, and what must come of it."""


async def start(rig: DockerRig, verb: str, what: str, gate: Gate) -> asyncio.subprocess.Process:
    """A process that stands at the gate."""
    arguments = rig.proxy.address, str(rig.options.installation), verb, what
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "tests.drivers.child", *arguments)
    await gate.reached.wait()
    return process


async def kill(process: asyncio.subprocess.Process) -> None:
    process.kill()
    assert await process.wait() == -signal.SIGKILL


async def die(rig: DockerRig, verb: str, work: Workload, gate: Gate) -> None:
    await kill(await start(rig, verb, str(work.ref.object_id), gate))


@pytest.mark.parametrize("acted", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", VERBS)
async def test_a_killed_process_leaves_what_another_one_finishes(docker_rig: DockerRig, call: str, acted: bool):
    verb, repeat, goal = VERBS[call]
    work, started_at = docker_rig.work(), None
    if verb != "ensure":
        started_at = (await docker_rig.driver.ensure(work)).started_at
    if verb == "resume":
        await docker_rig.driver.set_power(work.ref, Power.PAUSED)
    gate = Gate()
    gates = docker_rig.proxy.late_gates if acted else docker_rig.proxy.gates
    gates[call] = gate
    await die(docker_rig, verb, work, gate)
    gates.clear()
    gate.open()

    await repeat(docker_rig.driver, work)
    assert await power_of(docker_rig.driver, work.ref) is goal
    assert len(await inventory(docker_rig.driver)) == (goal is not None)
    if started_at is not None and goal is not None:
        seen = await docker_rig.driver.observe(work.ref)
        assert seen is not None
        assert id_of(seen)
        assert seen.started_at == started_at, "nothing was started a second time"


@pytest.mark.parametrize("meanwhile", [False, True], ids=["then", "meanwhile"])
@pytest.mark.parametrize("acted", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["image", "inspect", "make_volume", "create", "start", "wait", "logs"])
async def test_a_process_that_is_killed_while_it_installs_an_agent(
    docker_rig: DockerRig, engine: str, call: str, acted: bool, meanwhile: bool
):
    """Another worker installs it, after the kill or while the first one stands there."""
    image, gate = await docker_rig.agent_image(), Gate()
    (docker_rig.proxy.late_gates if acted else docker_rig.proxy.gates)[call] = gate
    process = await start(docker_rig, "install_agent", image, gate)
    other = connect(docker_rig.options, engine)  # not through the gate
    try:
        if meanwhile:
            await insist(other, image)
        await kill(process)
        gate.open()
        installed = await insist(other, image)
    finally:
        await other.close()
    assert await docker_rig.agent_works(installed.volume)
    assert len(await docker_rig.volumes()) == 1
