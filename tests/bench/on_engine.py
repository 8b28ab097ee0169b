"""Create to Running on a real engine, beside bare create and start of the same configuration."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import aiodocker
import msgspec

from app.cli.local_image import ensure_busybox_image
from app.runtime.docker import DockerOptions
from app.runtime.docker.options import with_seccomp_document
from app.runtime.docker.spec import container_config
from app.runtime.driver import Image, Limits, Ref, Workload
from tests.bench.figures import Figure, at_least, at_most, ms
from tests.bench.http import Client, p50
from tests.bench.servers import running
from tests.bench.stage import LARGE, Bench, request
from tests.support.marks import remove_mark

IMAGE = "sandledger-bench:1"
ONE_BY_ONE = 24 if LARGE else 16
TURNS, CLIENTS, EACH = (8 if LARGE else 4), 8, 4
LABEL = "sandledger.io/installation"


class Rig:
    """Both ways to a running container."""

    def __init__(self, docker: aiodocker.Docker, base: str) -> None:
        self.docker: Any = docker
        self.base = base
        self._options = with_seccomp_document(DockerOptions(installation=uuid4()))

    async def bare(self) -> str:
        """Create and start, nothing else."""
        object_id = uuid4()
        limits = Limits(500_000_000, 64 * 1024 * 1024)
        work = Workload(Ref(object_id), "default", Image(IMAGE), ("sleep", "3600"), {}, limits)
        config = msgspec.to_builtins(container_config(work, self._options))
        made = await self.docker.containers.create(config, name=f"bench-{object_id}")
        await made.start()
        return made.id

    async def ours(self, client: Client) -> str:
        """A create that waits until it runs."""
        status, data = await client.request("POST", "/v1/sandboxes", request(IMAGE), "Prefer: wait=60\r\n")
        made = json.loads(data)
        assert status == 202 and made["status"]["state"] == "Running", data
        return made["id"]

    async def drop(self, ids: Sequence[str]) -> None:
        """End the bare ones."""
        for one in ids:
            await self.docker.containers.container(one).delete(force=True)

    async def clear(self, ids: Sequence[str]) -> None:
        """End ours, and wait until the engine has none of them."""
        client = Client(self.base)
        for one in ids:
            await client.request("DELETE", f"/v1/sandboxes/{one}")
        while any(
            any(one in str(container["Names"]) for one in ids)
            for container in await self.docker.containers.list(all=True)
        ):
            await asyncio.sleep(0.2)
        await client.close()


async def creates(bench: Bench) -> Sequence[Figure]:
    """One client, then eight."""
    dsn = await bench.fresh()
    async with aiodocker.Docker(url=bench.docker_host) as docker:
        await ensure_busybox_image(docker, IMAGE)
        with running([bench.config(dsn, bench.docker_host), "all", "docker"]) as (base, _):
            rig = Rig(docker, base)
            figures = [await _one(rig), await _eight(rig)]
            await _forget(rig)
    return figures


async def _one(rig: Rig) -> Figure:
    client = Client(rig.base)
    floors: list[float] = []
    times: list[float] = []
    made: list[str] = []
    bare: list[str] = []
    for turn in range(ONE_BY_ONE):
        began = time.perf_counter()
        bare.append(await rig.bare())
        middle = time.perf_counter()
        made.append(await rig.ours(client))
        if turn >= 3:
            floors.append(middle - began)
            times.append(time.perf_counter() - middle)
    await client.close()
    await rig.drop(bare)
    await rig.clear(made)
    ratio = p50(times) / p50(floors)
    return at_most("create to Running, 1 client, p50", ms(p50(times)), f"engine {ms(p50(floors))}", ratio, 1.1)


async def _eight(rig: Rig) -> Figure:
    floor: list[float] = []
    mine: list[float] = []
    for turn in range(TURNS):
        # In turns, so that neither always comes after the other's clean-up.
        for is_floor in (True, False) if turn % 2 else (False, True):
            await _batch(rig, floor if is_floor else mine, is_floor)
    ratio = p50(mine) / p50(floor)
    what = f"create to Running, {CLIENTS} clients"
    return at_least(what, f"{p50(mine):.1f}/s", f"engine {p50(floor):.1f}/s", ratio, 0.95)


async def _batch(rig: Rig, rates: list[float], is_floor: bool) -> None:
    clients = [Client(rig.base) for _ in range(CLIENTS)]
    began = time.perf_counter()
    made = await asyncio.gather(
        *[_some(rig.bare if is_floor else lambda client=client: rig.ours(client)) for client in clients]
    )
    rates.append(CLIENTS * EACH / (time.perf_counter() - began))
    ids = [one for some in made for one in some]
    await (rig.drop(ids) if is_floor else rig.clear(ids))
    for client in clients:
        await client.close()


async def _some(call: Callable[[], Awaitable[str]]) -> list[str]:
    return [await call() for _ in range(EACH)]


async def _forget(rig: Rig) -> None:
    """This installation ends with the case: its mark goes too."""
    sandbox = await rig.ours(client := Client(rig.base))
    filters = {"label": [f"sandledger.io/object={UUID(sandbox)}"]}
    (found,) = await rig.docker.containers.list(all=True, filters=json.dumps(filters))
    installation = (await found.show())["Config"]["Labels"][LABEL]
    await client.close()
    await rig.clear([sandbox])
    await remove_mark(rig.docker, UUID(installation))
