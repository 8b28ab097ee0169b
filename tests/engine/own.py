"""A private engine of the test's own: our script, copied into a folder, run in a network namespace of its own.

In the folder, because the script keeps all its state beside itself. In a namespace, because a second dockerd of one
network rewrites the firewall rules of the first.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.needs import refuse_or_skip

SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


class OwnEngine:
    def __init__(self) -> None:
        if os.geteuid() != 0:
            refuse_or_skip("only root can start an engine")
        # With REQUIRE_ENGINE=1 this is no skip: the script installs what is missing, or the test fails.
        if os.environ.get("REQUIRE_ENGINE") != "1" and shutil.which("dockerd", path=SYSTEM_PATH) is None:
            pytest.skip("no dockerd here; run make engine")
        self.folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
        self.address = f"unix://{self.folder}/.state/engine/run/docker.sock"
        (self.folder / ".ci").mkdir()
        for name in ("engine", "apt"):
            shutil.copy(ROOT / ".ci" / name, self.folder / ".ci" / name)
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo up && exec sleep infinity"],
            stdout=subprocess.PIPE,
            env={"PATH": SYSTEM_PATH},
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"up\n":
            refuse_or_skip("no network namespace can be made here")

    @property
    def script(self) -> Path:
        return self.folder / ".ci" / "engine"

    def start(self) -> None:
        self.within(str(self.script), "start", "--private")

    def stop(self) -> None:
        self.within(str(self.script), "stop")

    def within(self, *command: str) -> str:
        """What the command prints that runs in the engine's network namespace."""
        environ = {name: value for name, value in os.environ.items() if name != "DOCKER_HOST"}
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", *command],
            capture_output=True,
            text=True,
            timeout=240,
            env=environ | {"PATH": SYSTEM_PATH},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill_dockerd(self) -> None:
        pid = int((self.folder / ".state/engine/run/dockerd.pid").read_text())
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            # The descriptor of a process can be read once the process has ended.
            waiter = select.poll()
            waiter.register(descriptor)
            assert waiter.poll(30_000), "dockerd outlived SIGKILL"
        finally:
            os.close(descriptor)

    def close(self) -> None:
        try:
            self.stop()
        finally:
            self._holder.kill()
            self._holder.wait()
            assert self._holder.stdout is not None
            self._holder.stdout.close()
        shutil.rmtree(self.folder)

    def links(self) -> set[str]:
        return {line.split()[0] for line in self.within("ip", "-brief", "link").splitlines()}

    def mounts(self) -> list[str]:
        return [row for row in Path("/proc/self/mounts").read_text().splitlines() if f" {self.folder}/" in row]

    def processes(self, *containers: str) -> list[str]:
        """All that names our folder, and all in the cgroups of these containers."""
        found: list[str] = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                groups = (process / "cgroup").read_text()
            except OSError:  # it has ended
                continue
            if f"{self.folder}/" in command or any(each in groups for each in containers):
                found.append(f"{process.name} {command}")
        return found

    def cgroups(self, *containers: str) -> list[Path]:
        return [place for each in containers for place in Path("/sys/fs/cgroup").rglob(f"*{each}*") if place.is_dir()]
