"""Docker as a driver.

`driver` has the verbs; `placing` creates, adopts and starts, `pull` fetches images, `identity` distinguishes engines,
`containers` inspects, removes and lists, `events` reads hints. `names` has names and labels, `spec` says what a
container is made of, `verdicts` and `pull_verdicts` turn the engine's texts into typed faults, `engine` makes the
calls, `answers` decodes them.
"""

from app.runtime.docker.driver import DockerDriver, connect
from app.runtime.docker.options import CAPABILITIES, DockerOptions, Ulimit
from app.runtime.docker.spec import ContainerConfig, HostConfig, container_config, host_config

__all__ = [
    "CAPABILITIES",
    "ContainerConfig",
    "DockerDriver",
    "DockerOptions",
    "HostConfig",
    "Ulimit",
    "connect",
    "container_config",
    "host_config",
]
