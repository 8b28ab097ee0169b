"""The master key is on disk, under its name, before anything is sealed with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

# An audit hook cannot be taken off again, so the look happens in a process of its own.
LOOK = """
import os, sys
from pathlib import Path
from app.store.vault.keyfile import master_key
folder = sys.argv[1]
events = []
sys.addaudithook(lambda name, args: events.append((name, args)) if name in ("open", "os.link") else None)
key, where = master_key(None, None, Path(folder))
linked = [at for at, (name, _) in enumerate(events) if name == "os.link"]
synced = [
    at for at, (name, args) in enumerate(events)
    if name == "open" and str(args[0]) == folder and args[2] & os.O_DIRECTORY
]
print(len(key), bool(linked), bool(synced and (not linked or synced[-1] > linked[0])))
"""


def test_the_folder_is_synced_once_the_key_is_there_by_the_maker_and_by_whoever_finds_it(tmp_path: Path):
    said = [
        subprocess.run(
            [sys.executable, "-c", LOOK, str(tmp_path / "state")], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [["32", "True", "True"], ["32", "False", "True"]]
