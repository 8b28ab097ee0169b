"""Cases without HTTP: the worker on a fake engine, and reading the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from uuid import uuid4

from app.domain.sandbox import commands as cmd
from app.domain.sandbox import events as ev
from app.domain.sandbox.state import Phase
from app.domain.tenants import ANY_TENANT
from app.errors import RuntimeUnavailable
from app.runtime.fake import FakeDriver, FakeEngine, Pull
from app.service.streams import decoded
from app.store.log.store import EventLog, StoredEvent
from tests.bench.figures import Figure
from tests.bench.http import p50
from tests.bench.over_http import at_rate
from tests.bench.stage import LARGE, META, Bench, working

CREATES, PATCHES = 100, 50
PULLS = 100
OUTAGE_S = 300 if LARGE else 15
EVENTS = 200_000 if LARGE else 20_000


async def claims(bench: Bench) -> Sequence[Figure]:
    """How many statements claim work, for creates one after the other and for changes that are no work."""
    installation = uuid4()
    async with working(await bench.fresh(), FakeDriver(FakeEngine(), installation), installation) as parts:
        await parts.reaches(await parts.create(), Phase.RUNNING)
        before = parts.database.claims
        for _ in range(CREATES):
            sandbox = await parts.create()
            await parts.reaches(sandbox, Phase.RUNNING)
        a_create = (parts.database.claims - before) / CREATES
        before = parts.database.claims
        for number in range(PATCHES):
            await parts.service.execute(sandbox, ANY_TENANT, cmd.PatchMetadata({"n": str(number)}, 256), META)
        patches = parts.database.claims - before
    return [
        Figure("claim statements per create", f"{a_create:.2f}", target="<= 1.3", met=a_create <= 1.3),
        Figure(f"claim statements per {PATCHES} metadata patches", str(patches), target="<= 2", met=patches <= 2),
    ]


async def fairness(bench: Bench) -> Sequence[Figure]:
    """A delete of one tenant while 100 pulls of another hang."""
    installation, engine = uuid4(), FakeEngine()
    gate = asyncio.Event()
    for number in range(PULLS):
        engine.to_pull.add(f"slow:{number}")
        engine.pulls[f"slow:{number}"] = Pull(gate=gate)
    async with working(await bench.fresh(), FakeDriver(engine, installation), installation) as parts:
        victim = await parts.create(tenant="other")
        await parts.reaches(victim, Phase.RUNNING)
        await asyncio.gather(*[parts.create(f"slow:{number}", tenant="busy") for number in range(PULLS)])
        while engine.calls["pull"] == 0:
            await asyncio.sleep(0.01)
        await parts.service.execute(victim, ANY_TENANT, cmd.Terminate(), META)
        waited = await parts.reaches(victim, Phase.TERMINATED)
        gate.set()
    return [
        Figure(
            f"delete of another tenant while {PULLS} pulls hang",
            f"{waited:.3f} s",
            target="<= 1 s",
            met=waited <= 1,
        )
    ]


async def outage(bench: Bench) -> Sequence[Figure]:
    """How long work waits after the engine is back."""
    installation, away = uuid4(), False

    async def answer(_call: str) -> None:
        if away:
            raise RuntimeUnavailable("the engine is away")

    driver = FakeDriver(FakeEngine(), installation, before=answer)
    async with working(await bench.fresh(), driver, installation) as parts:
        await parts.reaches(await parts.create(), Phase.RUNNING)
        away = True
        waiting = [await parts.create() for _ in range(20)]
        await asyncio.sleep(OUTAGE_S)
        away = False
        waited = max(await asyncio.gather(*[parts.reaches(sandbox, Phase.RUNNING) for sandbox in waiting]))
    what = f"work resumes after an outage of {OUTAGE_S} s"
    return [Figure(what, f"{waited:.2f} s", target="<= 3 s", met=waited <= 3)]


async def log(bench: Bench) -> Sequence[Figure]:
    """Events that the fake engine's sandboxes left, many times over: read in order, and decoded from stored bytes."""
    installation, dsn = uuid4(), await bench.fresh()
    async with working(dsn, FakeDriver(FakeEngine(), installation), installation) as parts:
        made = [await parts.create() for _ in range(50)]
        for sandbox in made:
            await parts.reaches(sandbox, Phase.RUNNING)
            await parts.service.execute(sandbox, ANY_TENANT, cmd.Terminate(), META)
        for sandbox in made:
            await parts.reaches(sandbox, Phase.TERMINATED)
        log = EventLog(parts.database)
        stored: list[StoredEvent] = []
        position, spent, rounds = 0, 0.0, 0
        while rounds < EVENTS // 500:
            began = time.perf_counter()
            page, position = await log.read_after(position)
            spent += time.perf_counter() - began
            stored += page
            if not page:
                position, rounds = 0, rounds + 1
        stored = [one for one in stored if one.kind == ev.REGISTRY.kind]
        times: list[float] = []
        for _ in range(5):
            began = time.perf_counter()
            for one in stored:
                decoded(ev.REGISTRY, one)
            times.append(time.perf_counter() - began)
    rate = len(stored) / p50(times)
    both = len(stored) / (p50(times) + spent)
    return [
        Figure("events decoded, from stored bytes", f"{rate:,.0f}/s"),
        await at_rate(
            bench,
            "events read from the database and decoded",
            f"{both:,.0f}/s ({len(stored):,} events)",
            both,
            100_000,
        ),
    ]
