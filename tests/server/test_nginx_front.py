"""`sandledger nginx`, as an operator uses it: the printed configuration, the file of the secret, and a server that dies."""

from __future__ import annotations

import asyncio
import re
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from app.service.sandboxes import Service
from tests.chaos.harness import KEY, ServerProcess, write_config
from tests.conftest import ROOT
from tests.proxy.rig import Holding, Rig, agent, calling, request, say
from tests.support import nginx

NONE = "unix:///nonexistent/engine.sock"
EVENTS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n"


def printed(config: Path, listen: str, secret: Path) -> str:
    """What the command prints. It writes the file."""
    words = ["nginx", "--config", str(config), "--listen", listen, "--secret-file", str(secret)]
    done = subprocess.run([sys.executable, "-m", "app", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    value = re.findall("[0-9a-f]{64}", secret.read_text())
    assert len(value) == 1
    assert value[0] not in done.stdout + done.stderr
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    return done.stdout.replace(str(secret), "@folder@/secret.conf")


async def test_a_server_is_killed_behind_nginx_and_comes_back(dsn: str, service: Service) -> None:
    """What nginx carries goes on, the rest is told the truth, and all is well again when the server is back."""
    with tempfile.TemporaryDirectory(prefix="sandledger-server-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        config, secret = write_config(home, dsn, NONE), home / "secret.conf"
        server = ServerProcess(config, role="proxy").start()
        try:
            config.write_text(config.read_text().replace("port = 0", f"port = {urlsplit(server.base).port}", 1))
            with nginx.listening() as (listener, address):
                made = await asyncio.to_thread(printed, config, address, secret)
                with nginx.made(made, secret.read_text(), listener) as front:
                    front.start()
                    async with agent() as theirs, calling(front.port) as open_:
                        sandbox = await Rig(0, None, service).running(theirs)
                        theirs.token = ""  # the key of this installation is the server's
                        events = theirs.handlers["/proxy/3000/events"] = Holding(EVENTS)
                        get = request(f"/v1/sandboxes/{sandbox}/proxy/3000/a", key=KEY)
                        assert (await say(front.port, get)).status == 200
                        token = theirs.requests[-1].one("x-execd-access-token")
                        open_.writer.write(request(f"/v1/sandboxes/{sandbox}/proxy/3000/events", key=KEY))
                        await open_.head()
                        server.kill()
                        for sent in (get, request("/v1/sandboxes", key=KEY), request("/health")):
                            reply = await say(front.port, sent)
                            assert (reply.status, reply.code) == (502, "PROXY::SERVER_AWAY")
                            assert (reply.one("retry-after"), reply.one("content-type")) == ("1", "application/json")
                        events.rest = b"1\r\n!\r\n0\r\n\r\n"
                        events.go.set()
                        assert [await open_.chunk() for _ in range(3)] == [b".", b"!", b""]
                        server.start()
                        assert (await say(front.port, get)).status == 200
                        reply = await say(front.port, request("/v1/sandboxes", key=KEY))
                        assert (reply.status, b"role proxy" in reply.body) == (404, True)
                    said = front.log + server.log.read_text()
            assert token is not None
            assert not [each for each in (token, *re.findall("[0-9a-f]{64}", secret.read_text())) if each in said]
        finally:
            server.kill()
