"""Runs the unmodified command line of the public SDK, each command in a process of its own that is forked from this one.

To import the SDK takes two seconds, and a life has forty commands. A request is a line of JSON on standard input
(`words`, `environ`, `files`: what standard input, output and error are); the answer is a line with the exit code.
"""

from __future__ import annotations

import json
import os
import sys

from opensandbox_cli.main import cli


def run(words: list[str], environ: dict[str, str], files: list[str]) -> None:
    """In the child: never comes back."""
    modes = (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, (file, mode) in enumerate(zip(files, modes, strict=True)):
        opened = os.open(file, mode, 0o600)
        os.dup2(opened, number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["osb", *words]
    code: object = 1
    try:
        cli(prog_name="osb")
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        run(asked["words"], asked["environ"], asked["files"])
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
