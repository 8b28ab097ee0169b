"""compose.yaml under a project name of its own, as a person runs it: by the command, through its ports."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from app.runtime.docker import names
from tests.compose import images
from tests.conftest import ROOT
from tests.support.needs import refuse_or_skip

KEY = "compose-test-key-0123456789"
SANDBOX_IMAGE = "sandledger-test:1"
DEADLINE_S = 90.0
PAGE = "a-page-in-a-sandbox"
PROJECT_LABEL = "com.docker.compose.project"


def compose_command() -> list[str]:
    """SANDLEDGER_TEST_COMPOSE, the old command of its own, or the new one of the Docker client."""
    if named := os.environ.get("SANDLEDGER_TEST_COMPOSE"):
        return named.split()
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if (
        shutil.which("docker")
        and subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    ):
        return ["docker", "compose"]
    refuse_or_skip("there is no Compose here: as root run .ci/apt docker-compose, or install Docker Compose v2")
    raise AssertionError


class Stack:
    def __init__(self, docker_host: str, config: Path) -> None:
        """`config` is the servers' settings file."""
        if not docker_host.startswith("unix://"):
            refuse_or_skip("the workers mount the engine's socket, and this engine is not reached through one")
        self._command = compose_command()
        self.project = f"sandledger-test-{uuid4().hex[:12]}"
        socket = docker_host.removeprefix("unix://")
        self.engine = httpx.Client(
            transport=httpx.HTTPTransport(uds=socket), base_url="http://engine", timeout=httpx.Timeout(120)
        )
        self.tags = {name: f"{self.project}-{name}:1" for name in ("python", "postgres", "server")}
        self.made: list[str] = []
        """Ids of the sandboxes that were created."""
        self._installations: set[str] = set()
        """Whose containers they got: one, unless the database was made anew."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("COMPOSE_", "SANDLEDGER_"))}
        self._environ = clean | {
            "DOCKER_HOST": docker_host,
            "POSTGRES_PASSWORD": uuid4().hex,
            "SERVER_PASSWORD": uuid4().hex,
            "OPENSANDBOX_SERVER_API_KEY": KEY,
            "SANDLEDGER_MASTER_KEY": base64.b64encode(os.urandom(32)).decode(),
            "SANDLEDGER_ENGINE_SOCKET": socket,
            "SANDLEDGER_PYTHON_IMAGE": self.tags["python"],
            "SANDLEDGER_POSTGRES_IMAGE": self.tags["postgres"],
            "SANDLEDGER_IMAGE": self.tags["server"],
            "SANDLEDGER_CONFIG": str(config),
            # The engine takes free ones.
            "SANDLEDGER_API1_PORT": "0",
            "SANDLEDGER_API2_PORT": "0",
        }

    def make_base_images(self) -> None:
        images.postgres_image(self.engine, self.tags["postgres"])
        images.python_image(self.engine, self.tags["python"])

    def compose(self, *arguments: str, **environ: str) -> str:
        done = subprocess.run(
            [*self._command, "--project-name", self.project, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=self._environ | environ,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def container(self, service: str) -> dict[str, Any]:
        found = [
            each
            for each in self.listed("containers/json", all="1")
            if each["Labels"]["com.docker.compose.service"] == service
        ]
        assert len(found) == 1, found
        return self.engine.get(f"/containers/{found[0]['Id']}/json").raise_for_status().json()

    def listed(self, path: str, **params: str) -> list[dict[str, Any]]:
        """What the engine has of this project."""
        labels = json.dumps({"label": [f"{PROJECT_LABEL}={self.project}"]})
        answer = self.engine.get(f"/{path}", params={"filters": labels, **params}).raise_for_status().json()
        return (answer.get("Volumes") or []) if isinstance(answer, dict) else answer

    def sandbox_containers(self) -> list[str]:
        rows = self.engine.get("/containers/json", params={"all": "1"}).raise_for_status().json()
        ours = [row for row in rows if set(row["Labels"].values()) & set(self.made)]
        self._installations |= {row["Labels"][names.INSTALLATION] for row in ours}
        return [row["Id"] for row in ours]

    def api(self, service: str) -> httpx.Client:
        """A client of this service's own port. The port may change when the container starts again."""
        bound = self.container(service)["NetworkSettings"]["Ports"].get("8080/tcp") or [{"HostPort": "1"}]
        assert all(each.get("HostIp", "127.0.0.1") == "127.0.0.1" for each in bound)
        base = f"http://127.0.0.1:{bound[0]['HostPort']}"
        return httpx.Client(base_url=base, headers={"OPEN-SANDBOX-API-KEY": KEY}, timeout=30)

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except httpx.HTTPError:  # a server that starts again
                pass
            time.sleep(0.1)
        raise AssertionError(f"waited in vain: {what}\n{self.compose('logs', '--no-color', '--tail=40')}")

    def ready(self, service: str) -> bool:
        with self.api(service) as api:
            return api.get("/ready").status_code == 200

    def create(self, service: str) -> str:
        """It serves a page on port 8080."""
        serving = ["sh", "-c", f"mkdir -p /srv; echo {PAGE} > /srv/page; exec httpd -f -p 8080 -h /srv"]
        body = {"image": {"uri": SANDBOX_IMAGE}, "entrypoint": serving, "timeout": 600}
        with self.api(service) as api:
            answer = api.post("/v1/sandboxes", json=body | {"resourceLimits": {"cpu": "100m", "memory": "32Mi"}})
        assert answer.status_code == 202, answer.text
        self.made.append(answer.json()["id"])
        return self.made[-1]

    def runs(self, service: str, sandbox: str) -> bool:
        with self.api(service) as api:
            answer = api.get(f"/v1/sandboxes/{sandbox}")
        return answer.status_code == 200 and answer.json()["status"]["state"] == "Running"

    def page(self, service: str, sandbox: str, *, through_server: bool) -> str:
        """What the program in a sandbox serves, where this service says that it is reached; from this machine."""
        with self.api(service) as api:
            asked = {"use_server_proxy": str(through_server).lower()}
            answer = api.get(f"/v1/sandboxes/{sandbox}/endpoints/8080", params=asked)
            assert answer.status_code == 200, answer.text
            endpoint = answer.json()
            key = api.headers if through_server else {}
        read = httpx.get(f"http://{endpoint['endpoint']}/page", headers={**endpoint["headers"], **key}, timeout=30)
        return read.text.strip()

    def kill(self, *services: str) -> None:
        """SIGKILL to the first process, from outside. A kill by the engine would be a stop, which restarts nothing."""
        pids = [str(self.container(each)["State"]["Pid"]) for each in services]
        config = {"Image": SANDBOX_IMAGE, "Cmd": ["kill", "-9", *pids], "HostConfig": {"PidMode": "host"}}
        made = self.engine.post("/containers/create", json=config).raise_for_status().json()["Id"]
        try:
            self.engine.post(f"/containers/{made}/start").raise_for_status()
            assert self.engine.post(f"/containers/{made}/wait").raise_for_status().json()["StatusCode"] == 0
        finally:
            self.engine.delete(f"/containers/{made}", params={"force": "1"})

    def close(self) -> None:
        try:
            self.sandbox_containers()
            self.compose("down", "--volumes", "--remove-orphans")
            for each in self.sandbox_containers():
                self.engine.delete(f"/containers/{each}", params={"force": "1"})
            self._remove_marks()
            for tag in self.tags.values():
                self.engine.delete(f"/images/{tag}", params={"force": "1"})
        finally:
            self.engine.close()

    def _remove_marks(self) -> None:
        """The workers' marks and the agent's files are no volumes of the project, so `down` leaves them."""
        for installation in self._installations:
            filters = json.dumps({"label": [f"{names.INSTALLATION}={installation}"]})
            left = (
                self.engine.get("/containers/json", params={"filters": filters, "all": "1"}).raise_for_status().json()
            )
            for container in left:
                self.engine.delete(f"/containers/{container['Id']}", params={"force": "1"})
            found = self.engine.get("/volumes", params={"filters": filters}).raise_for_status().json()["Volumes"] or []
            for volume in found:
                self.engine.delete(f"/volumes/{volume['Name']}").raise_for_status()
            for network in self.engine.get("/networks", params={"filters": filters}).raise_for_status().json():
                self.engine.delete(f"/networks/{network['Id']}").raise_for_status()
