"""An API process needs no engine: it starts without one, is ready, accepts what a worker will do later, and carries
requests to sandboxes.
"""

from __future__ import annotations

import re
import signal
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from app.service.sandboxes import Service
from tests.chaos.harness import KEY, ServerProcess, body, write_config
from tests.proxy.rig import Holding, Rig, agent, calling, request, say

NONE = "unix:///nonexistent/engine.sock"


async def test_it_serves_where_there_is_no_engine(dsn: str) -> None:
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        server = ServerProcess(write_config(home, dsn, NONE), role="api").start()
        try:
            said = server.log.read_text()
            assert "engine    none needed here" in said
            assert "NOT REACHABLE" not in said
            async with httpx.AsyncClient(base_url=server.base, timeout=30) as anonymous:
                assert (await anonymous.get("/ready")).json()["status"] == "ready"
            async with server.client() as client:
                created = await client.post("/sandboxes", json=body("image:1"))
            assert created.status_code == 202
        finally:
            server.kill()


async def test_it_carries_requests_to_sandboxes(dsn: str, service: Service) -> None:
    """Put together as `serve` does it. A stop cuts what is open, within the time for it, and reports no fault."""
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        config = write_config(home, dsn, NONE, more="[proxy]\ndrain_seconds = 1")
        server = ServerProcess(config, role="api").start()
        try:
            port = urlsplit(server.base).port
            assert port is not None
            async with agent() as theirs:
                rig = Rig(port, None, service)
                sandbox, other = await rig.running(theirs), await rig.running(theirs)
                theirs.token = ""  # the key of this installation is the server's; here the tokens are only looked at
                for each in (sandbox, other):
                    path = f"/v1/sandboxes/{each}/proxy/3000/a%2Fb"
                    assert (await say(port, request(path, key=KEY))).status == 200
                    assert (await say(port, request(path))).code == "MISSING_API_KEY"
                assert [each.target for each in theirs.requests] == ["/proxy/3000/a%2Fb"] * 2
                tokens = {each.one("x-execd-access-token") or "" for each in theirs.requests}
                assert len(tokens) == 2
                assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)
                via = theirs.requests[0].one("via")
                assert via == f"1.1 sandledger-{str(server.installation)[:8]}"
                theirs.handlers["/proxy/3000/open"] = Holding(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                async with calling(port) as caller:
                    caller.writer.write(request(f"/v1/sandboxes/{sandbox}/proxy/3000/open", key=KEY))
                    await caller.head()
                    server.send(signal.SIGTERM)
                    assert await caller.reader.read() == b"", "no last chunk: what was sent was not all"
                await theirs.until(lambda: not theirs.open)
        finally:
            server.kill()
        assert "Traceback" not in server.log.read_text()
