"""`sandledger links`: what it prints holds at a server, also after a rotation of the master key."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest

from app.cli.keys import rotate_master
from app.cli.links import create, revoke
from app.domain.sandbox import commands as cmd
from app.domain.sandbox.links import LinkKey
from app.domain.sandbox.observed import Power
from app.domain.stream import ActorKind
from app.domain.tenants import ANY_TENANT
from app.errors import Forbidden, NotFound, SettingsError
from app.proxy.admit import admit, by_links
from app.proxy.route import route
from app.service.sandboxes import Service
from app.settings import Settings
from app.store.database.installation import claim_master_key, read_installation
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.keyfile import master_keys
from app.store.vault.keys import open_keys
from tests.cli.test_keys import settings_of
from tests.log.test_signal import ready
from tests.support.stream import META, TENANT, about, requested, seen


@pytest.fixture
async def settings(dsn: str, database: Database, tmp_path: Path) -> Settings:
    """Of a machine with the master key of this installation."""
    keys, _ = master_keys(None, None, None, tmp_path / "state", make=True)
    await claim_master_key(database, keys.ids)
    await open_keys(database, keys, keys.ids[0])
    return settings_of(dsn, tmp_path, tmp_path / "state")


@pytest.fixture
async def sandbox(service: Service) -> UUID:
    sandbox_id = (await service.create(uuid4(), TENANT, requested(), None, META)).sandbox.id
    await service.execute(sandbox_id, ANY_TENANT, about(sandbox_id, cmd.RecordSeen(seen(Power.RUNNING))), META)
    return sandbox_id


async def key_of(database: Database, folder: Path) -> LinkKey:
    """As a server that starts now opens it."""
    keys, _ = master_keys(None, None, None, folder / "state")
    in_use = (await read_installation(database)).master_key_id
    assert in_use is not None
    return LinkKey((await open_keys(database, keys, in_use)).link)


async def test_what_is_printed_holds_and_goes_on_holding(
    settings: Settings,
    sandbox: UUID,
    service: Service,
    database: Database,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    said: list[str] = []
    await create(settings, sandbox, 3000, 60, said.append)
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(f"http://127.0.0.1:8080/v1/sandboxes/{sandbox}/proxy/3000/?sandledger_link=v1.")
    there = route(urlsplit(printed)._replace(scheme="", netloc="").geturl().encode())
    assert there is not None
    loaded = await service.view.load(sandbox, TENANT)
    assert loaded is not None
    before = await key_of(database, tmp_path)
    for key in (before, await _rotated(settings, database, tmp_path)):
        shown = by_links(there.links, there.port, key, is_first_visit=True)
        admitted = admit(loaded[0], 3000, shown, key, loaded[1])
        assert admitted.link is not None
    made = (await service.history(sandbox, TENANT))[-1]
    assert made.meta.actor.kind == ActorKind.OPERATOR
    assert str(admitted.link.id) in said[0]
    assert there.links[0] not in "".join(said)


async def _rotated(settings: Settings, database: Database, folder: Path) -> LinkKey:
    before = (await read_installation(database)).master_key_id
    await rotate_master(settings, [].append, generate=True, notice=0)
    assert (await read_installation(database)).master_key_id != before
    path = folder / "state" / "master.key"
    path.write_text(path.read_text().split()[0] + "\n")  # the old key is destroyed
    return await key_of(database, folder)


async def test_a_revocation_is_told_to_servers_at_once(
    settings: Settings, sandbox: UUID, service: Service, signal: Signal, database: Database
):
    other = Signal(database)
    telling = asyncio.create_task(other.run())
    await ready(signal, other)
    telling.cancel()
    with signal.subscribe(sandbox) as news:
        await revoke(settings, sandbox, [].append)
        assert await news.wait(20), "they would cut no stream for 30 s"
    loaded = await service.view.load(sandbox, TENANT)
    assert loaded is not None
    assert loaded[0].link_number == 1


async def test_refusals(settings: Settings, sandbox: UUID, service: Service, dsn: str, tmp_path: Path):
    with pytest.raises(NotFound):
        await create(settings, uuid4(), 3000, 60, print)
    with pytest.raises(NotFound):
        await revoke(settings, uuid4(), print)
    with pytest.raises(Forbidden, match="no link leads to it"):
        await create(settings, sandbox, 44772, 60, print)
    version = len(await service.history(sandbox, TENANT))
    with pytest.raises(SettingsError, match="sealed by master key"):
        await create(settings_of(dsn, tmp_path, tmp_path / "elsewhere"), sandbox, 3000, 60, print)
    assert len(await service.history(sandbox, TENANT)) == version, "no event of a link that nobody has got"
