"""What a sandbox's container is made of. Pure: a `Workload` and `DockerOptions` in, the engine's own words out.

Labels carry identity only (installation, sandbox, tenant, generation), because everybody who can list containers
reads them. An image may bring labels along, a committed sandbox even ours; therefore an object is ours only when the
installation label, the id label and the container's name agree.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from uuid import UUID

from msgspec import Struct

from app.errors import RuntimeRejected
from app.runtime.docker.options import DockerOptions
from app.runtime.driver import Workload

LABEL_ID = "opensandbox.io/id"
LABEL_INSTALLATION = "sandledger.io/installation"
LABEL_TENANT = "sandledger.io/tenant"
LABEL_GENERATION = "sandledger.io/generation"


class LogConfig(Struct, frozen=True, rename="pascal"):
    """Which log driver, with which limits."""

    type: str
    config: dict[str, str]


class DeviceRequest(Struct, frozen=True, rename="pascal"):
    """Devices by what they can do; `count` -1 = all of them."""

    count: int
    capabilities: tuple[tuple[str, ...], ...]


class HostConfig(Struct, frozen=True, rename="pascal", omit_defaults=True):
    """Limits, privileges and network of a container, as the engine's API names them."""

    network_mode: str
    log_config: LogConfig
    cap_drop: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()
    pids_limit: int | None = None
    memory: int | None = None
    memory_swap: int | None = None
    nano_cpus: int | None = None
    device_requests: tuple[DeviceRequest, ...] = ()


class ContainerConfig(Struct, frozen=True, rename="pascal"):
    """The body of a create call."""

    image: str
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    env: tuple[str, ...]
    labels: dict[str, str]
    host_config: HostConfig

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"ContainerConfig(image={self.image!r}, entrypoint={self.entrypoint!r})"


def container_name(sandbox_id: UUID) -> str:
    """Derived from the id, so that a repeated create meets the first one."""
    return f"sandbox-{sandbox_id}"


def host_config(work: Workload, options: DockerOptions) -> HostConfig:
    """Limits, privileges and network of one sandbox."""
    memory = work.limits.memory_bytes
    gpus = work.limits.gpus
    return HostConfig(
        network_mode=options.network_mode,
        log_config=LogConfig("json-file", {"max-size": options.log_max_size, "max-file": str(options.log_max_files)}),
        cap_drop=options.drop_capabilities,
        security_opt=_security(options),
        pids_limit=options.pids_limit,
        memory=memory,
        memory_swap=memory,  # memory and swap together: equal means no swap at all
        nano_cpus=work.limits.nano_cpus,
        device_requests=() if gpus is None else (DeviceRequest(gpus, (("gpu",),)),),
    )


def container_config(work: Workload, options: DockerOptions) -> ContainerConfig:
    """The whole create call. RuntimeRejected `SPEC_REJECTED` for what no engine could take."""
    return ContainerConfig(
        image=work.image,
        entrypoint=_command(work),
        cmd=(),  # with the entrypoint given and no cmd, the image's own command is out of the game
        env=_environment(work, options),
        labels={
            LABEL_ID: str(work.sandbox_id),
            LABEL_INSTALLATION: str(options.installation),
            LABEL_TENANT: work.tenant,
            LABEL_GENERATION: str(work.generation),
        },
        host_config=host_config(work, options),
    )


def sandbox_of(labels: Mapping[str, str], names: Iterable[str], installation: UUID) -> UUID | None:
    """Which sandbox this object is; None = a stranger's. `names` as the engine gives them, with a slash in front."""
    if labels.get(LABEL_INSTALLATION) != str(installation):
        return None
    try:
        sandbox_id = UUID(labels.get(LABEL_ID, ""))
    except ValueError:
        return None
    return sandbox_id if f"/{container_name(sandbox_id)}" in names else None


def generation_of(labels: Mapping[str, str]) -> int:
    """The generation label; 1 when it is missing or has been tampered with."""
    text = labels.get(LABEL_GENERATION, "")
    return int(text) if text.isascii() and text.isdecimal() else 1


def _security(options: DockerOptions) -> tuple[str, ...]:
    chosen = ["no-new-privileges"] if options.no_new_privileges else []
    if options.apparmor_profile:
        chosen.append(f"apparmor={options.apparmor_profile}")
    if options.seccomp_profile:
        chosen.append(f"seccomp={options.seccomp_profile}")
    return tuple(chosen)


def _command(work: Workload) -> tuple[str, ...]:
    """The entrypoint whole; a single element with a space in it is a command line and is split as a shell would."""
    words = work.entrypoint
    if len(words) == 1 and " " in words[0]:
        try:
            words = tuple(shlex.split(words[0]))
        except ValueError as error:
            raise RuntimeRejected("SPEC_REJECTED", f"the entrypoint is no command line: {error}") from None
    if not words or not words[0]:
        raise RuntimeRejected("SPEC_REJECTED", "the entrypoint is empty")
    return words


def _environment(work: Workload, options: DockerOptions) -> tuple[str, ...]:
    merged = {**options.sandbox_env, **work.env, "OPENSANDBOX_ID": str(work.sandbox_id)}
    # The engine repeats a malformed entry, value and all, in its error; such an entry must never get there.
    for name, value in merged.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise RuntimeRejected("SPEC_REJECTED", f"the environment variable {name!r} has no valid name or value")
    return tuple(f"{name}={value}" for name, value in merged.items())
