from __future__ import annotations

import pytest

from app.service.sandboxes import Service
from app.store.database.pool import Database
from app.store.log.signal import Signal
from app.store.vault.seal import Sealer
from tests.work.field import Field
from tests.work.stage import Stage


@pytest.fixture
async def stage(dsn: str, database: Database, service: Service, signal: Signal, sealer: Sealer) -> Stage:
    return Stage(dsn, database, service, signal, sealer)


@pytest.fixture
async def field(dsn: str, database: Database, signal: Signal) -> Field:
    return Field(dsn, database, signal)
