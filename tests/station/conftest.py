from __future__ import annotations

import pytest

from app.store.database.pool import Database
from app.store.log.signal import Signal
from tests.station.field import Field


@pytest.fixture
async def field(dsn: str, database: Database, signal: Signal) -> Field:
    return Field(dsn, database, signal)
