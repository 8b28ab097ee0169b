"""Docker as a driver.

`driver` has the verbs and their protocol; `spec` says what a container is made of, `pull` fetches images, `events`
reads hints, `verdicts` turns the engine's texts into typed faults, `engine` makes the calls, `answers` decodes them.
"""

from app.runtime.docker.driver import DockerDriver, connect
from app.runtime.docker.options import DockerOptions
from app.runtime.docker.spec import ContainerConfig, HostConfig, container_config, container_name, host_config

__all__ = [
    "ContainerConfig",
    "DockerDriver",
    "DockerOptions",
    "HostConfig",
    "connect",
    "container_config",
    "container_name",
    "host_config",
]
