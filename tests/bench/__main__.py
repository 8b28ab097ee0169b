"""Run every case, print a table, write bench.json. Exit 1 when a figure misses its target in two runs out of three.

`SIZE=large` measures at full size. Words after the command name the cases to run; none = all.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias

import msgspec

from app.store.embedded.server import EmbeddedPostgres
from tests.bench import inside, offload, on_engine, over_http, proxied, public
from tests.bench.figures import CONSOLE, Figure, Result, measure, show
from tests.bench.stage import LARGE, Bench

BenchCase: TypeAlias = Callable[[Bench], Awaitable[Sequence[Figure]]]
CASES: Mapping[str, BenchCase] = {
    "accepted": over_http.accepted,
    "reads": over_http.reads,
    "endpoints": over_http.endpoints,
    "lists": over_http.lists,
    "renewals": over_http.renewals,
    "lives": over_http.lives,
    "claims": inside.claims,
    "fairness": inside.fairness,
    "outage": inside.outage,
    "log": inside.log,
    "idle": over_http.idle,
    "proxied": proxied.small,
    "bulk": proxied.bulk,
    "streams": proxied.streams,
    "websockets": proxied.websockets,
    "offload": offload.offload,
    "engine": on_engine.creates,
    "public": public.reads,
}
ON_ENGINE = ("engine", "public")


def engine_address() -> str | None:
    """Where the engine is: the environment, else what `make engine` wrote down."""
    noted = Path(".state/engine.env")
    if host := os.environ.get("DOCKER_HOST"):
        return host
    if noted.exists():
        return noted.read_text().split("DOCKER_HOST=", 1)[1].split("\n", 1)[0].strip("'\"")
    return None


def load() -> str:
    """The load average, which says how quiet the machine was."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


@contextmanager
def standing() -> Iterator[Bench]:
    """What the cases stand on, with a PostgreSQL of its own until the block ends."""
    home = Path(tempfile.mkdtemp(prefix="sandledger-bench-"))
    home.chmod(0o711)  # PostgreSQL runs as an account of its own and must be able to pass through
    server = EmbeddedPostgres.start(home)
    try:
        yield Bench(home, server, engine_address())
    finally:
        server.stop()
        shutil.rmtree(home, ignore_errors=True)


async def run(names: Sequence[str], cases: Mapping[str, BenchCase], bench: Bench) -> list[Result]:
    """Every named case."""
    results: list[Result] = []
    CONSOLE.print(f"measuring at {'full' if LARGE else 'small'} size, load average {load()} ...")
    for name in names:
        if name in ON_ENGINE and bench.docker_host is None:
            CONSOLE.print(f"no engine: run make engine for the case {name}")
            continue
        results += await measure(partial(cases[name], bench))
    return results


def main(
    words: Sequence[str], cases: Mapping[str, BenchCase], stage: AbstractContextManager[Bench], report: Path
) -> int:
    """The exit code: 0 = every target is met, 1 = one is missed, 2 = there is no such case."""
    names = words or list(cases)
    if unknown := [name for name in names if name not in cases]:
        CONSOLE.print(f"no such case: {', '.join(unknown)}; there are {', '.join(cases)}")
        return 2
    with stage as bench:
        results = asyncio.run(run(names, cases, bench))
    show(results)
    CONSOLE.print(f"load average {load()}")
    report.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    missed = [result.shown.what for result in results if result.met is False]
    if missed:
        CONSOLE.print(f"[red]missed in two runs:[/red] {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], CASES, standing(), Path("bench.json")))
