"""The life of a deep agent's sandbox, run by the Python that has `langchain-opensandbox`. Its own process.

Arguments: JSON: domain, api_key, use_server_proxy, image. Says "act" after the first act and waits for a line.
"""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import timedelta

from langchain_opensandbox import (  # pyright: ignore[reportMissingImports] - of another environment
    LazyOpenSandboxSandbox,
    OpenSandboxSandbox,
)
from opensandbox import Sandbox, SandboxSync
from opensandbox.config import ConnectionConfig
from opensandbox.config.connection_sync import ConnectionConfigSync

given = json.loads(sys.argv[1])
image = given.pop("image")
sandbox = SandboxSync.create(
    image,
    timeout=timedelta(minutes=10),
    entrypoint=["sleep", "3600"],
    resource={"cpu": "250m", "memory": "128Mi"},
    connection_config=ConnectionConfigSync(**given),
)
backend = OpenSandboxSandbox(sandbox=sandbox)
ran = backend.execute("printf 'a\\nb\\nc\\n'; echo d >&2; exit 3")
assert (ran.output, ran.exit_code) == ("a\nb\nc\nd", 3), ran
content = bytes(range(256)) * 10
(uploaded,) = backend.upload_files([("/work/x", content)])
assert uploaded.error is None, uploaded
print("act", flush=True)
sys.stdin.readline()

present, missing = backend.download_files(["/work/x", "/work/absent"])
assert present.content == content, present
assert missing.error == "file_not_found", missing
backend.upload_files([("/work/words", b"one\ntwo needles\n")])
# The tools that a deep agent has beside these are commands too, of GNU grep and Python, which a tiny image lacks.
assert backend.execute("grep -rn needle /work").output == "/work/words:2:two needles"


async def lazily() -> None:
    async def connect() -> Sandbox:
        return await Sandbox.connect(backend.id, connection_config=ConnectionConfig(**given))

    lazy = LazyOpenSandboxSandbox(connect=lambda: sandbox, aconnect=connect)
    assert (await lazy.aexecute("echo lazy")).output == "lazy"
    (back,) = await lazy.adownload_files(["/work/x"])
    assert back.content == content


asyncio.run(lazily())
sandbox.kill()
backend.close()
print("end", flush=True)
