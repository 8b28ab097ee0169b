"""What every driver must do with the agent's files, and with a sandbox that has an agent."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import structs

from app.errors import RuntimeRejected, RuntimeUnavailable
from app.runtime.driver import InstalledAgent, Observed, Power
from app.runtime.faults import AgentMissing, AttemptFailed, ImageMissing
from app.runtime.workload import AGENT_PORT, HTTP_PORT, Agent
from tests.drivers.looks import Eventually, exited, insist, inventory, leftovers, power_of
from tests.drivers.rig import Rig

TOKEN = "t0ken-of-a-sandbox"
CHANGES = ("make_volume", "create", "start", "wait")


async def agent(rig: Rig) -> Agent:
    return Agent((await rig.driver.install_agent(await rig.agent_image())).volume, TOKEN)


# install_agent


async def test_the_files_are_copied_once(rig: Rig):
    image = await rig.agent_image()
    first = await rig.driver.install_agent(image)
    shown = await rig.driver.image(image)
    assert shown is not None
    assert first.image_id == shown.image_id
    assert first.volume == rig.agent_name(first.image_id)
    assert first.files[:2] == ("execd", "bootstrap.sh")
    assert first.size_bytes > 0
    assert first.made

    before = rig.calls.copy()
    second = await rig.another().install_agent(image)
    assert (second.image_id, second.volume, second.files, second.size_bytes) == (
        first.image_id,
        first.volume,
        first.files,
        first.size_bytes,
    )
    assert not second.made
    taken = rig.calls - before
    del taken["version"]
    assert taken == {"image": 1, "inspect": 1, "logs": 1}


async def test_the_calls_of_a_copy(rig: Rig):
    await rig.driver.install_agent(await rig.agent_image())
    del rig.calls["version"]
    assert rig.calls == {
        "image": 1,
        "inspect": 3,
        "make_volume": 1,
        "create": 1,
        "start": 1,
        "wait": 1,
        "logs": 1,
    }


async def test_what_is_copied_belongs_to_no_sandbox(rig: Rig):
    await rig.driver.install_agent(await rig.agent_image())
    assert await inventory(rig.driver) == []
    assert await leftovers(rig.driver) == []


async def test_another_installation_has_files_of_its_own(rig: Rig):
    image = await rig.agent_image()
    ours = await rig.driver.install_agent(image)
    theirs = await rig.elsewhere().install_agent(image)
    assert theirs.made
    assert theirs.volume != ours.volume
    assert theirs.image_id == ours.image_id


async def test_an_agent_image_that_is_not_there(rig: Rig):
    missing = await rig.missing_image()
    with pytest.raises(ImageMissing) as caught:
        await rig.driver.install_agent(missing)
    assert caught.value.reference == missing


async def test_an_image_without_an_agent_says_what_it_lacks(rig: Rig):
    image = await rig.bare_image()
    for _ in range(2):
        with pytest.raises(AttemptFailed, match="lacks /execd") as caught:
            await rig.driver.install_agent(image)
        assert caught.value.reason == "AGENT_IMAGE_INCOMPLETE"
        shown = await rig.driver.image(image)
        assert shown is not None
        assert not await rig.exists(rig.agent_name(shown.image_id))


@pytest.mark.parametrize("what", ["container", "volume"])
async def test_a_stranger_has_the_name(rig: Rig, what: str):
    image = await rig.agent_image()
    shown = await rig.driver.image(image)
    assert shown is not None
    name = rig.agent_name(shown.image_id)
    await (rig.stranger(name) if what == "container" else rig.strange_volume(name))
    with pytest.raises(RuntimeRejected, match="NAME_TAKEN") as caught:
        await rig.driver.install_agent(image)
    assert what in caught.value.message
    assert await rig.exists(name) == (what == "container")


async def test_while_another_server_copies(rig: Rig):
    slow = await rig.slow_agent()
    copying = asyncio.create_task(rig.driver.install_agent(slow.reference))
    await slow.reached()
    with pytest.raises(AttemptFailed) as caught:
        await rig.another().install_agent(slow.reference)
    assert caught.value.reason == "AGENT_INSTALLING"
    await slow.finish()
    assert (await copying).made
    assert not (await rig.another().install_agent(slow.reference)).made


async def test_two_callers_of_one_server_share_a_copy(rig: Rig):
    image = await rig.agent_image()
    both = await asyncio.gather(rig.driver.install_agent(image), rig.driver.install_agent(image))
    assert sorted(each.made for each in both) == [False, True]
    assert rig.calls["start"] == 1


async def test_two_servers_install_at_once(rig: Rig):
    image = await rig.agent_image()
    a, b = await asyncio.gather(insist(rig.driver, image), insist(rig.another(), image))
    assert a.volume == b.volume
    assert await rig.agent_works(a.volume)


async def test_two_servers_make_the_helper_at_once(rig: Rig, eventually: Eventually):
    """The engine refuses the second one; that is no trouble of its own."""
    image, gate = await rig.agent_image(), rig.hold("create")
    both = [asyncio.create_task(driver.install_agent(image)) for driver in (rig.driver, rig.another())]
    await eventually(lambda: rig.calls["create"] == 2)
    gate.open()
    for result in await asyncio.gather(*both, return_exceptions=True):
        match result:
            case AttemptFailed():
                assert "copies the agent's files" in result.message
            case _:
                assert isinstance(result, InstalledAgent), result


@pytest.mark.parametrize("call", CHANGES)
async def test_install_again_after_a_reply_got_lost(rig: Rig, call: str):
    image = await rig.agent_image()
    rig.lose_reply(call)
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.install_agent(image)
    installed = await insist(rig.another(), image)
    assert await rig.agent_works(installed.volume)


async def test_a_copy_that_was_killed_is_done_again(rig: Rig):
    slow = await rig.slow_agent()
    copying = asyncio.create_task(rig.driver.install_agent(slow.reference))
    await slow.reached()
    await slow.kill()
    with pytest.raises(AttemptFailed, match="137") as caught:
        await copying
    assert caught.value.reason == "AGENT_INSTALLING"

    copying = asyncio.create_task(rig.driver.install_agent(slow.reference))
    await slow.reached()
    await slow.finish()
    assert (await copying).made


# a sandbox with an agent


async def test_the_ports_of_an_agent_are_published(rig: Rig):
    work = rig.work(agent=await agent(rig))
    seen = await rig.driver.ensure(work)
    assert seen.power is Power.RUNNING
    assert seen.address is not None
    assert set(seen.address.ports) == {AGENT_PORT, HTTP_PORT}
    assert len(set(seen.address.ports.values())) == 2
    assert all(place.startswith("127.0.0.1:") for place in seen.address.ports.values())
    assert await rig.driver.observe(work.ref) == seen


async def test_without_an_agent_nothing_is_published(rig: Rig):
    seen = await rig.driver.ensure(rig.work())
    assert seen.address is not None
    assert seen.address.ports == {}


async def test_a_start_whose_port_is_taken_is_repeated_at_once(rig: Rig):
    work = rig.work(agent=await agent(rig))
    starts = rig.calls["start"]
    rig.take_ports(8)
    seen = await rig.driver.ensure(work)
    assert seen.power is Power.RUNNING
    assert rig.calls["start"] == starts + 9


async def test_ports_that_stay_taken(rig: Rig):
    work = rig.work(agent=await agent(rig))
    rig.take_ports(9)
    with pytest.raises(AttemptFailed) as caught:
        await rig.driver.ensure(work)
    assert caught.value.reason == "PORTS_EXHAUSTED"
    assert await power_of(rig.driver, work.ref) is None
    assert (await rig.driver.ensure(work)).power is Power.RUNNING


async def test_a_volume_without_the_agent(rig: Rig):
    """As after a person has removed helper and volume."""
    image = await rig.agent_image()
    volume = (await rig.driver.install_agent(image)).volume
    await rig.forget_agent(volume)
    work = rig.work(agent=Agent(volume, TOKEN))
    with pytest.raises(AgentMissing, match=volume):
        await rig.driver.ensure(work)
    assert await power_of(rig.driver, work.ref) is None
    again = await rig.driver.install_agent(image)
    assert (again.volume, again.made) == (volume, True)
    assert (await rig.driver.ensure(work)).power is Power.RUNNING


async def test_an_image_without_a_shell_is_a_verdict(rig: Rig):
    """The engine starts it, and it ends at once with a plain exit code."""
    work = rig.work(agent=await agent(rig), image=await rig.shellless_image())

    async def seen() -> Observed | None:
        return await rig.driver.observe(work.ref)

    placed: Observed | None = await rig.driver.ensure(work)
    async with asyncio.timeout(30):
        while placed is None or placed.power is not Power.EXITED:
            placed = await seen()
    assert placed.verdict is not None
    assert placed.verdict.reason == "IMAGE_HAS_NO_SHELL"
    assert "/bin/sh" in placed.verdict.message
    assert await seen() == placed, "asked again, it says the same"


async def test_an_end_of_its_own_is_no_verdict(rig: Rig, eventually: Eventually):
    work = structs.replace(rig.ending(1), agent=await agent(rig))
    await rig.driver.ensure(work)
    seen = await exited(rig, work, eventually)
    assert seen.exit is not None
    assert (seen.exit.code, seen.verdict) == (1, None)
