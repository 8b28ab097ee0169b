"""Python processes that start warm.

To import the product takes more than a second of a core, and the suite starts some hundreds of servers and commands. Each
process here is forked by multiprocessing's fork server, one for each process of the suite, which has imported the product
and runs nothing of it. What follows the imports is what `python -m` does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["app.cli.commands", "app.runtime.docker"])


class WarmProcess:
    """`python -m module arguments`, with standard input empty and the outputs appended to files."""

    def __init__(
        self, module: str, arguments: tuple[str, ...], environ: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        """Starts it."""
        files = str(stdout), str(stderr)
        # A daemon: what a test leaves behind ends with the suite.
        self._process = _CONTEXT.Process(target=_run, args=(module, arguments, dict(environ), files), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        """Of a process that has started."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Exit code; negative = the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """As `poll`, once it has ended. Raises TimeoutExpired after so many seconds."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """To this process only."""
        if self.poll() is None:
            os.kill(self.pid, number)


def run(module: str, *arguments: str, environ: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """To its end, with what it printed."""
    with tempfile.TemporaryDirectory(prefix="sandledger-warm-") as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = WarmProcess(module, arguments, environ, stdout, stderr)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


def _run(module: str, arguments: tuple[str, ...], environ: dict[str, str], files: tuple[str, str]) -> None:
    """In the new process. Its end is an ordinary one: `sys.exit` and a raised error give their exit codes."""
    for number, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
