"""The public server beside ours, in one run: one sandbox by id.

The public server is installed from the lock file into an environment of its own, because its dependencies are not ours.
It keeps no row of a sandbox: its truth is the container. So it is given one that bears its labels.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import aiodocker

from app.cli.local_image import ensure_busybox_image
from tests.bench.figures import Figure, at_least
from tests.bench.http import Client, p50, throughput
from tests.bench.on_engine import IMAGE
from tests.bench.over_http import seeded
from tests.bench.servers import running
from tests.bench.stage import Bench
from tests.support.public import public_server

REQUESTS = 400


@asynccontextmanager
async def container(docker_host: str | None) -> AsyncGenerator[str]:
    """The id of a sandbox of the public server: a running container with its labels and its name."""
    sandbox = str(uuid4())
    async with aiodocker.Docker(url=docker_host) as docker:
        await ensure_busybox_image(docker, IMAGE)
        labels = {"opensandbox.io/id": sandbox, "opensandbox.io/manual-cleanup": "true", "bench": "yes"}
        config = {"Image": IMAGE, "Entrypoint": ["sleep", "3600"], "Labels": labels}
        made = await docker.containers.create(config, name=f"sandbox-{sandbox}")
        try:
            await made.start()
            yield sandbox
        finally:
            await made.delete(force=True)


async def reads(bench: Bench) -> Sequence[Figure]:
    """GET by id, 8 clients, in turns."""
    assert bench.docker_host is not None, "this case is skipped without an engine"
    dsn, some = await seeded(bench, 10_000, 10_000)

    def read(sandbox: object):
        async def one(client: Client) -> None:
            status, data = await client.request("GET", f"/v1/sandboxes/{sandbox}")
            assert status == 200 and json.loads(data)["id"] == str(sandbox), data

        return one

    async with container(bench.docker_host) as sandbox:
        with (
            public_server(bench.home, bench.docker_host) as public,
            running([bench.config(dsn), "api", "fake"]) as (base, _),
        ):
            mine: list[float] = []
            theirs: list[float] = []
            for _ in range(3):
                theirs.append(await throughput(public, read(sandbox), REQUESTS, 8))
                mine.append(await throughput(base, read(some), 5 * REQUESTS, 8))
    value, beside = f"{p50(mine):.0f}/s", f"public server {p50(theirs):.0f}/s"
    return [at_least("GET by id, 8 clients", value, beside, p50(mine) / p50(theirs), 8)]
