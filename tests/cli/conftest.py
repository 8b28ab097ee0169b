from __future__ import annotations

import msgspec
import pytest

from app.settings import Settings


@pytest.fixture
def settings(dsn: str) -> Settings:
    """Of a command that works on the test's database."""
    found = Settings()
    postgresql = msgspec.structs.replace(found.store.postgresql, dsn=dsn)
    return msgspec.structs.replace(found, store=msgspec.structs.replace(found.store, postgresql=postgresql))
