"""What one inspect call says of a container, for people: more than the driver itself acts on."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from msgspec import Struct

from app.runtime.docker.answers import Binding, Endpoint
from app.runtime.docker.engine import Engine, Refused, trouble
from app.runtime.docker.options import DockerOptions
from app.runtime.docker.spec import ACCESS
from app.runtime.driver import Inspection

_NEVER = "0001-01-01T00:00:00Z"


class State(Struct, frozen=True, rename="pascal"):
    """The container's process. The times are kept as the engine writes them."""

    status: str
    running: bool = False
    paused: bool = False
    oom_killed: bool = msgspec.field(name="OOMKilled", default=False)
    exit_code: int = 0
    error: str = ""
    started_at: str = ""
    finished_at: str = ""


class Config(Struct, frozen=True, rename="pascal"):
    """What it was made with."""

    image: str = ""
    labels: dict[str, str] | None = None
    env: list[str] | None = None

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"Config(image={self.image!r})"


class Host(Struct, frozen=True, rename="pascal"):
    """Its limits."""

    nano_cpus: int = 0
    memory: int = 0
    pids_limit: int | None = None


class Network(Struct, frozen=True, rename="pascal"):
    """How it can be reached."""

    networks: dict[str, Endpoint] | None = None
    ports: dict[str, list[Binding] | None] | None = None


class Shown(Struct, frozen=True, rename="pascal"):
    """Answer of an inspect call."""

    id: str
    name: str
    state: State
    config: Config
    host_config: Host | None = None
    network_settings: Network | None = None


async def inspect(engine: Engine, runtime_id: str, options: DockerOptions) -> Inspection | None:
    """None = it is gone."""
    try:
        return _inspection(await engine.ask(f"containers/{runtime_id}/json", Shown), options)
    except Refused as refused:
        if refused.status == HTTPStatus.NOT_FOUND:
            return None
        raise trouble("show a container", refused) from None


def _inspection(shown: Shown, options: DockerOptions) -> Inspection:
    state, host, network = shown.state, shown.host_config or Host(), shown.network_settings or Network()
    return Inspection(
        runtime_id=shown.id,
        name=shown.name.removeprefix("/"),
        image=shown.config.image,
        status=state.status,
        running=state.running,
        paused=state.paused,
        oom=state.oom_killed,
        exit_code=None if state.running or state.status == "created" else state.exit_code,
        error=state.error,
        started_at=_time(state.started_at),
        finished_at=_time(state.finished_at),
        cpu_nanos=host.nano_cpus,
        memory_bytes=host.memory,
        pids_limit=host.pids_limit or 0,
        networks={name: each.ip for name, each in (network.networks or {}).items()},
        ports={port: _places(bindings) for port, bindings in (network.ports or {}).items()},
        labels=shown.config.labels or {},
        env=dict(_variable(each) for each in shown.config.env or ()),
        private=(ACCESS, *options.sandbox_env),
    )


def _time(text: str) -> str:
    return "" if text == _NEVER else text


def _places(bindings: list[Binding] | None) -> tuple[str, ...]:
    return tuple(f"{each.host_ip}:{each.host_port}" for each in bindings or ())


def _variable(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value
