"""What every driver must show of an object to people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from app.errors import RuntimeUnavailable
from app.runtime.driver import Ref
from app.runtime.workload import Agent
from tests.drivers.looks import Eventually, exited
from tests.drivers.rig import Rig

ENOUGH = 1 << 20


async def written(rig: Rig, ref: Ref, tail: int = 100, **how: object) -> list[str]:
    found = await rig.driver.logs(ref, tail=tail, most=ENOUGH, **how)  # pyright: ignore[reportArgumentType]
    assert found is not None
    return [line.text for line in found.lines]


async def test_the_last_lines(rig: Rig, eventually: Eventually):
    work = rig.talking("one", "two", "three")
    await rig.driver.ensure(work)

    async def all_of_them() -> bool:
        return await written(rig, work.ref) == ["one", "two", "three"]

    await eventually(all_of_them)
    assert await written(rig, work.ref, tail=2) == ["two", "three"]
    short = await rig.driver.logs(work.ref, tail=2, most=ENOUGH)
    assert short is not None
    assert short.more
    assert all(datetime.fromisoformat(line.at).tzinfo is not None for line in short.lines)
    small = await rig.driver.logs(work.ref, tail=100, most=4)
    assert small is not None
    (line,) = small.lines
    assert "three".endswith(line.text)
    assert small.more


async def test_since(rig: Rig, eventually: Eventually):
    work = rig.talking("one")
    await rig.driver.ensure(work)

    async def there() -> bool:
        return await written(rig, work.ref) == ["one"]

    await eventually(there)
    now = datetime.now(UTC)
    assert await written(rig, work.ref, since=now - timedelta(hours=1)) == ["one"]
    assert await written(rig, work.ref, since=now + timedelta(hours=1)) == []


async def test_an_inspection(rig: Rig, eventually: Eventually):
    work = rig.talking()
    seen = await rig.driver.ensure(work)
    shown = await rig.driver.inspect(work.ref)
    assert shown is not None
    assert seen.main is not None
    assert (shown.runtime_id, shown.name) == (seen.main.runtime_id, seen.main.name)
    assert (shown.status, shown.running, shown.exit_code) == ("running", True, None)
    assert shown.image == work.image.reference
    assert shown.env["SAID"] == "s3cr3t-value"
    assert "s3cr3t-value" not in repr(shown)
    await rig.kill(work.ref.object_id)
    await exited(rig, work, eventually)
    shown = await rig.driver.inspect(work.ref)
    assert shown is not None
    assert (shown.status, shown.running, shown.exit_code) == ("exited", False, 137)
    assert shown.finished_at


async def test_the_token_of_an_agent_is_marked(rig: Rig):
    volume = (await rig.driver.install_agent(await rig.agent_image())).volume
    work = rig.work(agent=Agent(volume, "t0ken-of-a-sandbox"))
    await rig.driver.ensure(work)
    shown = await rig.driver.inspect(work.ref)
    assert shown is not None
    assert "t0ken-of-a-sandbox" in shown.values_of(())


async def test_nothing_of_ours(rig: Rig):
    for ref in (Ref(uuid4()), rig.work().ref):
        assert await rig.driver.logs(ref, tail=10, most=ENOUGH) is None
        assert await rig.driver.inspect(ref) is None
    work = rig.work()
    await rig.driver.ensure(work)
    other = rig.elsewhere()
    assert await other.logs(work.ref, tail=10, most=ENOUGH) is None
    assert await other.inspect(work.ref) is None


@pytest.mark.parametrize("call", ["inspect", "logs"])
async def test_an_engine_in_trouble(rig: Rig, call: str):
    work = rig.talking("one")
    await rig.driver.ensure(work)
    rig.refuse(call)
    with pytest.raises(RuntimeUnavailable):
        await rig.driver.logs(work.ref, tail=10, most=ENOUGH)
