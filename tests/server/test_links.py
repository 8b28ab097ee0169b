"""Signed links in server processes, put together as `serve` does it: one makes them, the other takes them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from app.service.sandboxes import Service
from tests.chaos.harness import KEY, ServerProcess, write_config
from tests.proxy.rig import Rig, agent, request, say

NONE = "unix:///nonexistent/engine.sock"


async def test_a_link_of_one_server_holds_at_another_and_after_a_kill(dsn: str, service: Service) -> None:
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        more = '[proxy]\npublic_address = "https://edge.test/x"\n[log]\nlevel = "DEBUG"'
        configs = [write_config(home, dsn, NONE, name, more=more) for name in ("one", "two")]
        servers = [ServerProcess(config, role="api").start() for config in configs]
        try:
            one, two = servers
            async with agent() as theirs, one.client() as client:
                sandbox = await Rig(0, None, service).running(theirs)
                theirs.token = ""  # the key of this installation is the servers'
                path = f"/sandboxes/{sandbox}/endpoints/3000/links"
                made = await client.post(path, json={"expiresIn": 600})
                assert made.status_code == 201, made.text
                url, _, value = made.json()["url"].partition("?sandledger_link=")
                assert url == f"https://edge.test/x/sandboxes/{sandbox}/proxy/3000/"

                async def visit(server: ServerProcess) -> None:
                    port = urlsplit(server.base).port
                    assert port is not None
                    at = f"/sandboxes/{sandbox}/proxy/3000/a"
                    first = await say(port, request(f"{at}?sandledger_link={value}"))
                    assert (first.status, first.one("location")) == (303, f"/x{at}")
                    cookie = (first.one("set-cookie") or "").partition(";")[0]
                    assert "; Secure; " in (first.one("set-cookie") or "")
                    assert (await say(port, request(at, f"Cookie: {cookie}"))).status == 200
                    assert (await say(port, request(at))).code == "MISSING_API_KEY"

                await visit(one)
                await visit(two)
                one.kill()
                await visit(servers[0].start())
                assert len(theirs.requests) == 3
            logs = "".join(each.log.read_text() for each in servers)
            assert "/proxy/3000/a" in logs, "requests are logged"
            assert value.rpartition(".")[2] not in logs
            assert KEY not in logs
        finally:
            for each in servers:
                each.kill()
