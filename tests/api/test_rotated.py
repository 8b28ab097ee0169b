"""A create that meets a master key out of use: this server asks for the new one at once, before it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.api.app import create_app
from app.store.database.installation import claim_master_key
from app.store.database.pool import Database
from app.store.vault.keyfile import master_keys, prepend_new_key
from app.store.vault.keys import open_keys
from app.store.vault.rotation import Rotated, rotate
from app.store.vault.seal import MasterKeys, Sealer
from tests.api.conftest import KEY, MakeContext, body, client

OLD, NEW = os.urandom(32), os.urandom(32)
BEFORE, BOTH = MasterKeys(OLD), MasterKeys(NEW, OLD)


async def recorded(_: Rotated) -> None:
    pass


async def rotated(database: Database, before: MasterKeys, both: MasterKeys) -> None:
    """A whole rotation that no running server has noticed."""
    await claim_master_key(database, before.ids)
    await open_keys(database, before, before.ids[0])
    await rotate(database, both, lambda _: None, recorded, notice=0)


async def test_it_is_sealed_by_the_new_key_of_the_file(make_context: MakeContext, database: Database, tmp_path: Path):
    old, where = master_keys(None, None, None, tmp_path, make=True)
    sealer = Sealer(old, reread=lambda: master_keys(None, None, None, tmp_path)[0])
    assert prepend_new_key(Path(where), before=old.ids[0])
    both, _ = master_keys(None, None, None, tmp_path)
    await rotated(database, old, both)
    async with client(create_app(make_context(sealer=sealer)), **{"OPEN-SANDBOX-API-KEY": KEY}) as http:
        answer = await http.post("/v1/sandboxes", json=body(env={"TOKEN": "x"}), headers={"Idempotency-Key": "k"})
        assert answer.status_code == 202, answer.text
        again = await http.post("/v1/sandboxes", json=body(env={"TOKEN": "x"}), headers={"Idempotency-Key": "k"})
    assert sealer.key_id == both.ids[0]
    assert again.json()["id"] == answer.json()["id"]


async def test_a_known_key_needs_no_file(make_context: MakeContext, database: Database):
    sealer = Sealer(BOTH, key_id=BEFORE.ids[0])
    await rotated(database, BEFORE, BOTH)
    async with client(create_app(make_context(sealer=sealer)), **{"OPEN-SANDBOX-API-KEY": KEY}) as http:
        assert (await http.post("/v1/sandboxes", json=body(env={"TOKEN": "x"}))).status_code == 202


@pytest.mark.parametrize("reread", [None, lambda: BEFORE])
async def test_a_server_that_cannot_get_the_new_key_answers_503(make_context: MakeContext, database: Database, reread):
    await rotated(database, BEFORE, BOTH)
    app = create_app(make_context(sealer=Sealer(BEFORE, reread=reread)))
    async with client(app, **{"OPEN-SANDBOX-API-KEY": KEY}) as http:
        answer = await http.post("/v1/sandboxes", json=body(env={"TOKEN": "x"}))
        assert (answer.status_code, answer.json()["code"]) == (503, "GENERAL::STORE_UNAVAILABLE")
        assert "master key" in answer.json()["message"]
        assert (await http.post("/v1/sandboxes", json=body())).status_code == 202
