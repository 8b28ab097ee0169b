"""The public command line as tests call it, and what of it is not run yet."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
from msgspec import Struct
from opensandbox_cli.main import cli

PROGRAM = Path(sys.executable).with_name("osb")
LATER = {
    "egress": "it needs the egress sidecar, which comes with network policies",
    "credential-vault": "it needs the egress sidecar, which comes with network policies",
    "template": "templates are 501 on a Docker runtime, on the public server too",
    "config": "it reads and writes the command line's own file and calls no server",
    "skills": "it writes files for coding agents and calls no server",
}
"""Groups of commands that no life runs, and why."""


class Done(Struct, frozen=True):
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Osb:
    """The command line with a home and a configuration of its own. Remembers which commands succeeded."""

    def __init__(self, home: Path, process: asyncio.subprocess.Process, environ: dict[str, str]) -> None:
        self.home, self.environ = home, environ
        self.ran: set[str] = set()
        self._process = process
        self._lock = asyncio.Lock()

    async def __call__(self, *words: str, given: str = "", code: int | None = 0) -> Done:
        """Run one to its end; the exit code must be the expected one. None = whichever."""
        files = [self.home / name for name in ("in", "out", "err")]
        async with self._lock:
            files[0].write_text(given)
            asked = {"words": ["--no-color", *words], "environ": self.environ, "files": [str(file) for file in files]}
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            ended = int(await self._process.stdout.readline())
            done = Done(ended, files[1].read_text(), files[2].read_text())
        assert code is None or done.code == code, f"osb {' '.join(words)}: {done}"
        self.ran |= {name for name in commands() if words[: len(name.split())] == tuple(name.split())}
        return done


@asynccontextmanager
async def command_line(home: Path, domain: str, key: str, *, proxied: bool) -> AsyncIterator[Osb]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OPEN_SANDBOX")}
    environ |= {"HOME": str(home), "OPEN_SANDBOX_DOMAIN": domain, "OPEN_SANDBOX_API_KEY": key}
    environ |= {"OPEN_SANDBOX_USE_SERVER_PROXY": "true" if proxied else "false"}
    zygote = Path(__file__).with_name("zygote.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(zygote), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Osb(home, process, environ)
    finally:
        process.kill()
        await process.wait()


def commands() -> list[str]:
    """All commands that there are, e.g. `file cat`."""
    return sorted(_names(cli, ""))


def _names(group: click.Command, above: str) -> list[str]:
    if not isinstance(group, click.Group):
        return [above]
    return [name for part, each in group.commands.items() for name in _names(each, f"{above} {part}".strip())]
