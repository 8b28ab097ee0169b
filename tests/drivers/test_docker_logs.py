"""Logs of a real engine: long ones, binary ones, and values that lie where the engine cuts a line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from app.domain.sandbox.diagnostics import log_text
from app.domain.sandbox.masking import MASK, Masker
from app.runtime.driver import Logs, Workload
from tests.drivers.looks import exited
from tests.drivers.rigs import DockerRig

pytestmark = pytest.mark.engine
Eventually = Callable[[Callable[[], Any]], Awaitable[Any]]
MOST = 64 * 1024
LINES = 2200


async def ended(rig: DockerRig, eventually: Eventually, script: str, **changes: Any) -> Workload:
    """It has written what it writes."""
    work = rig.work(entrypoint=("sh", "-c", script), **changes)
    await rig.driver.ensure(work)
    await exited(rig, work, eventually)
    return work


async def read(rig: DockerRig, work: Workload) -> Logs:
    found = await rig.driver.logs(work.ref, tail=LINES, most=MOST)
    assert found is not None
    return found


async def test_a_long_log_is_not_read_whole(docker_rig: DockerRig, eventually: Eventually):
    """No more comes over the wire than the lines that are asked for. The naive way reads all of it."""
    docker_rig.driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, log_max_size="100m"))
    line = "x" * 100
    work = await ended(docker_rig, eventually, f"yes {line} | head -n 200000; echo the end")
    logs = await read(docker_rig, work)
    assert logs.lines[-1].text == "the end"
    assert logs.more
    assert docker_rig.proxy.sent["logs"] < 2 * LINES * (len(line) + 50)
    before = docker_rig.proxy.sent["logs"]
    container = docker_rig.direct.containers.container(f"sandbox-{work.ref.object_id}")
    naive = await container.log(stdout=True, stderr=True)
    assert sum(map(len, naive)) > 20_000_000 > before


async def test_a_line_without_an_end(docker_rig: DockerRig, eventually: Eventually):
    """Of a line of megabytes no more is kept than is shown, however many pieces of it come."""
    work = await ended(docker_rig, eventually, "head -c 5000000 /dev/zero | tr '\\0' x; printf end")
    (line,) = (await read(docker_rig, work)).lines
    assert (len(line.text), line.text[-4:], line.begins, line.ends) == (MOST, "xend", False, False)


async def test_a_binary_log(docker_rig: DockerRig, eventually: Eventually):
    work = await ended(docker_rig, eventually, "head -c 300000 /dev/urandom; printf '\\0\\033[2J\\n'; echo the end")
    logs = await read(docker_rig, work)
    text = log_text(logs, Masker(()), most=MOST).text
    assert text.endswith("the end\n")
    assert "\0" not in text
    assert "\033" not in text
    assert len(text.encode()) <= MOST
    text.encode().decode()


async def test_a_value_where_the_engine_cuts_the_line(docker_rig: DockerRig, eventually: Eventually):
    secret = "s3cr3t-value-of-a-client"
    script = f"head -c {16 * 1024 - 10} /dev/zero | tr '\\0' x; echo $PLAIN; echo next"
    work = await ended(docker_rig, eventually, script, env={"PLAIN": secret})
    container = docker_rig.direct.containers.container(f"sandbox-{work.ref.object_id}")
    pieces = "".join(await container.log(stdout=True, timestamps=True))
    assert secret not in pieces, "the naive way, to mask what the engine sends, finds no value here"
    assert "s3cr3t-val" in pieces
    shown = log_text(await read(docker_rig, work), Masker([secret])).text
    assert MASK in shown
    assert "s3cr3t" not in shown
    assert "client" not in shown


async def test_both_streams_in_their_order(docker_rig: DockerRig, eventually: Eventually):
    work = await ended(docker_rig, eventually, "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo three")
    assert [line.text for line in (await read(docker_rig, work)).lines] == ["one", "two", "three"]


async def test_what_an_operator_gave_is_marked(docker_rig: DockerRig):
    driver = docker_rig.with_options(msgspec.structs.replace(docker_rig.options, sandbox_env={"PROXY": "user:s3cr3t"}))
    work = docker_rig.work(env={"MINE": "1"})
    await driver.ensure(work)
    shown = await driver.inspect(work.ref)
    assert shown is not None
    assert shown.values_of(()) == ["user:s3cr3t"]
    assert shown.env["PROXY"] == "user:s3cr3t"
    assert shown.env["OPENSANDBOX_ID"] == str(work.ref.object_id)
    assert shown.pids_limit
    assert shown.networks


async def test_a_log_that_hangs_can_be_given_up(docker_rig: DockerRig):
    """Nothing of it holds up the removal that comes after."""
    work = docker_rig.work()
    await docker_rig.driver.ensure(work)
    gate = docker_rig.hold("logs")
    reading = asyncio.create_task(read(docker_rig, work))
    await gate.reached.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await docker_rig.driver.remove(work.ref)
    assert await docker_rig.driver.inspect(work.ref) is None


async def test_a_log_that_never_ends(docker_rig: DockerRig, eventually: Eventually):
    """What the driver asks for ends by itself, also while the program goes on."""
    work = docker_rig.work(entrypoint=("sh", "-c", "while echo tick; do sleep 0.01; done"))
    await docker_rig.driver.ensure(work)

    async def ticks() -> bool:
        return len((await read(docker_rig, work)).lines) > 10

    await eventually(ticks)
