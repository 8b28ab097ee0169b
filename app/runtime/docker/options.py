"""What the operator decides about every container, and how the engine is asked."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import msgspec
from msgspec import Struct

from app.errors import SettingsError

CAPABILITIES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
)
"""What a sandbox may do unless the operator says otherwise; everything else is dropped.

It is what engines give by default, without AUDIT_WRITE, MKNOD and NET_RAW: package managers and entrypoints that change
owner or user work, raw packets and device files do not.
"""

SECCOMP_WORDS = ("unconfined", "builtin")
"""Values that the engine itself understands; anything else is a file or a document."""


class Ulimit(Struct, frozen=True, rename="pascal"):
    """A limit of one process."""

    name: str
    soft: int
    hard: int


class Times(Struct, frozen=True):
    """Seconds that one call of the engine may take."""

    inspect: float
    """Inspect calls. This is what notices an engine that hangs."""
    change: float
    """Seconds for create, start, remove and list calls."""
    power: float
    """Seconds for pause and unpause calls."""
    volume: float


class DockerOptions(Struct, frozen=True, kw_only=True):
    """Settings of one driver; the same for every sandbox."""

    installation: UUID
    """Objects that bear another installation's label are strangers."""
    name: str = "default"
    """The engine's name in the log."""
    network_mode: str = "default"
    """`bridge` is our own network, whose addresses are leased: a workload then has one. `default` is the engine's own
    bridge, `host` the machine's network, anything else an operator's network."""
    subnets: tuple[str, ...] = ()
    """Subnets for our own network, in CIDR form; the first one that the engine takes."""
    api_timeout: float = 60.0
    """Seconds for one create, start or remove call; other calls get a fixed share of it."""
    pull_timeout: float = 600.0
    """Seconds for one image."""
    commit_timeout: float = 600.0
    """Seconds for one commit. The engine goes on with it when we do not wait any more."""
    event_silence: float = 300.0
    """Seconds without an event after which the event stream is opened again: its connection may be dead."""
    capabilities: tuple[str, ...] = CAPABILITIES
    """Capabilities that are left; all others are dropped."""
    drop_capabilities: tuple[str, ...] = ()
    """Capabilities that are removed from `capabilities`."""
    apparmor_profile: str = ""
    """Seccomp profile. Empty = the engine's default."""
    seccomp_profile: str = ""
    """Empty = the engine's default; else a word the engine knows, a JSON document, or the path of a file with one."""
    no_new_privileges: bool = True
    init: bool = False
    """Run the engine's init as process 1. It collects orphaned processes. But images whose own entrypoint wants to be
    process 1 (s6, systemd) fail under it, and a missing program is no refused start any more but an exit with 127."""
    pids_limit: int = 4096
    ulimits: tuple[Ulimit, ...] = (Ulimit("core", 0, 0),)
    """No limit of open files by default: where the engine's own is lower, it would refuse every start."""
    default_cpu_nanos: int | None = None
    """For requests without a limit of their own."""
    default_memory_bytes: int | None = None
    max_cpu_nanos: int | None = None
    """A request above it is rejected; a request without a limit gets at most this."""
    max_memory_bytes: int | None = None
    sandbox_env: dict[str, str] = {}
    publish_host: str = "127.0.0.1"
    """Where the ports of a sandbox with an agent are published."""
    port_range: tuple[int, int] | None = None
    """First and last port of the engine's host that it may take for them; None = the engine's own range."""
    log_max_size: str = "10m"
    log_max_files: int = 3

    @property
    def times(self) -> Times:
        """Time limits by call: 10, 60, 10 and 30 s by default."""
        base = self.api_timeout
        return Times(inspect=base / 6, change=base, power=base / 6, volume=base / 2)

    @property
    def added_capabilities(self) -> tuple[str, ...]:
        """What a sandbox gets back after everything was dropped, in the engine's spelling."""
        dropped = {_capability(name) for name in self.drop_capabilities}
        if "ALL" in dropped:
            return ()
        return tuple(name for name in map(_capability, self.capabilities) if name not in dropped)

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"DockerOptions(installation={self.installation}, network_mode={self.network_mode!r})"


def _capability(name: str) -> str:
    return name.strip().upper().removeprefix("CAP_")


def with_seccomp_document(options: DockerOptions) -> DockerOptions:
    """Replace the path of a seccomp profile by its content: the engine's API takes the document, never a path."""
    profile = options.seccomp_profile.strip()
    if not profile or profile in SECCOMP_WORDS:
        return options
    try:
        document = profile if profile.startswith("{") else Path(profile).read_text(encoding="utf-8")
        compact = msgspec.json.encode(msgspec.json.decode(document, type=dict[str, msgspec.Raw])).decode()
    except OSError as error:
        raise SettingsError(
            f"docker.seccomp_profile: {profile} cannot be read ({error.strerror}); give a readable file or 'unconfined'"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        shown = "the given document" if profile.startswith("{") else profile
        raise SettingsError(f"docker.seccomp_profile: {shown} is not a JSON object ({error})") from None
    return msgspec.structs.replace(options, seccomp_profile=compact)
