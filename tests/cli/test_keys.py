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
from app.store.vault.keyfile import master_keys
from app.store.vault.keys import open_keys
from app.store.vault.seal import Sealed, Sealer, Secrets, generate_master_key
from tests.support.sql import connected
from tests.support.stream import META, TENANT, requested


def settings_of(dsn: str, folder: Path, state: Path, master_key: str = "") -> Settings:
    path = folder / "empty.toml"
    path.write_text("")
    environ = {"HOME": str(folder), "SANDLEDGER_STATE_DIR": str(state), "DATABASE_URL": dsn}
    return load(path, environ | ({"SANDLEDGER_MASTER_KEY": master_key} if master_key else {})).settings


async def test_a_rotation_with_a_new_key_in_the_file(dsn: str, database: Database, service: Service, tmp_path: Path):
    settings = settings_of(dsn, tmp_path, tmp_path / "state")
    old, where = master_keys(None, None, None, tmp_path / "state")
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
    with pytest.raises(SettingsError, match="no master key to rotate yet"):
        await rotate_master(settings_of(dsn, tmp_path, tmp_path / "none"), print, generate=True)
