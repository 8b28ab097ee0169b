"""What a test needs of the machine."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def refuse_or_skip(why: str) -> NoReturn:
    """The machine lacks what this test needs. `REQUIRE_ENGINE=1`, as in CI, turns the skip into a failure."""
    if os.environ.get("REQUIRE_ENGINE") == "1":
        pytest.fail(f"REQUIRE_ENGINE=1 and {why}")
    pytest.skip(why)
