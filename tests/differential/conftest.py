"""Servers and an engine, as the chaos tests have them."""

from tests.chaos.conftest import docker, home, image, serve  # noqa: F401 - fixtures
