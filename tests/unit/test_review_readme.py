"""Defaults that the README lists as differences from the public server."""

from __future__ import annotations

from pathlib import Path

from app.settings import load, publish_host


def test_defaults_that_differ(tmp_path: Path):
    settings = load(None, {"HOME": str(tmp_path)}).settings
    assert settings.server.host == "127.0.0.1"
    assert settings.docker.network_mode == "bridge"
    assert publish_host(settings) == "127.0.0.1"
    assert (settings.docker.port_range_min, settings.docker.port_range_max) == (None, None)
    assert settings.sandledger.api.metadata_max_entries == 256
    assert settings.sandledger.api.body_limit_bytes == 1024 * 1024
    assert settings.sandledger.api.wait_seconds_max == 300
