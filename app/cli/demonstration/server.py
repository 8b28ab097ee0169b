"""One `sandledger serve` after another on the same state folder, as processes of their own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

from app.errors import SandledgerError

PATIENCE_SECONDS = 30.0
_API_LINE = re.compile(r"API\s+(http://\S+)/v1")


class DemoFailed(SandledgerError):
    """A step was not seen."""


def environment() -> dict[str, str]:
    """This process's, without what would lead to another database or ask for a key."""
    kept = {key: value for key, value in os.environ.items() if not key.endswith(("_DSN", "DATABASE_URL"))}
    for name in ("OPENSANDBOX_SERVER_API_KEY", "DOCKER_HOST"):
        kept.pop(name, None)
    return kept


class Server:
    """One `sandledger serve` after another on the same state folder."""

    def __init__(self, config: Path, log: Path) -> None:
        self._config = config
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._drain: asyncio.Task[None] | None = None
        self.base = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app", "serve", "--config", str(self._config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment(),
        )
        self._process = process
        assert process.stdout is not None
        seen: list[str] = []
        try:
            async with asyncio.timeout(PATIENCE_SECONDS * 2):
                while line := (await process.stdout.readline()).decode(errors="replace"):
                    seen.append(line)
                    if found := _API_LINE.search(line):
                        self.base = found[1]
                        self._drain = asyncio.create_task(self._keep_log(process.stdout, seen))
                        return
        except TimeoutError:
            pass
        raise DemoFailed("the server did not start:\n" + "".join(seen[-20:]))

    async def _keep_log(self, stream: asyncio.StreamReader, seen: list[str]) -> None:
        with self._log.open("a") as file:
            file.writelines(seen)
            while line := (await stream.readline()).decode(errors="replace"):
                file.write(line)
                file.flush()

    async def end(self, number: signal.Signals) -> int:
        process = self._process
        if process is None or process.returncode is not None:
            return 0
        process.send_signal(number)
        code = await process.wait()
        if self._drain is not None:
            await self._drain
        return code
