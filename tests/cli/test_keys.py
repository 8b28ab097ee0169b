"""`sandledger keys rotate-master`: from one key file to the next, with what it says and what it records."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from msgspec.structs import replace

from app.cli import keys as cli
from app.domain.stream import ActorKind, read_meta
from app.errors import SettingsError
from app.server.assembly import opened
from app.settings import Settings
from app.store.vault.keyfile import master_keys
from app.store.vault.seal import Sealed, Secrets, Unsealable
from tests.support.sql import connected
from tests.support.stream import META, requested

VALUES = Secrets({"TOKEN": "hunter2"})
SANDBOX = UUID("0198f000-0000-7000-8000-00000000beef")


@pytest.fixture
def ours(settings: Settings, tmp_path: Path) -> Settings:
    """With a state folder of its own."""
    return replace(settings, sandledger=replace(settings.sandledger, state_dir=tmp_path))


async def _sealed(dsn: str) -> Sealed:
    async with connected(dsn) as connection:
        (row,) = await connection.fetch("SELECT key_id, wrapped_key, sealed FROM sealed_values")
        return Sealed(*row)


async def test_the_first_run_seals_and_the_rotation_makes_the_old_key_useless(ours: Settings, dsn: str, tmp_path: Path):
    said: list[str] = []
    async with opened(ours, said.append) as parts:
        await parts.service.create(SANDBOX, "default", requested(), parts.sealer.seal(SANDBOX, VALUES), META)
        digest = parts.sealer.digest(b"x", "api-key")
    path = tmp_path / "master.key"
    old, _ = master_keys(None, None, None, tmp_path)
    before = await _sealed(dsn)
    said.clear()
    await cli.rotate_master(ours, said.append, generate=False)
    assert said[-1].startswith("nothing to do")
    assert await _sealed(dsn) == before

    said.clear()
    await cli.rotate_master(ours, said.append, generate=True)
    both, _ = master_keys(None, None, None, tmp_path)
    assert both.ids[1:] == old.ids
    assert both.ids[0] not in old.ids
    text = "\n".join(said)
    assert f"{path}: a new key stands first now" in said
    assert f"are wrapped by {both.ids[0]}; 0 by another key" in text
    assert "destroy it" in text
    assert not any(line in text for line in path.read_text().split()), "no key is said, only its digest"
    after = await _sealed(dsn)
    assert (after.key_id, after.sealed) == (both.ids[0], before.sealed)
    path.write_text(path.read_text().splitlines()[0] + "\n")  # the old key is destroyed
    async with opened(ours, said.append) as parts:
        assert parts.sealer.unseal(SANDBOX, after) == VALUES
        assert parts.sealer.digest(b"x", "api-key") == digest, "rotation changes no digest"
        with pytest.raises(Unsealable):
            parts.sealer.unseal(SANDBOX, before)
    async with connected(dsn) as connection:
        (row,) = await connection.fetch("SELECT data, meta FROM events WHERE kind = 'operations'")
    recorded = msgspec.json.decode(row["data"])
    assert (recorded["old_key_id"], recorded["new_key_id"]) == (old.ids[0], both.ids[0])
    assert recorded["rewrapped"] >= 1
    assert read_meta(row["meta"]).actor.kind == ActorKind.OPERATOR

    said.clear()
    await cli.rotate_master(ours, said.append, generate=False)
    assert said[-1].startswith("nothing to do")


async def test_generate_needs_a_file_that_is_there(ours: Settings, tmp_path: Path):
    with pytest.raises(SettingsError, match="there is no master key to rotate yet"):
        await cli.rotate_master(ours, print, generate=True)
    assert not (tmp_path / "master.key").exists()
    from_environment = replace(ours, sandledger=replace(ours.sandledger, master_key=bytes(32)))
    with pytest.raises(SettingsError, match="SANDLEDGER_MASTER_KEY is set"):
        await cli.rotate_master(from_environment, print, generate=True)
