"""Commands and shell sessions of the stand-in agent."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress

for _name in ("PYTHONHOME", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(_name, None)  # they are about this interpreter, not about the user's

ENV = dict(os.environ)
SESSION = """
trap 'code=$?; export -p > "$0"; printf "cd %s\\n" "\\"$(pwd)\\"" >> "$0"; exit $code' EXIT
[ ! -f "$0" ] || . "$0"
[ -z "$2" ] || cd "$2"
eval "$1"
"""
"""Runs $1 with the variables and in the folder that the run before it left in the file $0."""
LOOK_SECONDS, QUIET_LOOKS, MOST_LOOKS = 0.1, 5, 600
"""The output of a command that has ended is read on until so many looks found nothing new, and for so many at most. Looks
are counted and not seconds: a container that is frozen or short of CPU reads nothing in the meantime."""
COMMANDS: dict[str, Command] = {}
SESSIONS: dict[str, Session] = {}
Say = Callable[..., None]
"""Sends one event to the client."""


class Command:
    """One command, its output and its end. Raises OSError when it cannot be started."""

    def __init__(self, words: list[str], request: dict) -> None:
        self.id = os.urandom(16).hex()
        self.started = time.time()
        self.finished: float | None = None
        self.output: list[str] = []
        self.error = ""
        ids = {name: request[key] for name, key in (("user", "uid"), ("group", "gid")) if key in request}
        env = ENV | env_file() | request.get("envs", {})
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            words, cwd=request.get("cwd") or None, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe,
            start_new_session=True, **ids,
        )  # fmt: skip
        COMMANDS[self.id] = self
        if request.get("timeout"):
            timer = threading.Timer(request["timeout"] / 1000, self.kill)
            timer.daemon = True
            timer.start()

    @classmethod
    def of(cls, request: dict) -> Command:
        """The one that a request describes."""
        return cls(request.get("argv") or ["/bin/sh", "-c", request["command"]], request)

    @property
    def code(self) -> int | None:
        """As a shell counts it: 128 and the signal's number for a command that a signal ended."""
        code = self.process.returncode
        return 128 - code if code is not None and code < 0 else code

    def kill(self) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def read(self, name: str, say: Say) -> None:
        try:
            for line in getattr(self.process, name):
                self.output.append(line.decode(errors="replace"))
                say(type=name, text=self.output[-1].removesuffix("\n") or "\n")
        except OSError:
            self.kill()  # nobody reads any more

    def run(self, say: Say) -> None:
        """Both streams by lines, then the end. A quiet child that outlives the command does not hold it up."""
        readers = [threading.Thread(target=self.read, args=(name, say), daemon=True) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        self.process.wait()
        self.read_on(readers)
        self.finished = time.time()
        if self.code:
            self.error = f"exit status {self.code}"
            say(type="error", error={"ename": "CommandExecError", "evalue": str(self.code), "traceback": [self.error]})
        else:
            say(type="execution_complete", execution_time=int((self.finished - self.started) * 1000))

    def read_on(self, readers: list[threading.Thread]) -> None:
        """What is in the pipes still. A client that reads slowly gets it all."""
        known, quiet = -1, 0
        for _ in range(MOST_LOOKS):
            alive = [reader for reader in readers if reader.is_alive()]
            quiet = quiet + 1 if known == len(self.output) else 0
            known = len(self.output)
            if not alive or quiet > QUIET_LOOKS:
                return
            alive[0].join(LOOK_SECONDS)

    def status(self) -> dict:
        shown = {"id": self.id, "running": self.finished is None, "started_at": instant(self.started)}
        if self.finished is not None:
            shown |= {"exit_code": self.code, "error": self.error, "finished_at": instant(self.finished)}
        return shown


class Session:
    """Runs that keep variables and folder from one to the next."""

    def __init__(self, cwd: str | None) -> None:
        self.id = os.urandom(16).hex()
        self.cwd = cwd
        self.file = f"/tmp/.session-{self.id}"
        SESSIONS[self.id] = self

    def command(self, request: dict) -> Command:
        words = ["/bin/sh", "-c", SESSION, self.file, request["command"], request.get("cwd") or ""]
        return Command(words, {"cwd": self.cwd, "timeout": request.get("timeout")})

    def end(self) -> None:
        del SESSIONS[self.id]
        with suppress(FileNotFoundError):
            os.unlink(self.file)


def env_file() -> dict[str, str]:
    """The variables that clients left for all commands."""
    path = ENV.get("EXECD_ENVS", "/opt/opensandbox/.env")
    rows = (line.removeprefix("export ").partition("=") for line in lines_of(path))
    return {name: "".join(shlex.split(value)) for name, is_row, value in rows if is_row}


def lines_of(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def instant(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
