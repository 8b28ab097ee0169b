"""What a sandbox's container is made of. Pure: a `Workload` and `DockerOptions` in, the engine's own words out.

With an agent, a container gets a small tmpfs at `/opt/opensandbox`, which every user may write to (`.env` and
certificates), and below it, read-only, the volume with the agent's files. It needs a directory of its own, because an
engine of API 1.41 mounts whole volumes only. The agent's `bootstrap.sh` runs as entrypoint and starts the request's.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from app.domain.sandbox.address import own_network
from app.errors import RuntimeRejected
from app.runtime.docker import names
from app.runtime.docker.answers import BOOTSTRAP, GPU
from app.runtime.docker.images import unambiguous
from app.runtime.docker.options import DockerOptions, Ulimit
from app.runtime.driver import Workload
from app.runtime.workload import AGENT_PORT, HTTP_PORT, Agent

RUNTIME_FOLDER = "/opt/opensandbox"
AGENT_FOLDER = f"{RUNTIME_FOLDER}/bin"
TMPFS_OPTIONS = "mode=1777,size=1m"
OWN, DEFAULT, ENGINES_BRIDGE = "bridge", "default", "bridge"
"""Network modes: our own network, the engine's own bridge; and how the engine names that."""
UNPUBLISHED = ("host", "none")
"""Network modes in which the engine publishes no port; neither does it for one who shares another's network."""
ACCESS = "EXECD_ACCESS_TOKEN"
"""The variable with the agent's token."""
PRE_SCRIPT = "EXECD_BOOTSTRAP_PRE_SCRIPT"
"""A file that bootstrap.sh sources; ours unless the request names another."""
OURS = ("EXECD", ACCESS, "EXECD_INIT", "OPENSANDBOX_ID")
"""Environment variables of a sandbox with an agent that a request does not decide."""


class LogConfig(Struct, frozen=True, rename="pascal"):
    """Which log driver, with which limits."""

    type: str
    config: dict[str, str]


class DeviceRequest(Struct, frozen=True, rename="pascal"):
    """Devices by what they can do; `count` -1 = all of them."""

    count: int
    capabilities: tuple[tuple[str, ...], ...]


class Binding(Struct, frozen=True, rename="pascal"):
    """Where a port is to be published. No port = the engine takes a free one; `A-B` = a free one of these."""

    host_ip: str
    host_port: str


class VolumeOptions(Struct, frozen=True, rename="pascal"):
    """How a volume is mounted, and with which labels the engine makes one that is not there."""

    labels: dict[str, str]
    no_copy: bool = True


class Mount(Struct, frozen=True, rename="pascal", tag_field="Type", tag="volume"):
    """A volume in a container."""

    source: str
    target: str
    volume_options: VolumeOptions
    read_only: bool = False


class Fixed(Struct, frozen=True):
    """An address that was chosen by us."""

    ip: str = msgspec.field(name="IPv4Address")


class EndpointConfig(Struct, frozen=True):
    """The container's side of a network."""

    fixed: Fixed = msgspec.field(name="IPAMConfig")


class NetworkingConfig(Struct, frozen=True, rename="pascal"):
    """Addresses by network."""

    endpoints_config: dict[str, EndpointConfig]


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
    tmpfs: dict[str, str] = {}
    mounts: tuple[Mount, ...] = ()
    port_bindings: dict[str, tuple[Binding, ...]] = {}
    readonly_rootfs: bool = False


class ContainerConfig(Struct, frozen=True, rename="pascal", omit_defaults=True):
    """The body of a create call."""

    image: str
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    env: tuple[str, ...]
    labels: dict[str, str]
    host_config: HostConfig
    exposed_ports: dict[str, dict[str, str]] = {}
    user: str = ""
    networking_config: NetworkingConfig | None = None

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"ContainerConfig(image={self.image!r}, entrypoint={self.entrypoint!r})"


def host_config(work: Workload, options: DockerOptions) -> HostConfig:
    """Limits, privileges and network of one sandbox. RuntimeRejected when it asks for more than the operator allows."""
    limits = work.limits
    memory = _limit("memory", limits.memory_bytes, options.default_memory_bytes, options.max_memory_bytes)
    cpus = _limit("cpu", limits.cpu_nanos, options.default_cpu_nanos, options.max_cpu_nanos)
    return HostConfig(
        network_mode=_network(work, options),
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
        tmpfs={} if work.agent is None else {RUNTIME_FOLDER: TMPFS_OPTIONS},
        mounts=() if work.agent is None else (_agent_files(work.agent, options),),
        port_bindings={port: (Binding(options.publish_host, _host_port(options)),) for port in _ports(work, options)},
    )


def container_config(work: Workload, options: DockerOptions) -> ContainerConfig:
    """The whole create call. RuntimeRejected `SPEC_REJECTED` for what no engine could take."""
    return ContainerConfig(
        image=unambiguous(work.image.reference),
        # With the entrypoint given and no cmd, the image's own command is not used.
        entrypoint=command(work) if work.agent is None else (BOOTSTRAP,),
        cmd=() if work.agent is None else command(work),
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
        exposed_ports={port: {} for port in _ports(work, options)},
        networking_config=_addressed(work, options),
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


def program(work: Workload) -> str:
    """What the engine itself executes."""
    return command(work)[0] if work.agent is None else BOOTSTRAP


def _network(work: Workload, options: DockerOptions) -> str:
    if options.network_mode == OWN:
        assert work.ip, "an address of our own network is leased before a container is made"
        return own_network(options.installation)
    return ENGINES_BRIDGE if options.network_mode == DEFAULT else options.network_mode


def _addressed(work: Workload, options: DockerOptions) -> NetworkingConfig | None:
    if options.network_mode != OWN:
        return None
    return NetworkingConfig({own_network(options.installation): EndpointConfig(Fixed(work.ip))})


def _agent_files(agent: Agent, options: DockerOptions) -> Mount:
    # The labels are for an engine that has lost the volume: it makes an empty one, which then is ours to fill.
    labels = names.agent_labels(options.installation)
    return Mount(agent.volume, AGENT_FOLDER, VolumeOptions(labels), read_only=True)


def _ports(work: Workload, options: DockerOptions) -> tuple[str, ...]:
    if work.agent is None or options.network_mode.partition(":")[0] in (*UNPUBLISHED, "container"):
        return ()
    return f"{AGENT_PORT}/tcp", f"{HTTP_PORT}/tcp"


def _host_port(options: DockerOptions) -> str:
    return "" if options.port_range is None else "{}-{}".format(*options.port_range)


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
    if work.agent is not None:
        merged = {name: value for name, value in merged.items() if name not in OURS} | _of_agent(
            work, work.agent, merged
        )
    # The engine repeats a malformed entry, value and all, in its error; such an entry must never get there.
    for name, value in merged.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise RuntimeRejected("SPEC_REJECTED", f"the environment variable {name!r} has no valid name or value")
    return tuple(f"{name}={value}" for name, value in merged.items())


def _of_agent(work: Workload, agent: Agent, asked: Mapping[str, str]) -> dict[str, str]:
    ours = {"EXECD": f"{AGENT_FOLDER}/execd", ACCESS: agent.token}
    if PRE_SCRIPT not in asked:
        ours[PRE_SCRIPT] = f"{AGENT_FOLDER}/prepare.sh"
    return ours | {"OPENSANDBOX_ID": str(work.ref.object_id)} | ({"EXECD_INIT": "1"} if agent.init else {})
