"""Agents on an engine: one event for one copy, and what nobody uses goes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from app.domain.engine import events as ev
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.state import Phase
from app.runtime.fake import FakeDriver, agent_name
from app.runtime.workload import Agent
from app.work.agents import AgentPolicy, Agents
from tests.work.field import WORKER, Field
from tests.work.stage import Stage

POLICY = AgentPolicy("agent:1", b"k" * 32, keep_seconds=0)


async def agents(field: Field, driver: FakeDriver | None = None, **changes: Any) -> Agents:
    station = field.station(driver)
    await station.contact()
    policy = msgspec.structs.replace(POLICY, **changes)
    return Agents(station=station, engines=field.engines, policy=policy, meta=WORKER)


async def installed(field: Field) -> list[ev.AgentInstalled]:
    return [one.event for one in await field.engines.history("fake") if isinstance(one.event, ev.AgentInstalled)]


class Barrier:
    """A hook that lets two pass one call together."""

    def __init__(self, call: str) -> None:
        self.call = call
        self.barrier = asyncio.Barrier(2)

    async def __call__(self, call: str) -> None:
        if call == self.call:
            await self.barrier.wait()


async def test_two_workers_at_once_are_one_event(field: Field):
    """Both had the copy made, as far as they can know. The naive way, to believe that, writes it twice."""
    naive = Barrier("start")
    both = [field.driver(before=naive) for _ in range(2)]
    made = await asyncio.gather(*(driver.install_agent("naive:1") for driver in both))
    assert [each.made for each in made] == [True, True]
    assert made[0].helper == made[1].helper, "it was one copy"

    together = Barrier("start")
    two = [await agents(field, field.driver(before=together)) for _ in range(2)]
    await asyncio.gather(*(each.install() for each in two))
    (event,) = await installed(field)
    assert event.files == ("execd", "bootstrap.sh")
    assert event.helper


async def test_a_copy_whose_maker_died_is_recorded_by_the_next(field: Field):
    await field.station().contact()
    assert (await field.driver().install_agent(POLICY.image)).made
    worker = await agents(field)
    await worker.install()
    assert len(await installed(field)) == 1
    for _ in range(2):
        worker.forget()
        await worker.install()
    assert len(await installed(field)) == 1


async def test_another_copy_is_another_event(field: Field):
    worker = await agents(field)
    await worker.install()
    first = await installed(field)
    name = agent_name(field.installation, first[0].image_id)
    field.engine.destroy(name)
    del field.engine.volumes[name]
    worker.forget()
    await worker.install()
    one, two = await installed(field)
    assert one.image_id == two.image_id
    assert one.helper != two.helper


async def test_what_no_sandbox_uses_goes(field: Field):
    await field.station().contact()
    used = await field.driver().install_agent("used:1")
    unused = await field.driver().install_agent("unused:1")
    sandbox_id = await field.run()
    found = field.engine.of(sandbox_id)
    assert found is not None
    work = msgspec.structs.replace(field.workload(sandbox_id), agent=Agent(used.volume, "t"))
    field.engine.containers[found.name] = msgspec.structs.replace(found, work=work)
    worker = await agents(field)
    await worker.install()
    current = agent_name(field.installation, (await installed(field))[0].image_id)
    await worker.look_around()
    assert set(field.engine.volumes) == {used.volume, current}
    assert unused.volume not in field.engine.containers
    (gone,) = [one.event for one in await field.engines.history("fake") if isinstance(one.event, ev.LeftoverRemoved)]
    assert (gone.role, gone.name) == ("agent", unused.volume)
    await worker.look_around()
    assert (await field.engine_told()).count("leftover_removed") == 1


async def test_what_is_young_stays(field: Field):
    """Another worker may know a newer image already. The naive way takes its files before a sandbox mounts them."""
    newer = await field.driver().install_agent("newer:1")
    worker = await agents(field, keep_seconds=3600)
    await worker.install()
    await worker.look_around()
    assert newer.volume in field.engine.volumes
    naive = await agents(field)
    await naive.install()
    await naive.look_around()
    assert newer.volume not in field.engine.volumes


async def test_a_removed_agent_is_forgotten_by_the_log(field: Field):
    old = await agents(field, image="old:1")
    await old.install()
    worker = await agents(field)
    await worker.install()
    assert len((await field.known_engine()).agents) == 2
    await worker.look_around()
    assert list((await field.known_engine()).agents) == [(await installed(field))[1].image_id]


async def test_another_installation_is_left_alone(field: Field):
    other = Field(field.dsn, field.database, field.signal)
    other.engine = field.engine
    theirs = await other.driver().install_agent("theirs:1")
    worker = await agents(field)
    await worker.install()
    await worker.look_around()
    assert theirs.volume in field.engine.volumes


async def test_trouble_is_no_reason_to_stop(field: Field):
    worker = await agents(field)
    await worker.install()
    field.engine.down = True
    await worker.look_around()


async def test_an_image_without_a_shell_fails_for_good(stage: Stage):
    worker = stage.worker(agent=POLICY)
    sandbox_id = await stage.create(image="noshell/image:1")
    await stage.settle(worker)
    assert await stage.phase(sandbox_id) is Phase.FAILED
    sandbox = await stage.sandbox(sandbox_id)
    assert sandbox.failure is not None
    assert (sandbox.failure.step, sandbox.failure.reason) == ("ensure", "IMAGE_HAS_NO_SHELL")
    assert stage.container(sandbox_id) is None, "nothing of it is left on the engine"
    await stage.ask(sandbox_id, cmd.Terminate())
    assert (await stage.told(sandbox_id))[-1] == "terminated"
