"""`sandledger keys rotate-master`, on a real database and a real key file."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from app.cli.keys import rotate_master
from app.domain.operations import REGISTRY, MasterKeyRotated
from app.domain.stream import PLATFORM_TENANT, ActorKind
from app.errors import SettingsError
from app.service.sandboxes import Service
from app.service.streams import decoded
from app.settings import Settings, load
from app.store.database.installation import claim_master_key, read_installation
from app.store.database.pool import Database
from app.store.log.store import EventLog
from app.store.vault.keyfile import master_keys, prepend_new_key
from app.store.vault.keys import open_keys
from app.store.vault.rotation import Rotated, is_due, rotate
from app.store.vault.seal import MasterKeys, Sealed, Sealer, Secrets, generate_master_key
from tests.support.sql import connected
from tests.support.stream import META, TENANT, requested


def settings_of(dsn: str, folder: Path, state: Path, master_key: str = "") -> Settings:
    path = folder / "empty.toml"
    path.write_text("")
    environ = {"HOME": str(folder), "SANDLEDGER_STATE_DIR": str(state), "DATABASE_URL": dsn}
    return load(path, environ | ({"SANDLEDGER_MASTER_KEY": master_key} if master_key else {})).settings


async def test_a_rotation_with_a_new_key_in_the_file(dsn: str, database: Database, service: Service, tmp_path: Path):
    settings = settings_of(dsn, tmp_path, tmp_path / "state")
    old, where = master_keys(None, None, None, tmp_path / "state", make=True)
    await claim_master_key(database, old.ids)
    keys = await open_keys(database, old, old.ids[0])
    sandbox_id = uuid4()
    values = Secrets({"TOKEN": "hunter2"})
    await service.create(sandbox_id, TENANT, requested(), Sealer(old).seal(sandbox_id, values), META)
    said: list[str] = []

    await rotate_master(settings, said.append, generate=False, notice=0)
    assert "nothing to do" in said[-1]
    await rotate_master(settings, said.append, generate=True, notice=0)
    assert "every older backup is then unreadable" in said[-1]
    assert "hunter2" not in "".join(said)

    both, _ = master_keys(None, None, None, tmp_path / "state")
    new_id = both.ids[0]
    assert both.ids[1:] == old.ids
    installation = await read_installation(database)
    assert installation.master_key_id == new_id
    path = Path(where)
    path.write_text(path.read_text().split()[0] + "\n")  # the old key is destroyed
    new, _ = master_keys(None, None, None, tmp_path / "state")
    async with connected(dsn) as connection:
        row = await connection.fetchrow("SELECT key_id, wrapped_key, sealed FROM sealed_values")
    assert Sealer(new).unseal(sandbox_id, Sealed(*row)) == values
    assert msgspec.structs.astuple(await open_keys(database, new, new_id)) == msgspec.structs.astuple(keys)

    (stored,) = await EventLog(database).history(installation.id, PLATFORM_TENANT)
    recorded = decoded(REGISTRY, stored)
    assert recorded.event == MasterKeyRotated(old.ids[0], new_id, 1 + 4)
    assert (recorded.meta.actor.kind, recorded.meta.actor.id) == (ActorKind.OPERATOR, f"uid-{os.getuid()}")
    await rotate_master(settings, said.append, generate=False, notice=0)
    assert "nothing to do" in said[-1]


async def test_a_key_of_the_environment_is_not_generated_into_a_file(dsn: str, tmp_path: Path):
    with pytest.raises(SettingsError, match="SANDLEDGER_MASTER_KEY is set"):
        await rotate_master(settings_of(dsn, tmp_path, tmp_path, generate_master_key()), print, generate=True)


@pytest.mark.parametrize("generate", [False, True])
async def test_without_a_key_there_is_nothing_to_rotate_and_none_is_made(
    dsn: str, database: Database, tmp_path: Path, *, generate: bool
):
    state = tmp_path / "state"
    settings = settings_of(dsn, tmp_path, state)
    with pytest.raises(SettingsError, match=r"no master key to rotate yet.*master\.key.*sandledger serve"):
        await rotate_master(settings, print, generate=generate)
    wanted = MasterKeys(os.urandom(32)).ids
    await claim_master_key(database, wanted)
    with pytest.raises(SettingsError, match=rf"sealed by master key {wanted[0]}.*master\.key"):
        await rotate_master(settings, print, generate=generate)
    assert not (state / "master.key").exists()


async def test_generate_makes_no_key_beside_one_that_is_not_in_use_here(dsn: str, database: Database, tmp_path: Path):
    _, where = master_keys(None, None, None, tmp_path / "state", make=True)
    before = Path(where).read_text()
    (wanted,) = MasterKeys(os.urandom(32)).ids
    await claim_master_key(database, [wanted])
    with pytest.raises(SettingsError, match=f"{wanted}, which is not here"):
        await rotate_master(settings_of(dsn, tmp_path, tmp_path / "state"), print, generate=True)
    assert Path(where).read_text() == before


class Killed(Exception):
    pass


@pytest.fixture
async def sealed(database: Database, service: Service, tmp_path: Path) -> tuple[Path, MasterKeys]:
    """A key file, and a sandbox that its key seals."""
    old, where = master_keys(None, None, None, tmp_path / "state", make=True)
    await claim_master_key(database, old.ids)
    await open_keys(database, old, old.ids[0])
    sandbox_id = uuid4()
    values = Secrets({"TOKEN": "hunter2"})
    await service.create(sandbox_id, TENANT, requested(), Sealer(old).seal(sandbox_id, values), META)
    return Path(where), old


@pytest.mark.parametrize("killed", ["before the switch", "after the first pass", "while it is recorded"])
async def test_a_killed_run_is_gone_on_with_and_makes_no_third_key(
    dsn: str, database: Database, tmp_path: Path, sealed: tuple[Path, MasterKeys], killed: str
):
    """A third key would take the second one out of use at once, under the servers that seal by it."""
    path, old = sealed
    assert prepend_new_key(path, before=old.ids[0])
    both, _ = master_keys(None, None, None, tmp_path / "state")

    def passed(_: int) -> None:
        if killed == "after the first pass":
            raise Killed

    async def record(_: Rotated) -> None:
        raise Killed

    if killed != "before the switch":
        with pytest.raises(Killed):
            await rotate(database, both, passed, record, notice=0)
    said: list[str] = []
    await rotate_master(settings_of(dsn, tmp_path, tmp_path / "state"), said.append, generate=True, notice=0)
    assert master_keys(None, None, None, tmp_path / "state")[0].ids == both.ids
    assert (await read_installation(database)).master_key_id == both.ids[0]
    assert not await is_due(database, both.ids[0])
    assert "every older backup is then unreadable" in said[-1]


async def test_the_next_rotation_has_a_key_of_its_own(
    dsn: str, database: Database, tmp_path: Path, sealed: tuple[Path, MasterKeys]
):
    path, old = sealed
    settings = settings_of(dsn, tmp_path, tmp_path / "state")
    used = [old.ids[0]]
    for _ in range(2):
        await rotate_master(settings, [].append, generate=True, notice=0)
        used.append((await read_installation(database)).master_key_id or "")
    assert len(set(used)) == 3
    # The oldest key first: it was replaced, so it is no key that a rotation has yet to bring into use.
    path.write_text("\n".join(reversed(path.read_text().split())) + "\n")
    assert master_keys(None, None, None, tmp_path / "state")[0].ids == tuple(used)
    await rotate_master(settings, [].append, generate=True, notice=0)
    assert (await read_installation(database)).master_key_id not in used
