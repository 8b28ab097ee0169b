"""Cases over HTTP, each against a server process of its own.

Rates are compared with a bare handler, because machines differ by more than the code does. One machine differs from
itself too, when others use it, so `in_turns` measures the handler between the parts of each figure, in every try. The
targets of rates were given for a machine where that handler answers 4,324 requests a second; `at_rate` turns them into
ratios.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import asyncpg
from msgspec import Struct

from tests.bench.figures import Figure, at_least, at_most, ms
from tests.bench.http import Client, latencies, p50, throughput
from tests.bench.servers import cpu_seconds, idle_cpu, memory_mib, running
from tests.bench.stage import LARGE, Bench, request

SANDBOXES, LIVE = (200_000, 20_000) if LARGE else (40_000, 4_000)
CREATES = 6000 if LARGE else 2400
LIVES = 6400 if LARGE else 2560
CLIENTS = 64
WRITERS, RENEWALS = 16, 40
TURNS = 4
"""Parts that a rate is measured in."""
REFERENCE_FLOOR = 4324
"""Requests a second of the bare handler on the machine for which the targets of rates were given."""
FLOOR_TABLE = "CREATE TABLE IF NOT EXISTS floor (id uuid PRIMARY KEY, data text)"
SEED = """
INSERT INTO sandboxes (id, tenant, version, position, schema, phase, desired, observed, spec, metadata, engine, epoch,
                       place, object_id, generation, run, key_id, key_name, fingerprint, created_at, changed_at,
                       expires_at, ended_at, end_cause, ended_by, closed_at, since_position)
SELECT id, 'default', CASE WHEN live THEN 1 ELSE 2 END, 0, 1, CASE WHEN live THEN 'Pending' ELSE 'Terminated' END,
       CASE WHEN live THEN 'running' ELSE 'terminated' END, CASE WHEN live THEN 'none' ELSE 'removed' END,
       '{"image": "img", "entrypoint": ["sleep", "3600"]}',
       jsonb_build_object('bench', 'yes', 'rare', (n % 1000)::text), 'fake', 1, '', id, 0, 0, 'k', 'default', 'f',
       now() - n * interval '1 ms', now(), now() + interval '1 hour',
       CASE WHEN live THEN NULL ELSE now() END, CASE WHEN live THEN NULL ELSE 'user_delete' END,
       CASE WHEN live THEN NULL ELSE 'api_key default' END, CASE WHEN live THEN NULL ELSE now() END, 0
  FROM (SELECT gen_random_uuid() AS id, n, n % $2 = 0 AS live FROM generate_series(1, $1::int) n) AS seed
"""

RUN = """
UPDATE sandboxes
   SET phase = 'Running', observed = 'running', generation = 1, run = 1, ready_at = now(),
       address = '{"network": "bridge", "ip": "172.17.0.2", "ports": {"44772": "127.0.0.1:32768"}}'
 WHERE id = $1
"""
"""A seeded sandbox runs, with an agent."""


async def commit_floor(dsn: str, count: int) -> list[float]:
    """Seconds of bare one-row commits."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(FLOOR_TABLE)
    times: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await connection.execute("INSERT INTO floor VALUES ($1, $2)", uuid4(), "x" * 500)
        times.append(time.perf_counter() - began)
    await connection.close()
    return times


class Rate(Struct, frozen=True):
    """What a server does in a second, and what the bare handler does in the same minute."""

    rate: float
    floor: float
    share: float
    """Of one core, that the server used meanwhile."""

    @property
    def shown(self) -> str:
        """For people."""
        return f"{self.rate:.0f}/s (server {self.share * 100:.0f} % of a core)"


async def in_turns(bench: Bench, part: Callable[[], Awaitable[float]], pid: int) -> Rate:
    """The rate that `part` says of a server, in turns with a bare Litestar handler that reads one row by primary key."""
    dsn, some = await seeded(bench, 1000, 1000)
    rates: list[float] = []
    floors: list[float] = []
    used = spent = 0.0
    with floor_server(dsn) as base:
        await asyncio.sleep(1)
        for _ in range(TURNS):
            floors.append(await throughput(base, bare_read(some), 2000, 8))
            before, began = cpu_seconds(pid), time.perf_counter()
            rates.append(await part())
            used += cpu_seconds(pid) - before
            spent += time.perf_counter() - began
    return Rate(p50(rates), p50(floors), used / spent)


def at_rate(what: str, value: str, rate: float, floor: float, target: int) -> Figure:
    """A rate beside the floor. The target was given for the machine that `REFERENCE_FLOOR` was measured on."""
    wanted = round(target / REFERENCE_FLOOR, 3)
    beside = f"Litestar + asyncpg {floor:.0f}/s"
    ratio = rate / floor
    return Figure(what, value, beside, ratio, f">= {wanted:g} ({target:,}/s)", ratio >= wanted)


@contextmanager
def floor_server(dsn: str) -> Generator[str]:
    """The bare handler; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running(["--floor", dsn, str(port)]) as (base, _):
        yield base


def bare_read(some: UUID) -> Callable[[Client], Awaitable[None]]:
    """One request to the bare handler."""

    async def bare(client: Client) -> None:
        status, data = await client.request("GET", f"/sandboxes/{some}")
        assert status == 200, data

    return bare


async def create(client: Client) -> None:
    """One create, accepted."""
    status, data = await client.request("POST", "/v1/sandboxes", request("img"))
    assert status == 202, data


async def accepted(bench: Bench) -> Sequence[Figure]:
    """Creates accepted, no worker: HTTP and one append. In turns with bare commits, so that both see the same disk."""
    dsn = await bench.fresh()
    with running([bench.config(dsn), "api", "fake"]) as (base, pid):
        floors: list[float] = []
        times: list[float] = []
        for _ in range(4):
            floors += await commit_floor(dsn, 150)
            times += await latencies(base, create, 150)
        found = await in_turns(bench, lambda: throughput(base, create, CREATES // TURNS, 8), pid)
    ratio = p50(times) / p50(floors)
    return [
        at_most("create accepted, p50", ms(p50(times)), f"one bare commit {ms(p50(floors))}", ratio, 4.5),
        at_rate("creates accepted over HTTP, 8 clients", found.shown, found.rate, found.floor, 1300),
    ]


async def idle(bench: Bench) -> Sequence[Figure]:
    """What a server that does nothing costs."""
    with running([bench.config(await bench.fresh()), "all", "fake"]) as (_, pid):
        await asyncio.sleep(5)
        memory, share = memory_mib(pid), idle_cpu(pid, 20)
    return [
        Figure("idle memory (PSS), API and worker", f"{memory:.0f} MiB", target="<= 110 MiB", met=memory <= 110),
        Figure("idle CPU, API and worker", f"{share * 100:.2f} %", target="<= 0.5 %", met=share <= 0.005),
    ]


async def renewals(bench: Bench) -> Sequence[Figure]:
    """Sixteen clients renew one sandbox."""
    with running([bench.config(await bench.fresh()), "all", "fake"]) as (base, _):
        clients = [Client(base) for _ in range(WRITERS)]
        _, data = await clients[0].request("POST", "/v1/sandboxes", request("img"), "Prefer: wait=60\r\n")
        path = f"/v1/sandboxes/{json.loads(data)['id']}/renew-expiration"
        refused = 0

        async def renew(number: int, client: Client) -> None:
            nonlocal refused
            for turn in range(RENEWALS):
                at = datetime.now(UTC) + timedelta(hours=1, seconds=number * RENEWALS + turn)
                status, _ = await client.request("POST", path, {"expiresAt": at.isoformat()})
                refused += status != 200

        began = time.perf_counter()
        await asyncio.gather(*[renew(number, client) for number, client in enumerate(clients)])
        rate = WRITERS * RENEWALS / (time.perf_counter() - began)
        for client in clients:
            await client.close()
    what = f"renewals of one sandbox by {WRITERS} clients refused"
    value = f"{refused} of {WRITERS * RENEWALS} ({rate:.0f}/s)"
    return [Figure(what, value, target="0", met=refused == 0)]


async def lives(bench: Bench) -> Sequence[Figure]:
    """Create, wait for Running, delete; API and worker in one process, on the fake engine."""
    with running([bench.config(await bench.fresh()), "all", "fake"]) as (base, pid):

        async def life(client: Client) -> None:
            status, data = await client.request("POST", "/v1/sandboxes", request("img"), "Prefer: wait=60\r\n")
            made = json.loads(data)
            assert status == 202 and made["status"]["state"] == "Running", data
            status, data = await client.request("DELETE", f"/v1/sandboxes/{made['id']}")
            assert status == 204, data

        found = await in_turns(bench, lambda: throughput(base, life, LIVES // TURNS, CLIENTS), pid)
    return [at_rate(f"lives on the fake engine, {CLIENTS} clients", found.shown, found.rate, found.floor, 300)]


async def seeded(bench: Bench, count: int, live: int) -> tuple[str, UUID]:
    """A database with head rows only, and one live sandbox of it."""
    dsn = await bench.fresh()
    connection = await asyncpg.connect(dsn)
    await connection.execute("ALTER TABLE sandboxes DISABLE TRIGGER USER")
    # Rows that have ended without ever having begun.
    await connection.execute("ALTER TABLE sandboxes DROP CONSTRAINT born_pending")
    await connection.execute(SEED, count, count // live)
    await connection.execute("VACUUM ANALYZE sandboxes")
    some: UUID = await connection.fetchval("SELECT id FROM sandboxes WHERE closed_at IS NULL LIMIT 1")
    await connection.close()
    return dsn, some


async def lists(bench: Bench) -> Sequence[Figure]:
    """Pages of twenty out of many, most of which have ended."""
    dsn, _ = await seeded(bench, SANDBOXES, LIVE)
    small, _ = await seeded(bench, 100, 100)
    queries = {
        "includeTerminal and a state": "includeTerminal=true&state=Pending",
        "includeTerminal and an ended state": "includeTerminal=true&state=Terminated",
        "includeTerminal and a rare entry": "includeTerminal=true&metadata=rare%3D7",
        "includeTerminal, state and entry": "includeTerminal=true&state=Terminated&metadata=rare%3D7",
    }

    async def read(client: Client, query: str = "") -> None:
        status, data = await client.request("GET", f"/v1/sandboxes?pageSize=20&{query}")
        assert status == 200 and json.loads(data)["items"], data

    figures: list[Figure] = []
    with (
        running([bench.config(dsn), "api", "fake"]) as (base, _),
        running([bench.config(small), "api", "fake"]) as (
            other,
            _,
        ),
    ):
        plain, floors = [], []
        for _ in range(3):
            floors += await latencies(other, read, 100)
            plain += await latencies(base, read, 100)
        ratio = p50(plain) / p50(floors)
        what = f"list of 20, {SANDBOXES:,} sandboxes, {LIVE:,} live, p50"
        figures.append(at_most(what, ms(p50(plain)), f"out of 100 {ms(p50(floors))}", ratio, 1.5))
        for name, query in queries.items():
            spent = p50(await latencies(base, lambda client, query=query: read(client, query), 100))
            figures.append(Figure(f"the same, {name}, p50", ms(spent), target="<= 10 ms", met=spent <= 0.010))
    return figures


async def reads(bench: Bench) -> Sequence[Figure]:
    """One sandbox by id, beside a bare handler that reads one row by primary key."""
    dsn, some = await seeded(bench, 10_000, 10_000)

    async def one(client: Client) -> None:
        status, data = await client.request("GET", f"/v1/sandboxes/{some}")
        assert status == 200, data

    with running([bench.config(dsn), "api", "fake"]) as (base, _), floor_server(dsn) as floor:
        await asyncio.sleep(1)
        mine: list[float] = []
        floors: list[float] = []
        for _ in range(5):
            floors.append(await throughput(floor, bare_read(some), 2000, 8))
            mine.append(await throughput(base, one, 2000, 8))
    ratio = p50(mine) / p50(floors)
    value, beside = f"{p50(mine):.0f}/s", f"Litestar + asyncpg {p50(floors):.0f}/s"
    return [at_least("GET by id, 8 clients", value, beside, ratio, 0.65)]


async def endpoints(bench: Bench) -> Sequence[Figure]:
    """Lookups of an endpoint beside reads of the same sandbox, in turns."""
    dsn, some = await seeded(bench, 10_000, 10_000)
    connection = await asyncpg.connect(dsn)
    await connection.execute(RUN, some)
    await connection.close()

    def read(path: str) -> Callable[[Client], Awaitable[None]]:
        async def one(client: Client) -> None:
            status, data = await client.request("GET", f"/v1/sandboxes/{some}{path}")
            assert status == 200, data

        return one

    with running([bench.config(dsn), "api", "fake"]) as (base, _):
        lookups: list[float] = []
        gets: list[float] = []
        for _ in range(5):
            gets += await latencies(base, read(""), 300)
            lookups += await latencies(base, read("/endpoints/44772"), 300)
    ratio = p50(lookups) / p50(gets)
    return [at_most("endpoint lookup, p50", ms(p50(lookups)), f"GET by id {ms(p50(gets))}", ratio, 1.1)]
