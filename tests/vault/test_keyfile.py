"""The file of master keys: made once, read whole, changed without a gap, never lost."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest

from app.errors import SettingsError
from app.store.vault.keyfile import NoKeyFile, key_file, master_keys, prepend_new_key
from app.store.vault.seal import MasterKeys, Sealer, Secrets, decode_master_key, generate_master_key
from tests.conftest import ROOT

ONE = uuid4()


def lines(path: Path) -> list[str]:
    return path.read_text().split()


def test_it_is_made_once_and_for_its_owner_only(tmp_path: Path):
    state = tmp_path / "state"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: master_keys(None, None, None, state, make=True)[0].ids, range(8)))
    assert len(set(found)) == 1
    path = state / "master.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in state.iterdir()] == ["master.key"]


def test_a_new_key_comes_first_and_the_old_one_still_opens(tmp_path: Path):
    keys, where = master_keys(None, None, None, tmp_path, make=True)
    path = Path(where)
    sealed = Sealer(keys).seal(ONE, Secrets({"A": "b"}))
    assert prepend_new_key(path, before=keys.ids[0])
    after = master_keys(None, None, None, tmp_path)[0]
    assert len(lines(path)) == 2
    assert after.ids[1:] == keys.ids
    assert after.ids[0] not in keys.ids
    assert Sealer(after).unseal(ONE, sealed) == Secrets({"A": "b"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_only_the_start_of_a_server_makes_it(tmp_path: Path):
    state = tmp_path / "state"
    for configured in (None, tmp_path / "configured.key"):
        with pytest.raises(NoKeyFile) as caught:
            master_keys(None, None, configured, state)
        assert caught.value.path == key_file(configured, state)
    with pytest.raises(NoKeyFile):
        master_keys(None, None, tmp_path / "configured.key", state, make=True)
    assert list(tmp_path.iterdir()) == []


def test_of_many_who_put_a_new_key_before_the_same_one_one_does(tmp_path: Path):
    """No key is lost, since somebody may be sealing by it already; and none is made for a rotation that has one."""
    keys, where = master_keys(None, None, None, tmp_path, make=True)
    path, first = Path(where), keys.ids[0]
    for count in range(2, 6):
        with ThreadPoolExecutor(8) as pool:
            put = list(pool.map(lambda _, first=first: prepend_new_key(path, before=first), range(16)))
        assert put.count(True) == 1
        found = master_keys(None, None, None, tmp_path)[0].ids
        assert len(found) == count
        assert found[1] == first
        first = found[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["master.key"]


def test_the_file_keeps_its_owner_and_a_link_stays_a_link(tmp_path: Path):
    real, link = tmp_path / "real.key", tmp_path / "link.key"
    text = generate_master_key()
    real.write_text(f"{text}\n")
    link.symlink_to(real)
    if os.geteuid() == 0:
        os.chown(real, 12345, 12345)
    before = real.stat()
    assert prepend_new_key(link, before=MasterKeys(decode_master_key(text, "test")).ids[0])
    assert link.is_symlink()
    assert len(lines(real)) == 2
    assert (real.stat().st_uid, real.stat().st_gid) == (before.st_uid, before.st_gid)


def test_what_is_no_key_file_stays_as_it_is(tmp_path: Path):
    path = tmp_path / "master.key"
    for content in (b"", b"hunter2\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(SettingsError) as caught:
            prepend_new_key(path, before="any")
        assert "hunter2" not in str(caught.value)
        assert path.read_bytes() == content
    with pytest.raises(NoKeyFile):
        prepend_new_key(tmp_path / "absent.key", before="any")


def test_the_environment_wins_and_brings_its_previous_key(tmp_path: Path):
    new, old = os.urandom(32), os.urandom(32)
    keys, where = master_keys(new, old, None, tmp_path)
    assert where == "SANDLEDGER_MASTER_KEY"
    assert keys.ids == MasterKeys(new, old).ids
    assert list(tmp_path.iterdir()) == []


def test_the_previous_key_stands_after_those_of_the_file(tmp_path: Path):
    old = os.urandom(32)
    path = tmp_path / "keys"
    path.write_text(f"{generate_master_key()}\n{generate_master_key()}\n")
    keys, _ = master_keys(None, old, path, tmp_path / "unused")
    in_file = [decode_master_key(line, "file") for line in lines(path)]
    assert keys.ids == MasterKeys(*in_file, old).ids
    assert not (tmp_path / "unused").exists()


# An audit hook cannot be taken off again, so the look happens in a process of its own.
LOOK = """
import os, sys
from pathlib import Path
from app.store.vault.keyfile import master_keys
folder = sys.argv[1]
events = []
sys.addaudithook(lambda name, args: events.append((name, args)) if name in ("open", "os.link") else None)
keys, where = master_keys(None, None, None, Path(folder), make=True)
linked = [at for at, (name, _) in enumerate(events) if name == "os.link"]
synced = [
    at for at, (name, args) in enumerate(events)
    if name == "open" and str(args[0]) == folder and args[2] & os.O_DIRECTORY
]
print(len(keys.ids), bool(linked), bool(synced and (not linked or synced[-1] > linked[0])))
"""


def test_the_folder_is_synced_once_the_key_is_there_by_the_maker_and_by_whoever_finds_it(tmp_path: Path):
    said = [
        subprocess.run(
            [sys.executable, "-c", LOOK, str(tmp_path / "state")], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [["1", "True", "True"], ["1", "False", "True"]]
