"""Run everything, print a table, write bench.json."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiodocker
import asyncpg
import msgspec
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from app.cli.local_image import ensure_busybox_image
from app.domain.sandbox import events as ev
from app.domain.sandbox.spec import SandboxSpec
from app.runtime.docker import DockerOptions
from app.runtime.docker.options import with_seccomp_document
from app.runtime.docker.spec import container_config
from app.runtime.driver import Limits, Workload
from app.service.sandboxes import Service, recorded
from app.store.database.migrate import migrate
from app.store.database.pool import Database
from app.store.embedded.server import EmbeddedPostgres
from app.store.log.signal import Signal
from app.store.log.store import EventLog
from tests.bench.http import Client, latencies, p50, throughput
from tests.bench.servers import cpu_seconds, idle_cpu, memory_mib, running

LIMITS = {"cpu": "500m", "memory": "64Mi"}
CONSOLE = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


class Line(Struct):
    what: str
    value: str
    floor: str
    ratio: float | None
    target: str
    met: bool | None


RESULTS: list[Line] = []


def report(
    what: str, value: str, floor: str = "", ratio: float | None = None, target: str = "", *, met: bool | None = None
) -> None:
    RESULTS.append(Line(what, value, floor, ratio and round(ratio, 3), target, met))
    CONSOLE.print(f"  {what}: {value} {f'vs {floor}' if floor else ''} {f'= {ratio:.2f}x' if ratio else ''}")


def body(image: str) -> dict[str, Any]:
    return {
        "image": {"uri": image},
        "entrypoint": ["sleep", "3600"],
        "timeout": 3600,
        "resourceLimits": LIMITS,
        "metadata": {"bench": "yes"},
    }


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


@contextmanager
def config(home: Path, dsn: str, name: str, docker_host: str | None) -> Iterator[str]:
    path = home / f"{name}.toml"
    host = f"[docker]\nhost = {json.dumps(docker_host)}\n" if docker_host else ""
    path.write_text(
        f'[server]\nport = 0\n[log]\nlevel = "WARNING"\n[store.postgresql]\ndsn = {json.dumps(dsn)}\n{host}'
        f"[sandledger]\nstate_dir = {json.dumps(str(home / 'state'))}\n"
    )
    yield str(path)


async def fresh(server: EmbeddedPostgres, name: str) -> str:
    connection = await asyncpg.connect(server.dsn)
    await connection.execute(f"CREATE DATABASE {name}")
    # For the floors, which name tables without a schema.
    await connection.execute(f"ALTER DATABASE {name} SET search_path = sandledger, public")
    await connection.close()
    head, _, query = server.dsn.partition("?")
    dsn = f"{head.rpartition('/')[0]}/{name}?{query}"
    await migrate(dsn)
    return dsn


async def commit_floor(dsn: str, count: int) -> list[float]:
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE TABLE IF NOT EXISTS floor (id uuid PRIMARY KEY, data text)")
    times = []
    for _ in range(count):
        began = time.perf_counter()
        await connection.execute("INSERT INTO floor VALUES ($1, $2)", uuid4(), "x" * 500)
        times.append(time.perf_counter() - began)
    await connection.close()
    return times


async def accepted(home: Path, dsn: str) -> None:
    """Creates accepted, no worker: HTTP + one append."""

    async def create(client: Client) -> None:
        status, data = await client.request("POST", "/v1/sandboxes", body("img"))
        assert status == 202, data

    with config(home, dsn, "api", None) as path, running([path, "api", "fake"]) as (base, _):
        floors, times = [], []
        for _ in range(4):  # interleaved, so that both see the same disk
            floors += await commit_floor(dsn, 150)
            times += await latencies(base, create, 150)
    ratio = p50(times) / p50(floors)
    report("create accepted, p50", ms(p50(times)), f"one bare commit {ms(p50(floors))}", ratio, "<= 5", met=ratio <= 5)


async def engine(home: Path, dsn: str, docker_host: str) -> None:
    """Create to Running against bare create + start of the same HostConfig."""
    async with aiodocker.Docker(url=docker_host) as docker:
        image = await ensure_busybox_image(docker, "sandledger-bench:1")
        options = with_seccomp_document(DockerOptions(installation=uuid4()))

        async def bare() -> str:
            work = Workload(uuid4(), "bench", image, ("sleep", "3600"), {}, Limits(500_000_000, 64 * 1024 * 1024))
            made = await docker.containers.create(
                msgspec.to_builtins(container_config(work, options)), name=f"bench-{work.sandbox_id}"
            )
            await made.start()
            return made.id

        async def drop(ids: list[str]) -> None:
            for one in ids:
                await docker.containers.container(one).delete(force=True)

        async def ours(client: Client) -> str:
            status, data = await client.request("POST", "/v1/sandboxes", body(image), "Prefer: wait=60\r\n")
            made = json.loads(data)
            assert status == 202 and made["status"]["state"] == "Running", data
            return made["id"]

        async def clear(base: str, ids: list[str]) -> None:
            client = Client(base)
            for one in ids:
                await client.request("DELETE", f"/v1/sandboxes/{one}")
            while [c for c in await docker.containers.list(all=True) if any(i in str(c["Names"]) for i in ids)]:
                await asyncio.sleep(0.2)
            await client.close()

        with config(home, dsn, "docker", docker_host) as path, running([path, "all", "docker"]) as (base, _):
            client = Client(base)
            floors, times = [], []
            made, bares = [], []
            for n in range(24):
                began = time.perf_counter()
                bares.append(await bare())
                middle = time.perf_counter()
                made.append(await ours(client))
                if n >= 3:
                    floors.append(middle - began)
                    times.append(time.perf_counter() - middle)
            await client.close()
            await drop(bares)
            await clear(base, made)
            ratio = p50(times) / p50(floors)
            report(
                "create to Running, 1 client, p50",
                ms(p50(times)),
                f"engine {ms(p50(floors))}",
                ratio,
                "<= 1.15",
                met=ratio <= 1.15,
            )
            rates: dict[str, list[float]] = {"floor": [], "ours": []}

            async def batch(which: str) -> None:
                clients = [Client(base) for _ in range(8)]
                began = time.perf_counter()
                made = await asyncio.gather(
                    *[_some(bare if which == "floor" else lambda c=c: ours(c), 4) for c in clients]
                )
                rates[which].append(32 / (time.perf_counter() - began))
                ids = [one for some in made for one in some]
                await (drop(ids) if which == "floor" else clear(base, ids))
                for one in clients:
                    await one.close()

            for turn in range(4):  # in turns, so that neither always comes after the other's clean-up
                for which in ("floor", "ours") if turn % 2 else ("ours", "floor"):
                    await batch(which)
            ours_rate, floor_rate = p50(rates["ours"]), p50(rates["floor"])
            ratio = ours_rate / floor_rate
            report(
                "create to Running, 8 clients",
                f"{ours_rate:.1f}/s",
                f"engine {floor_rate:.1f}/s",
                ratio,
                ">= 0.9",
                met=ratio >= 0.9,
            )


async def _some(call: Any, count: int) -> list[str]:
    return [await call() for _ in range(count)]


async def fake(home: Path, dsn: str) -> None:
    """The whole path on the fake driver: how much the server itself carries."""

    async def create(client: Client) -> None:
        status, data = await client.request("POST", "/v1/sandboxes", body("img"))
        assert status == 202, data

    with config(home, dsn, "fake", None) as path:
        with running([path, "all", "fake"]) as (base, pid):
            report(
                "idle memory (PSS), API and worker",
                f"{memory_mib(pid):.0f} MiB",
                target="<= 120 MiB",
                met=memory_mib(pid) <= 120,
            )
            share = idle_cpu(pid, 15)
            report("idle CPU, API and worker", f"{share * 100:.2f} %", target="<= 1 %", met=share <= 0.01)
        with running([path, "api", "fake"]) as (base, pid):
            for clients in (8, 32):
                before, began, mine = cpu_seconds(pid), time.perf_counter(), time.process_time()
                rate = await throughput(base, create, 3000, clients)
                spent = time.perf_counter() - began
                used, client_share = (cpu_seconds(pid) - before) / spent, (time.process_time() - mine) / spent
                report(
                    f"creates accepted over HTTP, {clients} clients",
                    f"{rate:.0f}/s (server {used * 100:.0f} % of a core, load generator {client_share * 100:.0f} %)",
                    target="1000/s on 2 cores",
                    met=rate >= 1000,
                )
    connection = await asyncpg.connect(dsn)
    await connection.execute("SELECT 1")
    await connection.close()


async def in_process(dsn: str) -> None:
    """Appends and tailing without HTTP."""
    database = Database(dsn)
    service = Service(database, Signal(database))
    meta = ev.Meta(ev.Actor(ev.ActorKind.OPERATOR, "bench", "bench"), "bench")
    event = ev.Requested("default", "fake", SandboxSpec("img", ("sleep", "1"), LIMITS, timeout_s=3600), "f")

    async def work(count: int) -> None:
        for _ in range(count):
            await service.create(uuid4(), event, None, meta)

    await work(50)
    began = time.perf_counter()
    await asyncio.gather(*[work(250) for _ in range(16)])
    report("appends of one process, 16 tasks", f"{4000 / (time.perf_counter() - began):.0f}/s")
    log, position, seen = EventLog(database), 0, 0
    began = time.perf_counter()
    while True:
        events, after = await log.read_after(position)
        seen += len([recorded(event) for event in events])
        if after == position:
            break
        position = after
    report("events tailed and decoded", f"{seen / (time.perf_counter() - began):.0f}/s ({seen} events)")
    await database.close()


_SEED = """
INSERT INTO sandboxes (id, tenant, version, phase, driver, desired, observed, spec, metadata, fingerprint, created_at,
                       changed_at, expires_at, since_position)
SELECT gen_random_uuid(), 'default', 1, 'Pending', 'fake', 'running', 'none',
       '{"image": "img", "entrypoint": ["sleep", "3600"], "timeout_s": 3600}', '{"bench": "yes"}', 'f',
       now() - n * interval '1 ms', now(), now() + interval '1 hour', 0
  FROM generate_series(1, $1::int) n
"""


async def reads(home: Path, server: EmbeddedPostgres) -> None:
    """List and get."""
    lists: dict[int, float] = {}
    for count in (100, 100_000):
        dsn = await fresh(server, f"list_{count}")
        connection = await asyncpg.connect(dsn)
        await connection.execute(_SEED, count)
        await connection.execute("VACUUM ANALYZE sandboxes")
        some: UUID = await connection.fetchval("SELECT id FROM sandboxes LIMIT 1")
        await connection.close()

        async def listing(client: Client, count: int = count) -> None:
            status, data = await client.request("GET", "/v1/sandboxes?pageSize=20")
            assert status == 200 and json.loads(data)["pagination"]["totalItems"] == count, data

        async def one(client: Client, some: UUID = some) -> None:
            status, data = await client.request("GET", f"/v1/sandboxes/{some}")
            assert status == 200, data

        async def bare(client: Client, some: UUID = some) -> None:
            status, data = await client.request("GET", f"/sandboxes/{some}")
            assert status == 200, data

        with config(home, dsn, f"list{count}", None) as path, running([path, "api", "fake"]) as (base, _):
            lists[count] = p50(await latencies(base, listing, 400))
            if count == 100_000:
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                with running(["--floor", dsn, str(port)]) as (floor_base, _):
                    await asyncio.sleep(1)
                    mine, floors = [], []
                    for _ in range(3):
                        floors.append(await throughput(floor_base, bare, 3000, 8))
                        mine.append(await throughput(base, one, 3000, 8))
                    ratio = p50(mine) / p50(floors)
                    report(
                        "GET by id, 8 clients",
                        f"{p50(mine):.0f}/s",
                        f"Litestar + asyncpg {p50(floors):.0f}/s",
                        ratio,
                        ">= 0.7",
                        met=ratio >= 0.7,
                    )
    ratio = lists[100_000] / lists[100]
    report(
        "list of 20 out of 100,000, p50",
        ms(lists[100_000]),
        f"out of 100 {ms(lists[100])}",
        ratio,
        "<= 1.5",
        met=ratio <= 1.5,
    )


def engine_address() -> str | None:
    """Where the engine is: the environment, else what `make engine` wrote down."""
    noted = Path(".state/engine.env")
    if host := os.environ.get("DOCKER_HOST"):
        return host
    if noted.exists():
        return noted.read_text().split("DOCKER_HOST=", 1)[1].split("\n", 1)[0].strip("'\"")
    return None


async def main() -> None:
    home = Path(tempfile.mkdtemp(prefix="sandledger-bench-"))
    home.chmod(0o711)  # PostgreSQL runs as an account of its own and must be able to pass through
    server = EmbeddedPostgres.start(home)
    try:
        CONSOLE.print("measuring, about two minutes ...")
        await accepted(home, await fresh(server, "accepted"))
        await fake(home, await fresh(server, "fake"))
        await in_process(await fresh(server, "appends"))
        await reads(home, server)
        host = engine_address()
        if host is None:
            CONSOLE.print("no engine: run make engine for the engine ratios")
        else:
            await engine(home, await fresh(server, "docker"), host)
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)
    table = Table(title="Sandledger bench", box=None, header_style="bold", title_justify="left")
    for heading in ("what", "value", "floor", "ratio", "target", "met"):
        table.add_column(heading, overflow="fold")
    for line in RESULTS:
        table.add_row(
            line.what,
            line.value,
            line.floor,
            "" if line.ratio is None else f"{line.ratio:.2f}",
            line.target,
            {True: "yes", False: "NO", None: ""}[line.met],
        )
    CONSOLE.print(table)
    Path("bench.json").write_text(
        json.dumps([{f: getattr(line, f) for f in line.__struct_fields__} for line in RESULTS], indent=1)
    )


if __name__ == "__main__":
    asyncio.run(main())
