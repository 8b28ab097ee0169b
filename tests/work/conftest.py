from __future__ import annotations

import pytest

from app.database.engine import Database
from app.log.signal import Signal
from app.service import Service
from app.vault.seal import Sealer
from tests.work.stage import Stage


@pytest.fixture
async def stage(dsn: str, database: Database, service: Service, signal: Signal, sealer: Sealer) -> Stage:
    return Stage(dsn, database, service, signal, sealer)
