"""What was asked for: the immutable half of a sandbox, and the rules that do not depend on its state.

Nothing here holds a secret: env is names with keyed digests, registry credentials are one flag. The values are sealed
in `app.store.vault`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from uuid import UUID

from msgspec import Struct

from app.domain.sandbox import quantity
from app.errors import Invalid, Unsupported

RESERVED_METADATA_PREFIX = "opensandbox.io/"
RESTORED_EXTENSION_PREFIX = "opensandbox.extensions."
"""Extensions with this prefix are the only kind that is stored and echoed (contract 1.8)."""

_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*")
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_MAX_PREFIX_CHARS = 253
MAX_TIMEOUT_SECONDS = 100_000_000_000  # about 3,170 years, so that the expiry lies before the year 9999


class Platform(Struct, frozen=True):
    """Operating system and CPU architecture in the words of the OCI image specification."""

    os: str
    arch: str

    def __str__(self) -> str:
        """`linux/amd64`, as Docker takes it."""
        return f"{self.os}/{self.arch}"


class SandboxSpec(Struct, frozen=True, omit_defaults=True):
    """What a client requested, as it was accepted."""

    image: str = ""
    """Empty = it is made from a snapshot."""
    entrypoint: tuple[str, ...] = ()
    resource_limits: dict[str, str] = {}
    resource_requests: dict[str, str] = {}
    env: dict[str, str] = {}
    """Name -> keyed digest of the value (never the value)."""
    registry_auth: bool = False
    platform: Platform | None = None
    extensions: dict[str, str] = {}
    snapshot_id: UUID | None = None
    """The snapshot that it is made from."""


ALL_GPUS = -1
_PARSERS: Mapping[str, Callable[[str], int]] = {
    "cpu": quantity.parse_nano_cpus,
    "memory": quantity.parse_memory,
    "gpu": quantity.parse_gpus,
}


def parse_limits(limits: Mapping[str, str]) -> dict[str, int]:
    """`cpu` in billionths, `memory` in bytes, `gpu` as a count (-1 = all).

    Raises:
        Invalid: a quantity is malformed.
        Unsupported: a resource this server does not limit; ignoring it would promise a limit that does not exist.
    """
    parsed: dict[str, int] = {}
    for key, text in limits.items():
        parser = _PARSERS.get(key)
        if parser is None:
            raise Unsupported(
                "SANDBOX::API_NOT_SUPPORTED", "resourceLimits takes cpu, memory and gpu; another key is not served yet"
            )
        try:
            parsed[key] = parser(text)
        except ValueError as error:
            raise Invalid("SANDBOX::INVALID_PARAMETER", f"resourceLimits.{key} {error}") from None
    return parsed


class Bounds(Struct, frozen=True):
    """What the operator decides about the limits of every sandbox. None = not decided."""

    default_cpu_nanos: int | None = None
    default_memory_bytes: int | None = None
    max_cpu_nanos: int | None = None
    max_memory_bytes: int | None = None

    def apply(self, limits: Mapping[str, int]) -> dict[str, int]:
        """The limits that hold, for `parse_limits`' answer.

        A request without a limit gets the default, and at most the maximum.

        Raises:
            Invalid: a limit is above the maximum.
        """
        found = dict(limits)
        rules = (
            ("cpu", self.default_cpu_nanos, self.max_cpu_nanos),
            ("memory", self.default_memory_bytes, self.max_memory_bytes),
        )
        for name, default, most in rules:
            if most is not None and found.get(name, 0) > most:
                raise Invalid(
                    "SANDBOX::INVALID_PARAMETER",
                    f"resourceLimits.{name} is above the operator's maximum (docker.max_{name})",
                )
            chosen = [value for value in (default, most) if value is not None]
            if name not in found and chosen:
                found[name] = min(chosen)
        return found


def check_timeout(timeout_s: int | None, max_s: int | None = None) -> None:
    """Check the upper bounds of a timeout: the operator's (`max_s`, None = none) and the calendar's.

    PostgreSQL and Python must both be able to hold the expiry. Otherwise the stored row could not be read.
    """
    if timeout_s is None:
        return
    if max_s is not None and timeout_s > max_s:
        message = f"timeout must be at most {max_s} s (max_sandbox_timeout_seconds)."
        raise Invalid("SANDBOX::INVALID_PARAMETER", message)
    if timeout_s > MAX_TIMEOUT_SECONDS:
        message = f"timeout must be at most {MAX_TIMEOUT_SECONDS} s; leave it out for a sandbox that never expires."
        raise Invalid("SANDBOX::INVALID_PARAMETER", message)


def check_platform(platform: Platform) -> Platform:
    """Trimmed and lower-cased; os linux or windows, arch amd64 or arm64 (contract 1.8)."""
    os, arch = platform.os.strip().lower(), platform.arch.strip().lower()
    if os == "windows":
        raise Unsupported("SANDBOX::API_NOT_SUPPORTED", "platform.os windows is not served yet")
    if os != "linux":
        raise Invalid("SANDBOX::INVALID_PARAMETER", "platform.os must be linux or windows")
    if arch not in ("amd64", "arm64"):
        raise Invalid("SANDBOX::INVALID_PARAMETER", "platform.arch must be amd64 or arm64")
    return Platform(os, arch)


def check_metadata(metadata: Mapping[str, str], reserved_code: str = "SANDBOX::INVALID_METADATA_LABEL") -> None:
    """Kubernetes label rules (contract 1.11). `reserved_code` is the wire code for the reserved prefix."""
    for key, value in metadata.items():
        if key.startswith(RESERVED_METADATA_PREFIX):
            raise Invalid(reserved_code, f"metadata keys below {RESERVED_METADATA_PREFIX} are reserved")
        prefix, slash, name = key.rpartition("/")
        if slash and (len(prefix) > _MAX_PREFIX_CHARS or not _DNS_SUBDOMAIN.fullmatch(prefix)):
            raise Invalid(
                "SANDBOX::INVALID_METADATA_LABEL",
                "the prefix of a metadata key must be a lower-case DNS subdomain of at most 253 characters",
            )
        if not _LABEL.fullmatch(name):
            raise Invalid(
                "SANDBOX::INVALID_METADATA_LABEL",
                "the name of a metadata key must be 1 to 63 letters, digits, -, _ or ., beginning and ending with a "
                "letter or digit",
            )
        if value and not _LABEL.fullmatch(value):
            raise Invalid(
                "SANDBOX::INVALID_METADATA_LABEL",
                "a metadata value must be empty or 1 to 63 letters, digits, -, _ or ., beginning and ending with a "
                "letter or digit",
            )
