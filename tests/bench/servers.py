"""Server processes for the benchmark: ours on the fake or the real driver, and the minimal handler that is the floor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from app.cli import logs
from app.runtime.driver import Driver
from app.runtime.fake import FakeDriver, FakeEngine
from app.server.assembly import docker_driver
from app.server.process import Role, run
from app.settings import Settings, load

_READY = "API "


def fake_driver(_settings: Settings, installation: UUID) -> Driver:
    return FakeDriver(FakeEngine(), installation)


def serve() -> None:
    """`python -m tests.bench.servers CONFIG ROLE fake|docker`."""
    config, role, driver = sys.argv[1:4]
    settings = load(Path(config), os.environ).settings
    logs.configure(settings.log)
    import uvloop

    make = fake_driver if driver == "fake" else docker_driver
    uvloop.run(run(settings, Role(role), lambda line: print(line, flush=True), make))


def floor() -> None:
    """`python -m tests.bench.servers --floor DSN PORT`: one row by primary key, Litestar and asyncpg, nothing else."""
    import asyncpg
    import uvicorn
    import uvloop
    from litestar import Litestar, get
    from litestar.datastructures import State

    dsn, port = sys.argv[2], int(sys.argv[3])

    async def connect(app: Litestar) -> None:
        app.state.pool = await asyncpg.create_pool(dsn, min_size=1, max_size=10)

    @get("/sandboxes/{sandbox_id:uuid}")
    async def read(sandbox_id: UUID, state: State) -> dict[str, object]:
        row = await state.pool.fetchrow(
            "SELECT id, phase, spec, metadata, created_at, expires_at FROM sandboxes WHERE id = $1", sandbox_id
        )
        return {
            "id": str(row["id"]),
            "status": {"state": row["phase"]},
            "metadata": json.loads(row["metadata"]),
            "entrypoint": json.loads(row["spec"])["entrypoint"],
            "createdAt": row["created_at"].isoformat(),
            "expiresAt": row["expires_at"] and row["expires_at"].isoformat(),
        }

    app = Litestar([read], on_startup=[connect], openapi_config=None)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", http="httptools"))
    print(f"  API       http://127.0.0.1:{port}/v1", flush=True)
    uvloop.run(server.serve())


@contextmanager
def running(arguments: list[str], module: str = "tests.bench.servers") -> Iterator[tuple[str, int]]:
    """(base URL, pid) of a server process, ended at the end."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if _READY in line:
                base = line.split()[-1].removesuffix("/v1")
                break
        else:
            raise SystemExit(f"{arguments} did not start")
        yield base, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    """Proportional set size of a process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


def idle_cpu(pid: int, seconds: float) -> float:
    """Share of one core while nothing is asked."""
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return (cpu_seconds(pid) - before) / seconds


if __name__ == "__main__":
    floor() if sys.argv[1] == "--floor" else serve()
