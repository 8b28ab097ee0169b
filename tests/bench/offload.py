"""Small requests through nginx that asks our server for each, beside an nginx that asks nobody.

Both make a new connection to the sandbox for each request. Only where the distribution's nginx can be had.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from app.cli.nginx import secret_here
from app.settings import load
from tests.bench.figures import CONSOLE, Figure, at_least
from tests.bench.http import p50, throughput
from tests.bench.proxied import COUNT, ROUNDS, asking, ways
from tests.bench.stage import Bench
from tests.support import nginx

PLAIN = """server {{
    listen {listen};
    access_log off;
    proxy_http_version 1.1;
    proxy_buffering off;
    proxy_request_buffering off;
    location / {{ proxy_pass http://{target}; }}
}}
"""


async def offload(bench: Bench) -> Sequence[Figure]:
    """The rate at 32 connections."""
    try:
        nginx.find()
    except nginx.NoNginx as error:
        CONSOLE.print(f"no nginx, so its row is left out: {error}")
        return []
    rates: dict[str, list[float]] = {"plain": [], "offload": []}
    async with ways(bench) as three:
        base, prefix = three.ways["direct"]
        secret = await secret_here(load(Path(three.config), os.environ).settings, print)
        server = urlsplit(three.server).port
        assert server is not None
        with nginx.listening() as (listener, listen), nginx.running(server, secret) as front:
            plain = PLAIN.format(listen=listen, target=urlsplit(base).netloc)
            with nginx.made(plain, secret, listener) as floor:
                floor.start()
                to = {"plain": (floor.port, prefix), "offload": (front.port, three.ways["ours"][1])}
                for _ in range(ROUNDS):
                    for name, (port, path) in to.items():
                        rate = await throughput(f"http://127.0.0.1:{port}", asking(path), COUNT // ROUNDS, 32)
                        rates[name].append(rate)
    mine, other = p50(rates["offload"]), p50(rates["plain"])
    what = "small requests through nginx that asks us, 32 connections"
    return [at_least(what, f"{mine:.0f}/s", f"plain nginx {other:.0f}/s", mine / other, 0.7)]
