"""`sandledger engines`: what it shows, and the way out when the log went back."""

from __future__ import annotations

import msgspec
import pytest

from app.cli import engines as cli
from app.domain.engine.decide import RecordLogWentBack
from app.domain.engine.state import EngineState
from app.domain.stream import ActorKind
from app.errors import SettingsError
from app.service.engines import Engines
from app.service.sandboxes import Service
from app.settings import Settings
from app.store.database.installation import read_installation
from app.store.database.pool import Database
from app.store.log.signal import Signal
from tests.conftest import SIGHTING, STATION


@pytest.fixture
async def engines(database: Database, signal: Signal) -> Engines:
    installation = (await read_installation(database)).id
    made = Engines(database, signal, installation, Service(database, signal).engines)
    await made.register(SIGHTING, STATION)
    return made


@pytest.fixture
def settings(dsn: str) -> Settings:
    found = Settings()
    postgresql = msgspec.structs.replace(found.store.postgresql, dsn=dsn)
    return msgspec.structs.replace(found, store=msgspec.structs.replace(found.store, postgresql=postgresql))


async def test_ls_shows_every_engine(engines: Engines, settings: Settings, capsys: pytest.CaptureFixture[str]):
    await cli.show(settings, print, as_json=False)
    shown = capsys.readouterr().out
    assert "default" in shown
    assert "never" in shown
    await cli.show(settings, print, as_json=True)
    (row,) = msgspec.json.decode(capsys.readouterr().out)
    assert (row["name"], row["state"], row["mark"], row["last_seen_at"]) == ("default", "up", SIGHTING.mark, None)


async def test_trust_ends_the_mismatch_and_leaves_the_positions_behind(engines: Engines, settings: Settings):
    await engines.execute("default", RecordLogWentBack(10, 5000), STATION)
    said: list[str] = []
    await cli.trust(settings, "default", said.append)
    engine = await engines.load("default")
    assert engine is not None
    assert engine.state is EngineState.UP
    assert engine.position > 5000
    last = (await engines.history("default"))[-1]
    assert last.meta.actor.kind == ActorKind.OPERATOR
    assert "default is up again" in said[-1]


async def test_trust_says_why_it_cannot(engines: Engines, settings: Settings):
    with pytest.raises(SettingsError, match="only an engine whose trouble is LOG_WENT_BACK"):
        await cli.trust(settings, "default", print)
    with pytest.raises(SettingsError, match="sandledger engines ls"):
        await cli.trust(settings, "other", print)
