"""`/ready` needs no key: it is cheap to ask, and says little to strangers."""

from __future__ import annotations

import asyncio

import pytest
from litestar import Litestar

from app.api.app import create_app
from app.runtime.driver import EngineInfo
from app.runtime.fake import FakeDriver, FakeEngine
from tests.api.conftest import INSTALLATION, KEY, MakeContext, client

ASKED = {"open-sandbox-api-key": KEY}


class _Counting(FakeDriver):
    """An engine that says how often it is asked."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(engine, INSTALLATION)
        self.asked = 0
        self.answers = asyncio.Event()

    async def check(self) -> EngineInfo:
        self.asked += 1
        await self.answers.wait()
        return await super().check()


@pytest.fixture
def driver() -> _Counting:
    return _Counting(FakeEngine())


@pytest.fixture
def app(make_context: MakeContext, driver: _Counting) -> Litestar:
    return create_app(make_context(driver=driver, worker_alive=lambda: True))


async def test_many_who_ask_at_once_are_one_question(app: Litestar, driver: _Counting):
    async with client(app) as http:
        asking = [asyncio.create_task(http.get("/ready")) for _ in range(50)]
        while not driver.asked:
            await asyncio.sleep(0)
        left = asyncio.create_task(http.get("/ready"))
        await asyncio.sleep(0)
        left.cancel()
        driver.answers.set()
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
        assert (await http.get("/ready")).status_code == 200
    assert driver.asked == 1


async def test_an_answer_does_not_hold_for_ever(make_context: MakeContext, driver: _Counting):
    driver.answers.set()
    app = create_app(make_context(driver=driver, worker_alive=lambda: True, ready_cache_seconds=0))
    async with client(app) as http:
        for _ in range(3):
            await http.get("/ready")
    assert driver.asked == 3


async def test_strangers_learn_what_fails_and_not_why(make_context: MakeContext):
    engine = FakeEngine()
    engine.down = True
    context = make_context(driver=FakeDriver(engine, INSTALLATION), worker_alive=lambda: False)
    checks = {"database": "ok", "migrations": "ok", "engine": "failed", "worker": "failed"}
    async with client(create_app(context)) as http:
        for headers in ({}, {"OPEN-SANDBOX-API-KEY": "guess"}):
            answer = await http.get("/ready", headers=headers)
            assert (answer.status_code, answer.json()) == (503, {"status": "unready", "checks": checks})
        told = (await http.get("/ready", headers=ASKED)).json()["checks"]
        assert (told["database"], told["migrations"]) == ("ok", "ok")
        assert "down" in told["engine"]
    keyless = make_context(api_key=None, driver=FakeDriver(engine, INSTALLATION), worker_alive=lambda: False)
    async with client(create_app(keyless), base_url="http://localhost") as http:
        assert (await http.get("/ready")).json()["checks"] == checks
