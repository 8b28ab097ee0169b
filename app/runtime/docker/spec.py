"""What a sandbox's container is made of. Pure: a `Workload` and `DockerOptions` in, the engine's own words out."""

from __future__ import annotations

import shlex

from msgspec import Struct

from app.errors import RuntimeRejected
from app.runtime.docker import names
from app.runtime.docker.answers import GPU
from app.runtime.docker.options import DockerOptions, Ulimit
from app.runtime.driver import Workload


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
    cap_add: tuple[str, ...] = ()
    security_opt: tuple[str, ...] = ()
    init: bool | None = None
    pids_limit: int | None = None
    ulimits: tuple[Ulimit, ...] = ()
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


def host_config(work: Workload, options: DockerOptions) -> HostConfig:
    """Limits, privileges and network of one sandbox. RuntimeRejected when it asks for more than the operator allows."""
    limits = work.limits
    memory = _limit("memory", limits.memory_bytes, options.default_memory_bytes, options.max_memory_bytes)
    cpus = _limit("cpu", limits.cpu_nanos, options.default_cpu_nanos, options.max_cpu_nanos)
    return HostConfig(
        network_mode=options.network_mode,
        log_config=LogConfig("json-file", {"max-size": options.log_max_size, "max-file": str(options.log_max_files)}),
        cap_drop=("ALL",),
        cap_add=options.added_capabilities,
        security_opt=_security(options),
        init=options.init,  # said either way, or a default of the engine would decide
        pids_limit=options.pids_limit,
        ulimits=options.ulimits,
        memory=memory,
        memory_swap=memory,  # memory and swap together: equal means no swap at all
        nano_cpus=cpus,
        device_requests=_devices(work),
    )


def container_config(work: Workload, options: DockerOptions) -> ContainerConfig:
    """The whole create call. RuntimeRejected `SPEC_REJECTED` for what no engine could take."""
    return ContainerConfig(
        image=work.image.reference,
        entrypoint=command(work),
        cmd=(),  # with the entrypoint given and no cmd, the image's own command is not used
        env=_environment(work, options),
        labels=names.labels_of(
            options.installation,
            work.ref.object_id,
            names.MAIN,
            tenant=work.tenant,
            generation=work.generation,
            position=work.position,
        ),
        host_config=host_config(work, options),
    )


def command(work: Workload) -> tuple[str, ...]:
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


def _limit(what: str, asked: int | None, default: int | None, largest: int | None) -> int | None:
    """The operator's default where nothing is asked for, never above the operator's maximum."""
    if asked is not None:
        if largest is not None and asked > largest:
            raise RuntimeRejected("SPEC_REJECTED", f"{what} {asked} is above the operator's maximum of {largest}")
        return asked
    if default is None or largest is None:
        return largest if default is None else default
    return min(default, largest)


def _devices(work: Workload) -> tuple[DeviceRequest, ...]:
    count = -1 if work.limits.gpus_all else work.limits.gpus
    return () if count is None else (DeviceRequest(count, ((GPU,),)),)


def _security(options: DockerOptions) -> tuple[str, ...]:
    chosen = ["no-new-privileges"] if options.no_new_privileges else []
    if options.apparmor_profile:
        chosen.append(f"apparmor={options.apparmor_profile}")
    if options.seccomp_profile:
        chosen.append(f"seccomp={options.seccomp_profile}")
    return tuple(chosen)


def _environment(work: Workload, options: DockerOptions) -> tuple[str, ...]:
    merged = {**options.sandbox_env, **work.env, "OPENSANDBOX_ID": str(work.ref.object_id)}
    # The engine repeats a malformed entry, value and all, in its error; such an entry must never get there.
    for name, value in merged.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise RuntimeRejected("SPEC_REJECTED", f"the environment variable {name!r} has no valid name or value")
    return tuple(f"{name}={value}" for name, value in merged.items())
