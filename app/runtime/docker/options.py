"""What the operator decides about every container, and how the engine is asked."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import msgspec
from msgspec import Struct

from app.errors import SettingsError

DROPPED = (
    "AUDIT_WRITE",
    "MKNOD",
    "NET_ADMIN",
    "NET_RAW",
    "SYS_ADMIN",
    "SYS_MODULE",
    "SYS_PTRACE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
)
"""Capabilities that a sandbox does not get unless the operator says otherwise."""

SECCOMP_WORDS = ("unconfined", "builtin")
"""Values that the engine itself understands; anything else is a file or a document."""


class DockerOptions(Struct, frozen=True, kw_only=True):
    """Settings of one driver; the same for every sandbox."""

    installation: UUID
    """Objects that bear another installation's label are strangers."""
    network_mode: str = "bridge"
    api_timeout: float = 180.0
    """Seconds for one engine call, pulls and event streams apart."""
    pull_timeout: float = 600.0
    """Seconds for one image."""
    drop_capabilities: tuple[str, ...] = DROPPED
    apparmor_profile: str = ""
    """Empty = the engine's default."""
    seccomp_profile: str = ""
    """Empty = the engine's default; else a word the engine knows, a JSON document, or the path of a file with one."""
    no_new_privileges: bool = True
    pids_limit: int = 4096
    sandbox_env: dict[str, str] = {}
    log_max_size: str = "10m"
    log_max_files: int = 3

    def __repr__(self) -> str:
        """Keep env values out of tracebacks."""
        return f"DockerOptions(installation={self.installation}, network_mode={self.network_mode!r})"


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
