"""A container engine in memory, and its driver: the whole `Driver` protocol without containers.

Several `FakeDriver` on one `FakeEngine` are several servers on one engine. The driver makes the same calls in the same
order as the Docker one (create, start, inspect, ...), and the same conformance suite runs against both.
"""

from app.runtime.fake.agent import agent_name
from app.runtime.fake.driver import FakeDriver, Hook
from app.runtime.fake.engine import FakeContainer, FakeEngine, FakeImage, FakeVolume, Pull, name_of

__all__ = [
    "FakeContainer",
    "FakeDriver",
    "FakeEngine",
    "FakeImage",
    "FakeVolume",
    "Hook",
    "Pull",
    "agent_name",
    "name_of",
]
